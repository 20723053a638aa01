"""One page of HTML on executors: clauses by executor, errors, times, and the machine."""
