"""Judges an executor's answers: by the reference, error bars, laws, exact cases, and refusals."""
