"""The Triton kernels and what launches them, for the executors ``triton`` and ``grouped_nf4``."""
