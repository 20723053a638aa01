"""Triton kernels, and nothing else; `executors._triton.launch` launches them."""
