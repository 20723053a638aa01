"""Executors over several processes, judged against the specification of one device.

- `cluster`: processes that wait for work, in groups of any size;
- `split`: a problem cut over ranks, run, and joined again;
- `judging`: what the suite demands of it.
"""
