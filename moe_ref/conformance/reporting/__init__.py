"""What a run of the suite tells: results by clause, failures that are expected, and failures to run again.

- `judge`: calls the checks, and lets pass what is expected to fail;
- `expected`: the file of expected failures;
- `form`: what both files have in common;
- `applicable`: what an executor does not declare, and clauses that do not apply because of that;
- `ledger`, `summary`: results of all tests, and what is printed of them;
- `results`: the same as a JSON file, for programs;
- `order`, `search`: cheap tests first, and how long a failure is made simpler;
- `saved`, `again`, `pasted`: a failure as a vector, and as a call to paste.
"""
