"""What an executor's answers are held against: the reference, error bars, laws, exact cases, refusals."""
