"""The benchmark: layers, contenders, timing, and what is told of it."""
