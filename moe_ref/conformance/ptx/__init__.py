"""Runs the PTX that Triton compiles, on a CPU, and judges it: no GPU is needed.

`executed` is the way in; `launch.launch` takes PTX from anywhere. Nothing here knows the kernels of this project.
"""
