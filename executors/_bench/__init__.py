"""The benchmark: layers, contenders, timing, and reports."""
