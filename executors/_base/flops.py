"""Operations of an operator's products, for ``torch.utils.flop_counter``, which sees no insides of operators.

A product of [n, k] and [k, m] has 2 n k m, as torch counts. There are S = T*K rows, empty slots among them, since
shapes do not tell them. Only products are counted, each once: of matrices, dense or in 4 bits, and of adapters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from executors._after_import import after_import
from executors._base.arguments import NAMES, Arguments

COUNTER = "torch.utils.flop_counter"
KEPT = 5  # what the backward operator takes between dy and needs: z first


class Sizes(NamedTuple):
    """Of a projection [E, m, k] with an adapter of rank r, or 0, for so many rows."""

    rows: int
    m: int
    k: int
    r: int

    @property
    def matrix(self) -> int:
        """Of a product with the matrix, and of its gradient."""
        return 2 * self.rows * self.m * self.k

    @property
    def first(self) -> int:
        """Of one with the adapter's A, and of its gradient."""
        return 2 * self.rows * self.r * self.k

    @property
    def second(self) -> int:
        """Of one with the adapter's B, and of its gradient."""
        return 2 * self.rows * self.r * self.m

    @property
    def whole(self) -> int:
        """Of rows W^T and the adapter's part, and as much back."""
        return self.matrix + self.first + self.second

    def gradients(self, name: str, needs: dict[str, bool], back: bool) -> int:
        """Of the parameters' gradients; ``back``: whether that of the rows is computed too."""
        of_a, of_b = needs[f"{name}_lora_a"], needs[f"{name}_lora_b"]
        inner = self.second if of_a and not back else 0
        return needs[f"{name}_proj"] * self.matrix + inner + of_a * self.first + of_b * (self.first + self.second)


def register(name: str) -> None:
    """Registers the formulas of ``moe_ref::NAME`` and its derivatives, as soon as torch's counter is imported."""
    of_operators: dict[str, Any] = {name: forward, f"{name}_backward": backward, f"{name}_tangent": tangent}

    def tell() -> None:
        from torch.utils.flop_counter import register_flop_formula

        for own, formula in of_operators.items():
            register_flop_formula(getattr(torch.ops.moe_ref, own), get_raw=True)(formula)

    after_import(COUNTER, tell)


def forward(*inputs: Any, out_val: Any = None) -> int:
    """Of ``moe_ref::NAME``."""
    up, down = _sizes(Arguments(*inputs[:-2]))
    return up.whole + down.whole


def backward(dy: Tensor, z: Tensor, *inputs: Any, out_val: Any = None) -> int:
    """Of ``moe_ref::NAME_backward``: what ``needs`` asks for, and what is computed anew: z, outputs for their norm."""
    needs, given = dict(zip(NAMES, inputs[KEPT - 1], strict=True)), Arguments(*inputs[KEPT:])
    up, down = _sizes(given)
    normed = given.post_expert_norm is not None
    back_up = needs["x"] or (needs["topk_weights"] and given.scale_input)
    back_down = back_up or any(needs[name] for name in NAMES if name.startswith("gate_up"))
    back_down = back_down or (needs["topk_weights"] and not normed)
    count = up.whole if not z.shape[0] and any(needs[name] for name in NAMES if name != "down_proj_bias") else 0
    count += normed * down.whole + back_down * down.whole + back_up * up.whole
    return count + down.gradients("down", needs, back_down) + up.gradients("gate_up", needs, back_up)


def tangent(*inputs: Any, out_val: Any = None) -> int:
    """Of ``moe_ref::NAME_tangent``: the layer's products, and one more for each tangent of a factor."""
    has = {name: value is not None for name, value in zip(NAMES, inputs, strict=False)}
    given = Arguments(*inputs[len(NAMES) :])
    up, down = _sizes(given)
    rows = has["x"] or (has["topk_weights"] and given.scale_input)
    count = 0
    for name, own in (("gate_up", up), ("down", down)):
        parts = has[f"{name}_lora_a"] + has[f"{name}_lora_b"]
        count += own.whole * (1 + rows) + has[f"{name}_proj"] * own.matrix + parts * (own.first + own.second)
        rows = rows or any(has[part] for part in NAMES if part.startswith(name))
    return count


def _sizes(given: Arguments) -> tuple[Sizes, Sizes]:
    up, down = given.matrices()
    slots = given.topk_ids.numel()
    return _size(slots, up.shape, given.gate_up_lora_a), _size(slots, down.shape, given.down_lora_a)


def _size(slots: int, shape: tuple[int, ...], factor: Tensor | None) -> Sizes:
    return Sizes(slots, shape[1], shape[2], 0 if factor is None else factor.shape[1])
