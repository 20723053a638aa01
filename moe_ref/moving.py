"""Moves arrays to another device or dtype, whatever their library."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace, is_jax_array, to_device

from moe_ref._typing import Array

FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")
DECODED_DTYPES = FLOAT_DTYPES[1:]  # that 4 bits may decode to
HOLDS = {  # dtypes that hold every number of another one
    "float64": ("float64",),
    "float32": ("float64", "float32"),
    "bfloat16": ("float64", "float32", "bfloat16"),
    "float16": ("float64", "float32", "float16"),
}


def dtype_name(array: Array) -> str:
    """The dtype's name without its library: "bfloat16" for torch.bfloat16."""
    return _name_of(array.dtype)


def moved(array: Array, device: Any = None, dtype: Any = None) -> Array:
    """The array on another device and in another dtype, of its library or by name; None leaves either as it is.

    torch.compile traces it, if the dtype is not a name.

    Raises:
        ValueError: the library has no such dtype.
    """
    is_torch = hasattr(array, "requires_grad")
    if device is not None:
        array = array.to(device) if is_torch else to_device(array, device)
    if dtype is None or dtype_name(array) == _name_of(dtype):
        return array
    if is_torch and hasattr(dtype, "is_floating_point"):
        return array.to(dtype)
    xp, name = array_namespace(array), _name_of(dtype)
    if not hasattr(xp, name):
        raise ValueError(f"dtype={name}: must be one that {type(array).__module__} has")
    return xp.astype(array, getattr(xp, name))


def widened(array: Array) -> Array:
    """The same numbers in float64.

    Raises:
        TypeError: the library has no float64 now, as JAX before it is switched on.
    """
    xp = array_namespace(array)
    if is_jax_array(array) and "float64" not in xp.__array_namespace_info__().dtypes():
        raise TypeError("jax_enable_x64=False: must be True, since the specification computes in float64")
    return xp.astype(array, xp.float64)


def named_dtype(dtype: Any, allowed: tuple[str, ...]) -> str | None:
    """The name of a dtype, which may be a name itself; None for None.

    Raises:
        ValueError: it is none of ``allowed``.
    """
    if dtype is None:
        return None
    name = _name_of(dtype)
    if name not in allowed:
        raise ValueError(f"dtype={dtype!r:.60}: must be one of {', '.join(allowed)}")
    return name


def check_device(device: Any) -> None:
    """Refuses a dtype where a device is wanted.

    Raises:
        TypeError: it is a dtype, or the name of one.
    """
    if _name_of(device) in FLOAT_DTYPES:
        raise TypeError(f"device={device!r}: must be a device: give a dtype by name, to(dtype=...)")


def rounds(before: Array, after: Any) -> bool:
    """Whether a change of dtype may have rounded numbers."""
    if not hasattr(after, "dtype") or dtype_name(before) not in HOLDS:
        return False
    return dtype_name(after) not in HOLDS[dtype_name(before)]


def _name_of(dtype: Any) -> str:
    return dtype.__name__ if isinstance(dtype, type) else str(dtype).rpartition(".")[2]
