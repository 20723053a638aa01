"""What cases of whole layers hold: what goes in, and every answer; and arguments that must be refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_ref.conformance.judgement.reference import Reference, reference_of
from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.vectors.contents import Contents
from moe_ref.conformance.vectors.layout import Stored, stored, stored_text
from moe_ref.conformance.vectors.options import call_arrays, config_arrays, packed_arrays
from moe_ref.error_bars import named
from moe_ref.grouping import group
from moe_ref.layer import layer_vjp
from moe_ref.numerics import round_to_nearest
from moe_ref.packed import decode
from moe_ref.routing import weigh
from moe_ref.types import MoEConfig


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer, from router_logits, or from ids and weights that are given (kinds "layer" and "experts").

    Attributes:
        problem: the description; it draws the numbers, unless
        arrays: these are the numbers.
        part_of: another case of which these are some tokens, and
        tokens: which of them: their y has the same bits in both (C2).
    """

    problem: Problem
    arrays: Arrays | None = None
    part_of: str = ""
    tokens: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """The case's kind."""
        return self.problem.entry

    def numbers(self) -> Arrays:
        """What goes in."""
        return build(self.problem) if self.arrays is None else self.arrays

    def inputs(self) -> Contents:
        """What goes in."""
        return layer_inputs(self.problem, self.numbers()) | self._others()

    def _others(self) -> Contents:
        found = call_arrays(self.problem)
        if self.part_of:
            found["case.part_of"] = stored_text(self.part_of)
            found["case.tokens"] = stored(np.array(self.tokens), "int64")
        return found

    def exact(self) -> Contents:
        """Answers that have one right value to the last bit: ids, grouping, decoded weights."""
        arrays = self.numbers()
        found = {}
        if self.kind == "layer":
            found["out.topk_ids"] = stored(arrays.topk_ids, "int64")
        grouping = group(arrays.topk_ids, self.problem.experts)
        for name in ("order", "inverse", "group_sizes", "group_offsets"):
            found[f"out.{name}"] = stored(getattr(grouping, name), "int64")
        for name, tensor in arrays.weights.packed().items():
            found[f"out.{name}"] = stored(decode(tensor), "float32")
        return found

    def floats(self) -> Contents:
        """Answers in float64: weights, y and gradients, without their error bars."""
        arrays = self.numbers()
        with np.errstate(invalid="ignore"):
            y, gradients = layer_vjp(
                arrays.x, arrays.router_logits, arrays.topk_ids, arrays.topk_weights, arrays.weights, arrays.dy
            )
        found = self._weights(arrays)
        for name, value in named(y, gradients).items():
            if name not in self._left_out():
                found[_answer(name)] = stored(value, "float64")
        return found

    def _weights(self, arrays: Arrays) -> Contents:
        if arrays.router_logits is None:
            return {}
        with np.errstate(invalid="ignore"):
            weights = weigh(
                arrays.router_logits, arrays.topk_ids, self.problem.config, expert_scale=arrays.weights.expert_scale
            )
        return {"out.topk_weights": stored(weights, "float64")}

    def _left_out(self) -> set[str]:
        """Gradients that the file does not have: of what is frozen, and of weights that the caller did not give."""
        return {*self.problem.frozen, *(["topk_weights"] if self.kind == "layer" else [])}

    def answers(self) -> Contents:
        """All answers, with error bars."""
        truth: Reference = reference_of(self.problem, self.numbers())
        if self.problem.powers:
            assert truth.within(self.problem), f"{self.problem}: an answer is past the range of its dtype"
        found = self._weights(truth.arrays)
        for name, bars in truth.bars.items():
            if name not in self._left_out():
                dtypes = self.problem.dtype, self.problem.dtype_of(name)
                answer = _answer(name)
                found[answer] = stored(bars.exact, "float64")
                found[f"{answer}.sd"] = stored(bars.sd(*dtypes), "float64")
                gates = np.array([bars.gain_sd(*dtypes), bars.rms_sd(*dtypes)])
                found[f"{answer}.gates"] = stored(gates, "float64")
        return self.exact() | found


def _answer(name: str) -> str:
    return "out.y" if name == "y" else f"grad.{name}"


def layer_inputs(problem: Problem, arrays: Arrays) -> Contents:
    """The arguments of a call, its configuration, and dy."""
    weights, found = arrays.weights, config_arrays(arrays.weights.config)
    pairs: list[tuple[str, Any]] = [("x", arrays.x), ("dy", arrays.dy), ("router_logits", arrays.router_logits)]
    if arrays.topk_weights is not None:
        found["in.topk_ids"] = stored(arrays.topk_ids, problem.ids_dtype)
        pairs.append(("topk_weights", arrays.topk_weights))
    pairs += [*weights.parameters().items(), ("selection_bias", weights.selection_bias)]
    for name, value in pairs:
        if value is not None:
            dtype = problem.dtype if name == "dy" else problem.dtype_of(name)
            found[f"in.{name}"] = stored(np.ascontiguousarray(value), dtype)
    for name, tensor in weights.packed().items():
        found |= packed_arrays(f"in.{name}", tensor)
    if weights.lora is not None:
        for name in ("gate_up_scaling", "down_scaling"):
            found[f"in.{name}"] = stored(getattr(weights.lora, name), "float64")
    return found


@dataclass(frozen=True, eq=False)
class Refused:
    """Arguments that must be refused (kind "refused").

    Attributes:
        problem: a layer that would be right, but for
        argument: this argument, which the message names first, such as "x.dtype"; since
        config: this is its configuration, if it is given, or
        dtypes: these are the dtypes of some arrays, or
        cut: these arrays lack their last elements in this many dimensions from the front.
    """

    problem: Problem
    argument: str
    config: MoEConfig | None = None
    dtypes: tuple[tuple[str, str], ...] = ()
    cut: tuple[tuple[str, int], ...] = ()
    kind: str = field(default="refused", init=False)

    def inputs(self) -> Contents:
        """What goes in."""
        arrays = build(self.problem)
        found = layer_inputs(self.problem, arrays)
        if self.config is not None:
            found |= config_arrays(self.config)
        for name, dtype in self.dtypes:
            numbers = found[f"in.{name}"].numbers()
            found[f"in.{name}"] = stored(round_to_nearest(numbers, dtype), dtype)
        for name, axis in self.cut:
            value = found[f"in.{name}"]
            some = np.take(value.array, range(value.shape[axis] - 1), axis=axis)
            found[f"in.{name}"] = Stored(value.dtype, some)
        return found

    def exact(self) -> Contents:
        """The argument."""
        return {"out.argument": stored_text(self.argument)}

    def floats(self) -> Contents:
        """None."""
        return {}

    def answers(self) -> Contents:
        """All answers."""
        return self.exact()
