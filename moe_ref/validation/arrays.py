"""Checks single arguments. An error is one line: argument, value, what is allowed."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import numpy as np

from moe_ref._typing import Array
from moe_ref.moving import FLOAT_DTYPES as FLOAT_DTYPES
from moe_ref.moving import dtype_name as dtype_name
from moe_ref.types import PackedTensor

ID_DTYPES = ("int32", "int64")
LARGEST_INTEGER = 2**63 - 1  # that a library takes as a number


def check_array(
    name: str, value: Any, like: tuple[str, Array] | None = None, dtypes: tuple[str, ...] = FLOAT_DTYPES
) -> None:
    """Checks that the value is an array of an allowed dtype, and of the library of ``like``, (name, array)."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name}={short(value)}: must be an array")
    if dtype_name(value) not in dtypes:
        raise TypeError(f"{name}.dtype={dtype_name(value)}: must be one of {', '.join(dtypes)}")
    layout = str(getattr(value, "layout", ""))
    if layout.startswith("torch.") and layout != "torch.strided":
        raise TypeError(f"{name}.layout={layout}: must be torch.strided")
    if like is None:
        return
    other_name, other = like
    if not _of_one_library(value, other):
        raise TypeError(f"{name} is a {library_of(value)} array: must be a {library_of(other)} array, as {other_name}")


def check_devices(arguments: dict[str, Array]) -> None:
    """Checks that all arguments, by name, are on one device.

    The message names one that differs from most, and one of those; of equally many, the first counts. On the device
    "meta" there are no numbers: where others have some, what is there is what differs.
    """
    devices = [getattr(value, "device", None) for value in arguments.values()]
    if devices.count(devices[0]) == len(devices):
        return
    pairs = zip(arguments, devices, strict=True)
    found = {name: device for name, device in pairs if device is not None}  # what JAX traces is on none yet
    devices = list(found.values())
    if devices.count(devices[0]) == len(devices):
        return
    real = [device for device in devices if not str(device).startswith("meta")] or devices
    wanted = max(real, key=real.count)
    other = next(name for name, device in found.items() if device == wanted)
    name, device = next((name, device) for name, device in found.items() if device != wanted)
    raise ValueError(f"{name}.device={device}: must be {wanted}, {other}'s")


def check_shape(name: str, value: Array, expected: tuple[int, ...], meaning: str) -> None:
    """Checks a shape; ``meaning`` explains it in the message."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}.shape={tuple(value.shape)}: must be {tuple(expected)}, {meaning}")


def check_bool(name: str, value: Any) -> None:
    """Checks that the value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={short(value)}: must be True or False")


def check_integer(name: str, value: Any) -> None:
    """Checks that the value is an integer and not a bool."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={short(value)}: must be an integer")


def check_finite(name: str, value: Any) -> None:
    """Checks that the value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name}={short(value)}: must be a float or int")
    if isinstance(value, Integral) and not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        raise ValueError(f"{name}={short(value)}: must be an integer of 64 bits, or a float")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}={value}: must be finite")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Checks that the value is one of several strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={short(value)}: must be one of {', '.join(map(repr, allowed))}")


def _of_one_library(first: Array, second: Array) -> bool:
    arrays = [value.codes if isinstance(value, PackedTensor) else value for value in (first, second)]
    if all(hasattr(array, "requires_grad") for array in arrays):
        return True  # torch.compile cannot look at the class of a torch.nn.Parameter
    return library_of(first) == library_of(second)


def library_of(value: Array) -> str:
    """The library at the root of the array's class: a subclass of torch.Tensor is a torch array."""
    value = value.codes if isinstance(value, PackedTensor) else value
    return [c.__module__.partition(".")[0] for c in type(value).__mro__ if c.__module__ not in ("builtins", "typing")][
        -1
    ]


def short(value: Any) -> str:
    """A value for a message: one line, cut if it is long."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."
