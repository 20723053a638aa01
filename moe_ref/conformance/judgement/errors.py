"""Bad input, which every executor must refuse in one line that names the argument and its value.

Executors that check their arguments with `moe_ref.validation` must say so in the specification's own words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import torch

from moe_ref.conformance.judgement.call import Inputs, call, to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, applicable
from moe_ref.conformance.judgement.faults import RAISED, Fault
from moe_ref.conformance.judgement.refusals import lacking_form
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.declared import fitted
from moe_ref.conformance.problems.packed import in_whole_blocks
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import WEIGHTS
from moe_ref.layer import moe, routed_experts
from moe_ref.types import ExpertLoRA, MoEConfig
from moe_ref.validation import DECODED_DTYPES, FLOAT_DTYPES, dtype_name

if TYPE_CHECKING:
    from torch import Tensor

    from executors import Capabilities, Executor

_PROBLEM = Problem(4, 6, 8, 5, MoEConfig(2), gate_up_bias=True, down_bias=True)


def _weights(**changes: Callable[[Any], Any]) -> Callable[[Inputs], Inputs]:
    def change(inputs: Inputs) -> Inputs:
        changed = {name: f(getattr(inputs.weights, name)) for name, f in changes.items()}
        return replace(inputs, weights=replace(inputs.weights, **changed))

    return change


def _tensor(**changes: Callable[[Any], Any]) -> Callable[[Inputs], Inputs]:
    def change(inputs: Inputs) -> Inputs:
        return replace(inputs, **{name: f(getattr(inputs, name)) for name, f in changes.items()})

    return change


def _packed(**changes: Callable[[Any], Any]) -> Callable[[Inputs], Inputs]:
    """Changes gate_up_proj in 4 bits."""

    def change(tensor: Any) -> Any:
        return replace(tensor, **{name: f(getattr(tensor, name)) for name, f in changes.items()})

    return _weights(gate_up_proj=change)


def _config(**changes: Any) -> Callable[[Inputs], Inputs]:
    return _weights(config=lambda config: replace(config, **changes))


def _lora(**factors: tuple[int | str, ...]) -> Callable[[Inputs], Inputs]:
    """Adapters of ones, in these shapes."""

    def change(inputs: Inputs) -> Inputs:
        sizes: dict[int | str, Any] = {"H": inputs.weights.hidden_size, "I": inputs.weights.intermediate_size}
        made = {name: torch.ones([sizes.get(n, n) for n in shape]) for name, shape in factors.items()}
        return replace(inputs, weights=replace(inputs.weights, lora=ExpertLoRA(**made)))  # type: ignore[arg-type]

    return change


def _another_dtype(name: str) -> str:
    return "bfloat16" if name != "bfloat16" else "float16"


def _in_another_dtype(value: Tensor) -> Tensor:
    return value.detach().to(getattr(torch, _another_dtype(dtype_name(value))))


def _norm_of_integers(inputs: Inputs) -> Inputs:
    return replace(
        inputs,
        weights=replace(inputs.weights, post_expert_norm=inputs.x.detach().new_ones(inputs.weights.hidden_size).int()),
    )


# What is wrong -> (how to make it so, the argument that the message must name).
BAD_INPUTS: dict[str, tuple[Callable[[Inputs], Inputs], str]] = {
    "x too narrow": (_tensor(x=lambda x: x[..., 1:]), "x.shape"),
    "x of integers": (_tensor(x=lambda x: x.detach().int()), "x.dtype"),
    "x of another dtype": (_tensor(x=lambda x: _in_another_dtype(x)), "x.dtype"),
    "x no array": (_tensor(x=lambda x: [1.0, 2.0]), "x="),
    "one projection of another dtype": (_weights(down_proj=lambda w: _in_another_dtype(w)), "down_proj.dtype"),
    "gate_up_proj flat": (_weights(gate_up_proj=lambda w: w[0]), "gate_up_proj.shape"),
    "gate_up_proj odd": (_weights(gate_up_proj=lambda w: w[:, 1:]), "gate_up_proj.shape"),
    "down_proj transposed": (_weights(down_proj=lambda w: w.transpose(1, 2)), "down_proj.shape"),
    "gate_up_proj_bias too short": (_weights(gate_up_proj_bias=lambda b: b[:, 1:]), "gate_up_proj_bias.shape"),
    "down_proj_bias of one expert": (_weights(down_proj_bias=lambda b: b[:1]), "down_proj_bias.shape"),
    "top_k zero": (_config(top_k=0), "top_k"),
    "top_k a fraction": (_config(top_k=1.5), "top_k"),
    "scoring unknown": (_config(scoring="softmax2"), "scoring"),
    "activation unknown": (_config(activation="swish"), "activation"),
    "activation not gated": (_config(activation="silu"), "down_proj.shape"),
    "limit of gelu": (_config(activation="geglu", alpha=1.0, up_offset=0.0, limit=7.0), "limit"),
    "topk_groups beyond num_groups": (_config(num_groups=2, topk_groups=3), "topk_groups"),
    "group_score unknown": (_config(group_score="mean"), "group_score"),
    "scale_input no bool": (_config(scale_input=1), "scale_input"),
    "selection_key unknown": (_config(selection_key="bias"), "selection_key"),
    "renormalize_form unknown": (_config(renormalize_form="clamp"), "renormalize_form"),
    "expert_scale of integers": (_weights(expert_scale=lambda _: torch.ones(6).int()), "expert_scale.dtype"),
    "post_expert_norm of another width": (_weights(post_expert_norm=lambda _: torch.ones(7)), "post_expert_norm.shape"),
    "post_expert_norm of integers": (_norm_of_integers, "post_expert_norm.dtype"),
    "post_expert_norm_eps zero": (_config(post_expert_norm_eps=0.0), "post_expert_norm_eps"),
    "lora no ExpertLoRA": (_weights(lora=lambda _: {}), "lora"),
    "lora without its second factor": (_lora(gate_up_lora_a=(6, 2, "H")), "gate_up_lora_b"),
    "lora of other experts": (_lora(down_lora_a=(5, 2, "I"), down_lora_b=(6, "H", 2)), "down_lora_a"),
    "lora of two ranks": (_lora(down_lora_a=(6, 3, "I"), down_lora_b=(6, "H", 2)), "down_lora_b"),
    "layout unknown": (_config(gate_up_layout="mixed"), "gate_up_layout"),
    "limit negative": (_config(limit=-1.0), "limit"),
    "clamp unknown": (_config(limit=7.0, clamp="late"), "clamp"),
    "clamp of nothing": (_config(clamp="after", limit=None), "clamp"),
    "gate_softcap zero": (_config(gate_softcap=0.0), "gate_softcap"),
    "gate_softcap of gelu": (
        _config(activation="geglu", alpha=1.0, up_offset=0.0, limit=None, gate_softcap=5.0),
        "gate_softcap",
    ),
    "up_softcap beside a limit": (_config(limit=7.0, up_softcap=5.0), "up_softcap"),
    "alpha NaN": (_config(alpha=float("nan")), "alpha"),
    "config no MoEConfig": (_weights(config=lambda config: {"top_k": 2}), "config"),
    "weights no MoEWeights": (_tensor(weights=lambda w: (w.gate_up_proj, w.down_proj)), "weights"),
}
NF4_ONLY: dict[str, tuple[Callable[[Inputs], Inputs], str]] = {
    "codes too few": (_packed(packed=lambda codes: codes[:-1]), "gate_up_proj.packed.shape"),
    "codes of another dtype": (_packed(packed=lambda codes: codes.view(torch.int8)), "gate_up_proj.packed.dtype"),
    "absmax of fewer blocks": (_packed(absmax=lambda absmax: absmax[:-1]), "gate_up_proj.absmax.shape"),
    "absmax in bf16": (_packed(absmax=lambda absmax: absmax.bfloat16()), "gate_up_proj.absmax.dtype"),
    "nested statistics incomplete": (_packed(nested_absmax=lambda _: torch.ones(1)), "gate_up_proj.nested_code"),
    "blocksize unknown": (_packed(blocksize=lambda _: 48), "gate_up_proj.blocksize"),
    "quant_type unknown": (_packed(quant_type=lambda _: "int4"), "gate_up_proj.quant_type"),
    "decoded to another dtype than x": (_packed(dtype=lambda of: _another_dtype(of)), "down_proj.dtype"),
    "shape of other experts": (_packed(shape=lambda shape: (shape[0], shape[1] - 1, *shape[2:])), "gate_up_proj"),
}
MXFP4_ONLY: dict[str, tuple[Callable[[Inputs], Inputs], str]] = {
    "blocks of fewer bytes": (_packed(blocks=lambda blocks: blocks[..., 1:]), "gate_up_proj.blocks.shape"),
    "blocks in one dimension": (_packed(blocks=lambda blocks: blocks.flatten()), "gate_up_proj.blocks.shape"),
    "blocks of another dtype": (_packed(blocks=lambda blocks: blocks.view(torch.int8)), "gate_up_proj.blocks.dtype"),
    "blocks of other experts": (
        _packed(blocks=lambda blocks: blocks[1:], scales=lambda scales: scales[1:]),
        "down_proj.shape",
    ),
    "scales of fewer blocks": (_packed(scales=lambda scales: scales[:, 1:]), "gate_up_proj.scales.shape"),
    "scales as numbers": (_packed(scales=lambda scales: scales.float()), "gate_up_proj.scales.dtype"),
    "decoded to another dtype than x": (_packed(dtype=lambda of: _another_dtype(of)), "down_proj.dtype"),
    "decoded to float64": (_packed(dtype=lambda _: "float64"), "gate_up_proj.dtype"),
    "transposed no bool": (_packed(transposed=lambda _: 1), "gate_up_proj.transposed"),
}
IN_4_BITS = {"nf4": NF4_ONLY, "fp4": NF4_ONLY, "mxfp4": MXFP4_ONLY}  # what is wrong with projections of each kind
LAYER_ONLY: dict[str, tuple[Callable[[Inputs], Inputs], str]] = {
    "router_logits of other tokens": (_tensor(router_logits=lambda a: a[1:]), "router_logits.shape"),
    "router_logits of other experts": (_tensor(router_logits=lambda a: a[:, 1:]), "router_logits.shape"),
    "top_k missing": (_config(top_k=None), "top_k"),
    "top_k beyond E": (_config(top_k=7), "top_k"),
    "num_groups not a divisor": (_config(num_groups=4), "num_groups"),
    "top_k beyond the groups": (_config(top_k=4, num_groups=3, topk_groups=1), "top_k"),
    "top2_sum of one expert": (_config(num_groups=6, topk_groups=3, group_score="top2_sum"), "group_score"),
    "selection_bias of other experts": (_weights(selection_bias=lambda _: torch.zeros(5)), "selection_bias.shape"),
    "expert_scale of other experts": (_weights(expert_scale=lambda _: torch.ones(5)), "expert_scale.shape"),
}
EXPERTS_ONLY: dict[str, tuple[Callable[[Inputs], Inputs], str]] = {
    "topk_ids of other tokens": (_tensor(topk_ids=lambda a: a[1:]), "topk_ids.shape"),
    "topk_ids floating": (_tensor(topk_ids=lambda a: a.float()), "topk_ids.dtype"),
    "topk_weights of other slots": (_tensor(topk_weights=lambda a: a[:, 1:]), "topk_weights.shape"),
}


def check_errors(executor: Executor, device: str = "cpu") -> None:
    """Demands for every bad input an error in one line that names the argument and its value (`refusal_fault`).

    Raises:
        ConformanceError: if an input is accepted, or an error is of another form; with all that are.
    """
    found: list[tuple[Problem, Fault]] = []
    for entry, more in (("layer", LAYER_ONLY), ("experts", EXPERTS_ONLY)):
        dtype = next(d for d in ("float32", *FLOAT_DTYPES) if d in executor.capabilities.dtypes)
        problem = _oblong(applicable(executor, replace(_PROBLEM, entry=entry, dtype=dtype)), executor.capabilities)
        if problem.entry != entry:
            continue
        good = to_torch(problem, build(problem), device)
        cases = [
            (what, spoil(good), argument)
            for what, (spoil, argument) in (BAD_INPUTS | more).items()
            if executor.capabilities.biases or not argument.startswith(("gate_up_proj_bias", "down_proj_bias"))
        ]
        for kind in sorted(executor.capabilities.weights & set(IN_4_BITS)):
            decoded = next((d for d in DECODED_DTYPES if d in executor.capabilities.dtypes), dtype)
            packed = fitted(_of_kind(replace(problem, dtype=decoded), kind), executor.capabilities)
            inputs = to_torch(packed, build(packed), device)
            spoiled = IN_4_BITS[kind].items()
            cases += [(f"{kind}, {what}", spoil(inputs), argument) for what, (spoil, argument) in spoiled]
        faults = (refusal_fault(executor, bad, argument, what) for what, bad, argument in cases)
        found += [(problem, fault) for fault in faults if fault is not None]
    if found:
        (problem, first), *others = found
        raise ConformanceError(executor, problem, *first, more=[fault for _, fault in others])


def check_refusal(executor: Executor, problem: Problem, bad: Inputs, argument: str, what: str) -> None:
    """Demands that one bad input is refused as `refusal_fault` says.

    Args:
        executor: the executor to check.
        problem: what to print if it fails.
        bad: arguments of a call.
        argument: what the message begins with, such as "x.dtype".
        what: what is wrong, for the message.

    Raises:
        ConformanceError: if the input is accepted, or the error is of another form.
    """
    fault = refusal_fault(executor, bad, argument, what)
    if fault is not None:
        raise ConformanceError(executor, problem, *fault)


def refusal_fault(executor: Executor, bad: Inputs, argument: str, what: str) -> Fault | None:
    """What is wrong with how an executor refuses a bad input, or None.

    The error is a ValueError (`executors.Unsupported` is one) or a TypeError, of one line that names the argument and
    its value. It has the specification's words, too, if `moe_ref.validation` raised it or the executor is of this
    package: then other words mean that something else was checked.

    Args:
        executor: the executor to check.
        bad: arguments of a call.
        argument: what the specification's message begins with, such as "x.dtype".
        what: what is wrong, for the message.
    """
    expected = _error_of(lambda: _specification(bad))
    actual = _error_of(lambda: call(executor, bad))
    if expected is None or not str(expected).startswith(argument) or "\n" in str(expected):
        raise AssertionError(f"the specification's error for {what} is not in form: {expected!r}")
    if uses_our_words(executor, actual):
        lacks = "" if str(actual) == str(expected) else "these words, since moe_ref.validation checks the arguments"
    else:
        lacks = lacking_form(actual, str(expected), bad)
    if not lacks:
        return None
    said = "nothing" if actual is None else repr(actual)
    return Fault("the contract on errors", f"{what}: raises {said}, but must raise {lacks}; for example {expected!r}")


def uses_our_words(executor: Executor, error: BaseException | None) -> bool:
    """Whether `moe_ref.validation` raised the error, or the executor is one of this package."""
    if type(executor).__module__.partition(".")[0] == "executors":
        return True
    frames = walk_tb(None if error is None else error.__traceback__)
    return any(str(frame.f_globals.get("__name__")).startswith("moe_ref.validation") for frame, _ in frames)


def check_undeclared_weights(executor: Executor, device: str = "cpu") -> None:
    """Demands Unsupported, from ``check`` and from a call, for kinds of projections that the executor does not declare.

    So it does for two kinds that it does not declare together.

    Raises:
        ConformanceError: if such projections are taken, or another error is raised.
    """
    import executors

    able = executor.capabilities
    dtypes = [d for d in DECODED_DTYPES if d in able.dtypes]
    for kinds in product(WEIGHTS, repeat=2):
        if able.takes(*kinds) or not dtypes:
            continue
        problem = fitted(applicable(executor, _of_kind(replace(_PROBLEM, dtype=dtypes[0]), *kinds)), able)
        inputs = to_torch(problem, build(problem), device)
        for name, action in (
            ("check", lambda i: executor.check(i.x, i.weights)),
            ("a call", lambda i: call(executor, i)),
        ):
            error = _error_of(lambda action=action, inputs=inputs: action(inputs))  # type: ignore[misc]
            if not isinstance(error, executors.Unsupported) or "\n" in str(error):
                said = " beside ".join(dict.fromkeys(kinds))
                message = (
                    f"{name} with {said} weights, which it does not declare: {error!r}, but must raise Unsupported"
                )
                raise ConformanceError(executor, problem, "the contract on errors", message)


def _oblong(problem: Problem, able: Capabilities) -> Problem:
    """The problem in declared sizes and dtypes, with H other than I, lest a transposed projection fit."""
    problem = fitted(problem, able)
    wider = problem.hidden + able.align_hidden * (problem.hidden == problem.intermediate)
    return replace(problem, hidden=wider)


def _of_kind(problem: Problem, kind: str, down: str | None = None) -> Problem:
    """The problem with projections of one kind, or of two."""
    quant_type, down_quant_type = ("" if k == "dense" else k for k in (kind, kind if down is None else down))
    return in_whole_blocks(replace(problem, quant_type=quant_type, down_quant_type=down_quant_type, blocksize=32))


def _specification(inputs: Inputs) -> Any:
    if inputs.router_logits is not None:
        return moe(inputs.x, inputs.router_logits, inputs.weights)
    return routed_experts(inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.weights)


def _error_of(function: Callable[[], Any]) -> BaseException | None:
    try:
        function()
    except RAISED as error:
        return error
    return None
