"""Triton kernels, and nothing else: what launches them stands beside this package."""
