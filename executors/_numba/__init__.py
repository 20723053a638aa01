"""Products of a few rows on a CPU, compiled by Numba."""
