"""Problems within what an executor declares: what they need beyond it, and what is left of them without that."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any, get_args

from moe_ref import mxfp4
from moe_ref.conformance.problems.packed import straddles
from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import GateUpLayout, MoEConfig, RenormalizeForm, Scoring, SelectionKey
from moe_ref.validation.nf4 import BLOCKSIZES

if TYPE_CHECKING:
    from executors import Capabilities

OWN_DTYPE = "x"  # in a declared set of dtypes: that of x
PREFERRED = ("float32", "bfloat16", "float16", "float64")
# The layouts of a problem, and what of `Capabilities.strided` they need.
LAYOUTS = {"x_layout": "x", "routing_layout": "routing", "weights_layout": "weights"}


def without_undeclared(problem: Problem, able: Capabilities) -> Problem:
    """The problem without the features that an executor does not declare."""
    config = problem.config
    if not able.scale_input:
        config = replace(config, scale_input=False)
    if not able.late_clamp:
        config = replace(config, clamp="before")
    if not able.softcap:
        config = replace(config, gate_softcap=None, up_softcap=None)
    config = replace(
        config,
        scoring=_within(config.scoring, get_args(Scoring), able.scorings),
        renormalize_form=_within(config.renormalize_form, get_args(RenormalizeForm), able.renormalize_forms),
        selection_key=_within(config.selection_key, get_args(SelectionKey), able.selection_keys),
    )
    if not able.selection:
        config = replace(config, num_groups=1, topk_groups=1, group_score="max")
        problem = replace(problem, selection_bias="")
    if not able.expert_scale:
        problem = replace(problem, expert_scale=False)
    if not able.post_expert_norm:
        problem = replace(problem, post_expert_norm=False)
    if not able.lora:
        problem = replace(problem, gate_up_rank=0, down_rank=0)
    return fitted(replace(problem, config=config), able)


def fitted(problem: Problem, able: Capabilities) -> Problem:
    """The problem in the sizes, dtypes, strides and forms that an executor declares; its features stay.

    Of the features only biases, empty slots and an expert in several slots are left out, which a problem may have
    beside what it is about.
    """
    unit = mxfp4.BLOCKSIZE if "mxfp4" in problem.kinds else 1
    problem = replace(
        problem,
        hidden=_multiple(problem.hidden, lcm(unit, able.align_hidden)),
        intermediate=_multiple(problem.intermediate, lcm(unit, able.align_intermediate)),
    )
    if not able.empty_batch:
        problem = replace(problem, tokens=max(problem.tokens, 1))
    others: dict[str, Any] = {
        name: _within_dtypes(getattr(problem, name), problem.dtype, allowed)
        for name, allowed in _given_dtypes(problem, able).items()
    }
    others |= {name: "contiguous" for name, argument in LAYOUTS.items() if argument not in able.strided}
    problem = replace(
        problem,
        config=_fitted_activation(problem.config, able),
        empty_slots=problem.empty_slots and able.empty_slots,
        cut_points=problem.cut_points and able.duplicate_ids,
        gate_up_bias=problem.gate_up_bias and able.biases,
        down_bias=problem.down_bias and able.biases,
        ids_dtype=_within(problem.ids_dtype, ("int64", "int32"), able.topk_ids_dtypes),
        **others,
    )
    if {"nf4", "fp4"} & {*problem.kinds}:
        problem = replace(problem, blocksize=_within(problem.blocksize, BLOCKSIZES, able.blocksizes))
        problem = replace(problem, nested=_fitted_nested(problem, able))
    return problem


def in_declared_dtype(problem: Problem, able: Capabilities) -> Problem:
    """The problem in another dtype, if the executor does not declare its own; one with powers is about its own."""
    if problem.powers or problem.dtype in able.dtypes:
        return problem
    return replace(problem, dtype=next((name for name in PREFERRED if name in able.dtypes), problem.dtype))


def _fitted_activation(config: MoEConfig, able: Capabilities) -> MoEConfig:
    """The configuration with the numbers and rows of a gated activation that are declared."""
    if config.gated:
        layout = _within(config.gate_up_layout, get_args(GateUpLayout), able.gate_up_layouts)
        config = replace(config, gate_up_layout=layout)
    if config.activation != "swiglu":
        return config
    limit = _value(config.limit, able.limits)
    if limit is not None:
        config = replace(config, gate_softcap=None, up_softcap=None)
    return replace(
        config,
        alpha=_value(config.alpha, able.alphas),
        limit=limit,
        up_offset=_value(config.up_offset, able.up_offsets),
        clamp="before" if limit is None else config.clamp,
    )


def _fitted_nested(problem: Problem, able: Capabilities) -> str:
    """The form of nested statistics, or none; where blocks straddle experts there is one segment for all (Q5)."""
    found = "one" if problem.nested and straddles(problem) else problem.nested
    return problem.nested if found in able.nested else ""


def _given_dtypes(problem: Problem, able: Capabilities) -> dict[str, Collection[str]]:
    """The fields of a problem that are dtypes of other arguments than x, and what is declared of each."""
    by_logits = problem.entry == "layer" and able.routing
    return {
        "bias_dtype": able.bias_dtypes,
        "routing_dtype": able.router_logits_dtypes if by_logits else able.topk_weights_dtypes,
        "lora_dtype": able.lora_dtypes,
    }


def takes_dtype(name: str, of_x: str, declared: Collection[str]) -> bool:
    """Whether a declared set of dtypes has this one, by its name or as x's own."""
    return name in declared or (name == of_x and OWN_DTYPE in declared)


def _within_dtypes(name: str, of_x: str, declared: Collection[str]) -> str:
    """The name, or another that is declared."""
    return next((n for n in (name, *PREFERRED) if takes_dtype(n, of_x, declared)), name)


def _value(value: Any, declared: Collection[Any] | None) -> Any:
    """The value, or the smallest that is declared; None counts as smaller than any."""
    if declared is None or value in declared:
        return value
    return min(declared, key=lambda other: (other is not None, other or 0.0))


def _multiple(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _within(name: Any, names: Collection[Any], declared: Collection[Any]) -> Any:
    """The name, or the first of ``names`` that is declared."""
    return next((n for n in (name, *names) if n in declared), name)


def undeclared(problem: Problem, able: Capabilities) -> str:
    """The features that a problem needs and an executor does not declare, such as "float16, adapters"; or ""."""
    config = problem.config
    chooses = able.routing and problem.entry == "layer"
    swiglu, in_nf4 = config.activation == "swiglu", bool({"nf4", "fp4"} & {*problem.kinds})
    nested = "one" if problem.nested and straddles(problem) else problem.nested
    needs = {
        problem.dtype: problem.dtype in able.dtypes,
        " beside ".join(dict.fromkeys(problem.kinds)) + " weights": able.takes(*problem.kinds),
        config.activation: config.activation in able.activations,
        "a clamp after the activation": able.late_clamp or config.clamp == "before",
        "softcaps": able.softcap or (config.gate_softcap is None and config.up_softcap is None),
        "groups": able.selection or not chooses or config.num_groups == 1,
        "a selection bias": able.selection or not chooses or not problem.selection_bias,
        f"scoring {config.scoring}": not chooses or config.scoring in able.scorings,
        f"renormalize_form {config.renormalize_form}": not (chooses and config.renormalize)
        or config.renormalize_form in able.renormalize_forms,
        f"selection_key {config.selection_key}": not chooses or config.selection_key in able.selection_keys,
        "expert_scale": able.expert_scale or not chooses or not problem.expert_scale,
        "a norm after each expert": able.post_expert_norm or not problem.post_expert_norm,
        "scale_input": able.scale_input or not config.scale_input,
        "adapters": able.lora or not (problem.gate_up_rank or problem.down_rank),
        f"alpha {config.alpha}": not swiglu or _is_value(config.alpha, able.alphas),
        f"limit {config.limit}": not swiglu or _is_value(config.limit, able.limits),
        f"up_offset {config.up_offset}": not swiglu or _is_value(config.up_offset, able.up_offsets),
        f"{config.gate_up_layout} gate and up": not config.gated or config.gate_up_layout in able.gate_up_layouts,
        "biases": able.biases or not (problem.gate_up_bias or problem.down_bias),
        "empty slots": able.empty_slots or not problem.empty_slots,
        "an expert in two slots": able.duplicate_ids or not problem.cut_points,
        "no tokens": able.empty_batch or problem.tokens > 0,
        f"H={problem.hidden}": problem.hidden % able.align_hidden == 0,
        f"I={problem.intermediate}": problem.intermediate % able.align_intermediate == 0,
        f"blocksize {problem.blocksize}": not in_nf4 or problem.blocksize in able.blocksizes,
        f"nested statistics, {nested}": not in_nf4 or not nested or nested in able.nested,
    }
    needs |= _met_dtypes(problem, able)
    needs |= {
        f"strides of {name}": getattr(problem, layout) == "contiguous" or name in able.strided
        for layout, name in LAYOUTS.items()
    }
    return ", ".join(need for need, met in needs.items() if not met)


def _met_dtypes(problem: Problem, able: Capabilities) -> dict[str, bool]:
    """Of the dtypes of other arguments than x, which a problem has and which are declared."""
    by_logits = problem.entry == "layer"
    chooses = by_logits and able.routing
    has = {
        "bias_dtype": problem.gate_up_bias
        or problem.down_bias
        or problem.post_expert_norm
        or (chooses and bool(problem.selection_bias or problem.expert_scale)),
        "routing_dtype": not by_logits or able.routing,
        "lora_dtype": problem.gate_up_rank + problem.down_rank > 0,
    }
    says = {"bias_dtype": "biases", "routing_dtype": "logits" if by_logits else "topk_weights", "lora_dtype": "factors"}
    met = {
        f"{says[name]} in {getattr(problem, name)}": not has[name]
        or takes_dtype(getattr(problem, name), problem.dtype, declared)
        for name, declared in _given_dtypes(problem, able).items()
    }
    return met | {f"topk_ids in {problem.ids_dtype}": by_logits or problem.ids_dtype in able.topk_ids_dtypes}


def _is_value(value: Any, declared: Collection[Any] | None) -> bool:
    return declared is None or value in declared
