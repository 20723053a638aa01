"""What the kernels compile to, on a machine without a GPU: registers, shared memory, width of loads."""
