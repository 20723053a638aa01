"""The conformance suite, which anyone can run on their own executor.

- `suite`, `plugin`, `profiles`: the tests, and how pytest finds them;
- `reporting`: results by clause, expected failures, and failures to run again;
- `problems`: whole problems, drawn by Hypothesis or pinned;
- `judgement`: the reference, and what the suite demands of an executor;
- `citizen`: what hooks, modes, threads and processes of torch expect of it;
- `vectors`, `vectors_suite`: the same for other languages: cases with their answers in files, and executors on them;
- `parallel`, `parallel_suite`: executors whose experts are spread over processes;
- `mutants`, `honest`: executors that the suite must reject, and executors that it must accept.
"""
