"""``--isolate``: the suite's tests run in a process of their own, whose end is one failed test and not that of the run.

- `worker`: the process, which collects the same tests and runs those that it is sent;
- `process`: starts it, asks it, and sees it end or hang;
- `protocol`: the plugin that sends it tests, and starts another when one has ended.
"""
