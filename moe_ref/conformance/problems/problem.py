"""A problem: a small description that determines all arrays (`build`).

A `Problem` prints as the call that makes it, so that a failing example can be pasted into a test.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from moe_ref.types import LORA_FACTORS, MoEConfig


@dataclass(frozen=True, repr=False)
class Problem:
    """Everything that defines a call and its upstream gradient; ``seed`` gives the numbers.

    Attributes:
        tokens, experts, hidden, intermediate: T, E, H, I.
        config: the layer's configuration; ``config.top_k`` is K.
        dtype: of x and the projections.
        entry: "layer" (router_logits are given) or "experts" (topk_ids and topk_weights are given).
        routing_dtype: of router_logits or topk_weights.
        ids_dtype: of topk_ids.
        bias_dtype: of the biases, also of the selection bias, of the experts' scales, and of the norm's factor.
        gate_up_bias, down_bias: whether the layer has them.
        selection_bias: "" (none), "small" (as large as the scores), "large" (a hundred times that), or "infinite"
            (small, but -inf for about half of the experts, and infinite for another).
        expert_scale: whether the layer has learned scales of its weights, in ``bias_dtype``; ignored, and frozen, for
            entry "experts".
        post_expert_norm: whether each expert's output is normalised, with a factor in ``bias_dtype``.
        gate_up_rank, down_rank: of the adapters; 0 is none.
        lora_dtype: of the adapters' factors.
        quant_type: "" for dense projections; "nf4", "fp4" or "mxfp4" for frozen ones in 4 bits. With "mxfp4", H and I
            are multiples of 32.
        down_quant_type: of down_proj, where it differs; None where it does not.
        blocksize: of "nf4" and "fp4".
        nested: of "nf4" and "fp4": "" (plain absmax), "one" (nested statistics in one segment) or "per expert" (one
            segment for each expert if no block straddles experts, else one for all).
        margins: whether no rounding comes near another choice of experts, for executors that do not tell their choice.
        logits: "random"; "ties" (whole numbers from -1 to 1, +0 and -0 among them); "masked" (a third are -inf);
            "skewed" (some experts are far more likely); "shifted" (rows around +100, or around -100 for the softmax
            kinds and -50 for "sqrtsoftplus"); "close" (1 and its neighbours at a distance of 1e-12: ties in all but
            float64).
        cut_points: for entry "experts": draw group sizes as cut points, with replacement, from E + 1 places, so that
            empty experts and duplicates in a row occur naturally; otherwise K distinct random ids per row.
        empty_slots: for entry "experts": some ids lie outside [0, E), with NaN and inf among their weights.
        broken_logits: number of rows spoiled with NaN, +inf, or nothing but -inf.
        broken_x: number of rows of x spoiled with one NaN or infinity.
        batch: split the tokens over two leading dimensions (where T is even), or none (where T is 1).
        x_layout, weights_layout, dy_layout, routing_layout:
            "contiguous"; "transposed" (stored with the last two axes swapped, also 4-bit codes); "sliced" (every other
            element of a larger array); for x "expanded" (all tokens are one row, stride 0); for dy "scalar" (all ones,
            strides 0, as ``y.sum().backward()`` gives it).
        top_k_given: for entry "experts": whether the configuration gives K; if not, only ``topk_ids`` do.
        frozen: names of inputs that need no gradient.
        powers: pairs of a name and an exponent: the named input is 2**exponent times as large. A name is an input,
            "dy", "x[0]" (the first token), or "gate" or "up" (the halves of gate_up_proj).
        seed: the seed of all numbers.
    """

    tokens: int
    experts: int
    hidden: int
    intermediate: int
    config: MoEConfig
    dtype: str = "float32"
    entry: str = "layer"
    routing_dtype: str = "float32"
    ids_dtype: str = "int64"
    bias_dtype: str = "float32"
    gate_up_bias: bool = False
    down_bias: bool = False
    selection_bias: str = ""
    expert_scale: bool = False
    post_expert_norm: bool = False
    gate_up_rank: int = 0
    down_rank: int = 0
    lora_dtype: str = "float32"
    quant_type: str = ""
    down_quant_type: str | None = None
    blocksize: int = 64
    nested: str = ""
    margins: bool = False
    logits: str = "random"
    cut_points: bool = False
    empty_slots: bool = False
    broken_logits: int = 0
    broken_x: int = 0
    batch: bool = False
    x_layout: str = "contiguous"
    weights_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    routing_layout: str = "contiguous"
    top_k_given: bool = True
    frozen: frozenset[str] = frozenset()
    powers: tuple[tuple[str, int], ...] = ()
    seed: int = 0

    def __repr__(self) -> str:
        return _call_of(self)

    @property
    def top_k(self) -> int:
        """K."""
        assert self.config.top_k is not None
        return self.config.top_k

    def dtype_of(self, name: str) -> str:
        """The dtype of an output, an input, or its gradient (T1, T2)."""
        if name in ("router_logits", "topk_weights"):
            return self.routing_dtype
        if name in LORA_FACTORS:
            return self.lora_dtype
        return self.bias_dtype if name.endswith(("_bias", "expert_scale", "_norm")) else self.dtype

    def factor(self, *names: str) -> float:
        """The product of the powers of two that multiply the named inputs."""
        return 2.0 ** sum(power for name, power in self.powers if name in names)

    @property
    def quant_types(self) -> dict[str, str]:
        """The format of each projection, by name; "" for a dense one."""
        down = self.quant_type if self.down_quant_type is None else self.down_quant_type
        return {"gate_up_proj": self.quant_type, "down_proj": down}

    @property
    def kinds(self) -> tuple[str, str]:
        """The kinds of gate_up_proj and of down_proj: "dense", "nf4", "fp4" or "mxfp4"."""
        gate_up, down = (quant_type or "dense" for quant_type in self.quant_types.values())
        return gate_up, down

    @property
    def gate_up_rows(self) -> int:
        """J: 2I if gated, else I."""
        return (2 if self.config.gated else 1) * self.intermediate


def leading_shape(problem: Problem) -> tuple[int, ...]:
    """X's leading dimensions: (T,), or (2, T/2), or () for a single token."""
    tokens = problem.tokens
    if not problem.batch:
        return (tokens,)
    if tokens == 1:
        return ()
    return (2, tokens // 2) if tokens % 2 == 0 else (1, tokens)


def _call_of(value: Any) -> str:
    """The call that makes a dataclass, without fields that have their default."""
    given = [(f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default]
    texts = [f"{name}={_call_of(v) if is_dataclass(v) else repr(v)}" for name, v in given]
    return f"{type(value).__name__}({', '.join(texts)})"
