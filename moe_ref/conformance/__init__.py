"""The conformance suite that anyone can turn on their own executor.

- `problem`, `strategies`: whole problems, drawn by Hypothesis; `pinned`: those that always run;
- `checks`, `gates`, `exact`, `laws`, `errors`: what is demanded;
- `mutants`, `honest`: what must be rejected, and what must be accepted;
- `suite`, `plugin`, `profiles`: the tests and how pytest finds them.
"""
