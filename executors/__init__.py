"""PyTorch executors of Mixture-of-Experts layers, by name.

    >>> import executors, moe_ref
    >>> executors.names()
    ['auto', 'grouped_mm', 'grouped_nf4', 'native', 'numba', 'triton']

    y = executors.get("native")(x, router_logits, weights)

An executor that was asked for by name never falls back to another one: it raises `Unavailable` (this machine lacks
something) or `Unsupported` (this input). Importing this package imports no torch. It lets ``torch.load`` read what
`moe_ref.types` has (docs/reliability.md).
"""

from typing import TYPE_CHECKING, Any

from executors._checkpoint import checkpoint_policy
from executors._padding import mask_padding
from executors._protocol import Capabilities, Executor, RoutingExecutor, Unavailable, UnknownExecutor, Unsupported
from executors._registry import Explanation, available, explain, get, names, register, unregister
from executors._saving import declare_safe as _declare_safe

if TYPE_CHECKING:
    from executors import checkpoint as checkpoint
    from executors import hf as hf
    from executors import mxfp4 as mxfp4
    from executors import nf4 as nf4
    from executors import nn as nn
    from executors import parallel as parallel

__all__ = [
    "Capabilities",
    "Executor",
    "Explanation",
    "RoutingExecutor",
    "Unavailable",
    "UnknownExecutor",
    "Unsupported",
    "available",
    "checkpoint_policy",
    "explain",
    "get",
    "mask_padding",
    "names",
    "register",
    "unregister",
]

_declare_safe()


def __getattr__(name: str) -> Any:
    """``executors.nf4`` and others, which need torch or transformers, are imported when they are asked for."""
    if name in ("checkpoint", "hf", "mxfp4", "nf4", "nn", "parallel"):
        import importlib

        return importlib.import_module(f"executors.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
