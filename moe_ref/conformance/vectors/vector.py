"""What a file of vectors holds, in the terms of the suite: a problem, its numbers, and its error bars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_ref.conformance.judgement.gates import Bars
from moe_ref.conformance.problems.build import Arrays
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.vectors.layout import FLOATS, BadVectors, Stored
from moe_ref.conformance.vectors.options import call_of, config_of, given, packed_of, scalar, text
from moe_ref.types import DENSE, LORA_FACTORS, PROJECTIONS, ExpertLoRA, MoEConfig, MoEWeights, PackedTensor
from moe_ref.validation import check_experts_inputs, check_inputs, check_route_inputs

KINDS = ("layer", "experts", "route", "decode", "quantize", "refused")


@dataclass(frozen=True, eq=False)
class StoredBars:
    """Error bars of one output or gradient as a file holds them: for its own dtypes only."""

    exact: np.ndarray
    deviations: np.ndarray
    gates: np.ndarray

    def sd(self, dtype: str, out_dtype: str) -> np.ndarray:
        """Standard deviation of each element's error."""
        return self.deviations

    def gain_sd(self, dtype: str, out_dtype: str) -> float:
        """Standard deviation of the gain."""
        return float(self.gates[0])

    def rms_sd(self, dtype: str, out_dtype: str) -> float:
        """Standard deviation of the root mean square of z."""
        return float(self.gates[1])


@dataclass(frozen=True, eq=False)
class Vector:
    """A case that was read.

    Attributes:
        kind: one of `KINDS`.
        clauses: that it is about.
        stored: all its arrays.
        problem: of kinds with a router or experts: what the numbers are; its seed means nothing.
        arrays: of kinds "layer" and "experts": the numbers that go in, and ids.
        bars: of these: the answers.
        part_of: another case that has these tokens too (C2), or "".
    """

    kind: str
    clauses: tuple[str, ...]
    stored: Mapping[str, Stored]
    problem: Problem | None = None
    arrays: Arrays | None = None
    bars: Mapping[str, Bars] | None = None
    part_of: str = ""


def vector_of(file: str, stored: Mapping[str, Stored]) -> Vector:
    """A case from its arrays.

    Args:
        file: its name, for messages.
        stored: its arrays.

    Raises:
        BadVectors: they do not fit together.
    """
    kind = text(file, stored, "case.kind")
    clauses = tuple(text(file, stored, "case.clauses").split())
    if kind in ("layer", "experts"):
        problem, arrays = _layer(file, stored, kind)
        part_of = text(file, stored, "case.part_of") if "case.part_of" in stored else ""
        return Vector(kind, clauses, stored, problem, arrays, _bars(file, stored, arrays, problem), part_of)
    if kind == "route":
        return Vector(kind, clauses, stored, _route(file, stored))
    if kind in KINDS:
        return Vector(kind, clauses, stored)
    raise BadVectors(f"{file}: case.kind={kind!r:.60}: must be one of {', '.join(KINDS)}")


def _float(file: str, stored: Mapping[str, Stored], name: str, ndim: int) -> Stored:
    value = given(file, stored, f"in.{name}")
    if value.dtype not in FLOATS or len(value.shape) != ndim:
        raise BadVectors(
            f"{file}: in.{name} is {value.dtype} of shape {value.shape}: must be floats in {ndim} dimensions"
        )
    return value


def weights_of(file: str, stored: Mapping[str, Stored], config: MoEConfig) -> MoEWeights:
    """The layer's parameters in float64 NumPy; projections in 4 bits as they are.

    Raises:
        BadVectors: a part is missing, or has another form.
    """
    ndim = {
        **dict.fromkeys(PROJECTIONS, 3),
        **dict.fromkeys(LORA_FACTORS, 3),
        "gate_up_proj_bias": 2,
        "down_proj_bias": 2,
    }
    found: dict[str, np.ndarray | PackedTensor] = {}
    for name in (*DENSE, "selection_bias", "expert_scale", "post_expert_norm", *LORA_FACTORS):
        if f"in.{name}.quant_type" in stored and name in PROJECTIONS:
            found[name] = packed_of(file, stored, f"in.{name}")
        elif f"in.{name}" in stored or name in PROJECTIONS:
            found[name] = _float(file, stored, name, ndim.get(name, 1)).numbers()
    factors = {name: found.pop(name) for name in LORA_FACTORS if name in found}
    scalings = {
        name: float(scalar(file, stored, f"in.{name}", "float64"))
        for name in ("gate_up_scaling", "down_scaling")
        if factors
    }
    lora = ExpertLoRA(**factors, **scalings) if factors else None  # type: ignore[arg-type]
    return MoEWeights(**found, lora=lora, config=config)


def _layer(file: str, stored: Mapping[str, Stored], kind: str) -> tuple[Problem, Arrays]:
    config = config_of(file, stored)
    weights = weights_of(file, stored, config)
    x, dy = (_float(file, stored, name, 2).numbers() for name in ("x", "dy"))
    logits = topk_weights = None
    if kind == "layer":
        logits = _float(file, stored, "router_logits", 2).numbers()
        ids = given(file, stored, "out.topk_ids")
    else:
        topk_weights = _float(file, stored, "topk_weights", 2).numbers()
        ids = given(file, stored, "in.topk_ids")
    wide = weights.map(lambda value: value)
    try:
        if dy.shape != x.shape:
            raise ValueError(f"dy.shape={dy.shape}: must be {x.shape}, x's")
        _check(x, logits, ids, topk_weights, wide)
    except (ValueError, TypeError) as error:
        raise BadVectors(f"{file}: {error}") from error
    arrays = Arrays(x, dy, ids.array, logits, topk_weights, weights)
    return _problem(file, stored, kind, arrays), arrays


def _check(
    x: np.ndarray, logits: np.ndarray | None, ids: Stored, topk_weights: np.ndarray | None, weights: MoEWeights
) -> None:
    """The specification's own checks; a dense layer's, since one in 4 bits has another dtype than float64."""
    dense = {name: np.zeros(tensor.shape) for name, tensor in weights.packed().items()}
    weights = weights.with_parameters(dense)
    if logits is None:
        check_experts_inputs(x, ids.array, topk_weights, weights)
        return
    check_inputs(x, logits, weights)
    expected = (len(x), weights.config.top_k)
    if ids.dtype != "int64" or ids.shape != expected:
        raise ValueError(f"out.topk_ids is {ids.dtype} of shape {ids.shape}: must be int64 of shape {expected}")


def _problem(file: str, stored: Mapping[str, Stored], kind: str, arrays: Arrays) -> Problem:
    """The problem that has these numbers; where some have one dtype in it, they must have one in the file."""
    weights = arrays.weights
    packed = weights.packed()
    of_x = given(file, stored, "in.x").dtype
    routing = "router_logits" if kind == "layer" else "topk_weights"
    problem = Problem(
        tokens=len(arrays.x),
        experts=weights.num_experts,
        hidden=weights.hidden_size,
        intermediate=weights.intermediate_size,
        config=weights.config,
        dtype=of_x,
        entry=kind,
        routing_dtype=given(file, stored, f"in.{routing}").dtype,
        ids_dtype=stored["in.topk_ids"].dtype if kind == "experts" else "int64",
        bias_dtype=_common(
            stored, "gate_up_proj_bias", "down_proj_bias", "selection_bias", "expert_scale", "post_expert_norm"
        ),
        gate_up_bias=weights.gate_up_proj_bias is not None,
        down_bias=weights.down_proj_bias is not None,
        selection_bias="" if weights.selection_bias is None else "small",
        expert_scale=weights.expert_scale is not None,
        post_expert_norm=weights.post_expert_norm is not None,
        gate_up_rank=_rank(weights, "gate_up_lora_a"),
        down_rank=_rank(weights, "down_lora_a"),
        lora_dtype=_common(stored, *LORA_FACTORS),
        quant_type=packed["gate_up_proj"].quant_type if "gate_up_proj" in packed else "",
        down_quant_type=packed["down_proj"].quant_type if "down_proj" in packed else "",
        **call_of(file, stored),
    )
    names = ["dy", *weights.parameters(), *(["selection_bias"] if weights.selection_bias is not None else [])]
    for name in names:
        actual, expected = stored[f"in.{name}"].dtype, of_x if name == "dy" else problem.dtype_of(name)
        if actual != expected:
            raise BadVectors(f"{file}: in.{name} is {actual}: must be {expected}, as others of its kind")
    for name, tensor in packed.items():
        if tensor.dtype != of_x:
            raise BadVectors(f"{file}: in.{name}.dtype={tensor.dtype}: must be {of_x}, x's")
    return problem


def _common(stored: Mapping[str, Stored], *names: str) -> str:
    return next((stored[f"in.{name}"].dtype for name in names if f"in.{name}" in stored), "float32")


def _rank(weights: MoEWeights, name: str) -> int:
    factor = getattr(weights.lora, name, None)
    return 0 if factor is None else int(factor.shape[1])


def _bars(file: str, stored: Mapping[str, Stored], arrays: Arrays, problem: Problem) -> dict[str, Bars]:
    """The answers that a file has: of y, and of what is not frozen."""
    inputs = {"y": arrays.x, "x": arrays.x, **arrays.weights.parameters()}
    inputs |= {"router_logits": arrays.router_logits, "topk_weights": arrays.topk_weights}
    found: dict[str, Bars] = {}
    for name, owner in inputs.items():
        if owner is None or name in problem.frozen:
            continue
        answer = "out.y" if name == "y" else f"grad.{name}"
        parts = []
        for part, shape in (("", owner.shape), (".sd", owner.shape), (".gates", (2,))):
            value = given(file, stored, answer + part)
            if value.dtype != "float64" or value.shape != shape:
                raise BadVectors(
                    f"{file}: {answer}{part} is {value.dtype} of shape {value.shape}: must be float64 of shape {shape}"
                )
            parts.append(value.array)
        if (parts[1] < 0).any() or not np.isfinite(parts[1]).all():
            raise BadVectors(f"{file}: {answer}.sd: must be finite and at least 0")
        found[name] = StoredBars(*parts)
    return found


def _route(file: str, stored: Mapping[str, Stored]) -> Problem:
    """A problem that has only a router."""
    logits = _float(file, stored, "router_logits", 2)
    config = config_of(file, stored)
    bias, scale = (stored.get(f"in.{name}") for name in ("selection_bias", "expert_scale"))
    try:
        check_route_inputs(logits.numbers(), config, *(None if a is None else a.numbers() for a in (bias, scale)))
    except (ValueError, TypeError) as error:
        raise BadVectors(f"{file}: {error}") from error
    return Problem(
        logits.shape[0],
        logits.shape[1],
        32,
        32,
        config,
        routing_dtype=logits.dtype,
        selection_bias="" if bias is None else "small",
        expert_scale=scale is not None,
    )
