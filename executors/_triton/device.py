"""What the kernels run on: a GPU, or Triton's interpreter."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from executors._triton import configs
from executors._triton.kernels.combine import combine_kernel

INTERPRETED = not isinstance(combine_kernel, JITFunction)  # Triton decides when it makes a kernel


class Device(NamedTuple):
    """A device's configurations, and how many programs it can run at once."""

    family: str
    multiprocessors: int


@cache
def device_of(device: torch.device) -> Device:
    """The `Device` of a torch device."""
    if INTERPRETED:
        return Device("interpreter", 3)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(configs.family_of("hip", properties.gcnArchName), properties.multi_processor_count)
    family = configs.family_of("cuda", 10 * properties.major + properties.minor)
    return Device(family, properties.multi_processor_count)


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, on which kernels run."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
