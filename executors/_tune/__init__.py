"""The search for the Triton kernels' configurations on a GPU."""
