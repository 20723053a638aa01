"""Models of transformers whose experts are in 4 bits, by bitsandbytes' own function, and what decodes them whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import parametrize
from torch import nn

import executors
import families
import moe_ref
from executors.hf.module import is_experts
from packed_cases import LivePeak, Watched

FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4"},
    "nested": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "blocksize": 128},
}


def experts_in(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_experts(module)]


def names_of(module: Any) -> tuple[str, str]:
    """The names of a module's projections."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def packed_by_bitsandbytes(module: nn.Module, form: str) -> nn.Module:
    """The same module or model, its experts in 4 bits, in place."""
    for own in experts_in(module):
        for name in names_of(own):
            parametrize.replace_parameter_4bit(own, name, **FORMS[form])
    return module


def values_of(module: nn.Module, name: str) -> torch.Tensor:
    """The stored stack as the specification decodes it. (The library's own decoding is wrong for rows this short.)"""
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    tensor = executors.nf4.from_quant_state(chain.original, chain[0].quant_state)
    return moe_ref.nf4.decode(tensor).to(getattr(torch, tensor.dtype))


def decoded(model: nn.Module, other: nn.Module) -> nn.Module:
    """``other``, a dense model of the same family, with the numbers that the codes of ``model`` mean."""
    for own, dense in zip(experts_in(model), experts_in(other), strict=True):
        for name in names_of(own):
            getattr(dense, name).data = values_of(own, name)
    return other


@contextmanager
def counted() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of stacks that bitsandbytes decodes whole meanwhile."""
    seen: list[tuple[int, ...]] = []
    true, true_decode = parametrize.Bnb4bitParametrization.forward, functional.dequantize_4bit

    def forward(self: Any, packed: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(self.quant_state.shape))
        return true(self, packed)

    def dequantize_4bit(packed: torch.Tensor, quant_state: Any = None, *args: Any, **given: Any) -> torch.Tensor:
        if len(quant_state.shape) == 3:
            seen.append(tuple(quant_state.shape))
        return true_decode(packed, quant_state, *args, **given)

    parametrize.Bnb4bitParametrization.forward = forward  # type: ignore[method-assign]
    functional.dequantize_4bit = dequantize_4bit
    try:
        yield seen
    finally:
        parametrize.Bnb4bitParametrization.forward = true  # type: ignore[method-assign]
        functional.dequantize_4bit = true_decode


class Alive(LivePeak):
    """The most bytes that were alive at once: of given tensors for as long as they live, and of all that is made."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        Watched.__init__(self)
        self.given, self.alive, self.peak = set(), {}, 0
        self.saw("given", [value.detach() for value in given])

    def saw(self, name: str, out: object) -> None:
        several = out if isinstance(out, tuple | list) else [out]
        super().saw(name, [value for value in several if not getattr(value, "is_meta", False)])

    def now(self) -> int:
        """The bytes that are alive."""
        self.saw("now", [])
        return sum(size for _, size in self.alive.values())


def build(name: str, form: str = "") -> Any:
    """A family's tiny model, its experts in 4 bits where a form is named."""
    model = families.build(families.named(name))
    return packed_by_bitsandbytes(model, form) if form else model
