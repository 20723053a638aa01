"""What the kernels run on: a GPU, or Triton's interpreter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from executors._protocol import Unavailable
from executors._triton import configs
from executors._triton.kernels.combine import combine_kernel

INTERPRETED = not isinstance(combine_kernel, JITFunction)  # Triton decides when it makes a kernel


FENCED = (3, 7, 1)  # Triton's first version without a missing fence.proxy.async on compute capability 9.0


class Device(NamedTuple):
    """A device's configurations, and how many programs it can run at once."""

    family: str
    multiprocessors: int


_STAND_INS: list[Device] = []  # the last one stands for the CPU


@contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """A context in which kernels are launched on tensors of the CPU, as that device would have it.

    Something else must run what is compiled for it, as `moe_ref.conformance.ptx` does.
    """
    _STAND_INS.append(device)
    try:
        yield
    finally:
        _STAND_INS.pop()


def takes_cpu() -> bool:
    """Whether kernels take tensors of the CPU: in the interpreter, or where something stands in for a device."""
    return INTERPRETED or bool(_STAND_INS)


def device_of(device: torch.device) -> Device:
    """The `Device` of a torch device."""
    if INTERPRETED:
        return Device("interpreter", 3)
    return _STAND_INS[-1] if _STAND_INS else _gpu(device)


@cache
def _gpu(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(configs.family_of("hip", properties.gcnArchName), properties.multi_processor_count)
    if (properties.major, properties.minor) == (9, 0) and version_of(triton.__version__) < FENCED:
        allowed = f"must be {'.'.join(map(str, FENCED))} or later, whose compiler fences copies before wgmma reads them"
        raise Unavailable(f"triton {triton.__version__} on compute capability 9.0: {allowed}")
    family = configs.family_of("cuda", 10 * properties.major + properties.minor)
    return Device(family, properties.multi_processor_count)


def version_of(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with, as (3, 7, 1) of "3.7.1+git"."""
    return tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:3]))


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, on which kernels run."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
