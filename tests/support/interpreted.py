"""Imported first: without a GPU, this process has its Triton kernels run in Triton's interpreter.

Triton settles that when a kernel is made. What tests start in processes of their own is not interpreted.
"""

from importlib.util import find_spec

import pytest
import torch

WITHOUT_TRITON = [] if find_spec("triton") else ["*triton*"]  # test files to leave out

with pytest.MonkeyPatch.context() as patch:
    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")
    if not WITHOUT_TRITON:
        import triton.experimental.gluon  # noqa: F401  # imported at the first launch otherwise, and must find the same

        import executors.triton  # noqa: F401
