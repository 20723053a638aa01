"""Launches of the kernels: sizes, grids, and what a tile may load."""
