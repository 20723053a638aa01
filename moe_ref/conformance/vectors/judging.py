"""An executor on one vector: the suite's judge, with the answers and error bars that the file holds."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_ref.conformance.judgement.call import Inputs, run, to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, check_numbers, check_route
from moe_ref.conformance.judgement.errors import check_refusal
from moe_ref.conformance.judgement.faults import different, same_bits
from moe_ref.conformance.judgement.reference import Reference, reference_of, with_bars
from moe_ref.conformance.problems.build import Arrays
from moe_ref.conformance.problems.declared import undeclared
from moe_ref.conformance.problems.packed import quantized
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.vectors.options import config_of, text
from moe_ref.conformance.vectors.reading import Folder
from moe_ref.conformance.vectors.vector import Vector, weights_of
from moe_ref.types import LORA_FACTORS, ExpertLoRA, MoEWeights

if TYPE_CHECKING:
    from executors import Executor

FOR_PORTS = ("decode", "quantize")  # executors do this inside a product, or not at all


def check_vector(executor: Executor, folder: Folder, name: str, device: str = "cpu") -> str:
    """Checks an executor on one vector.

    Args:
        executor: the executor to check.
        folder: the vectors.
        name: of the case.
        device: the device to run on.

    Returns:
        The reason why the case does not apply to the executor, or "".

    Raises:
        ConformanceError: at the first clause that is broken.
        BadVectors: the file is not of the form.
    """
    vector = folder.vector(name)
    if vector.kind in FOR_PORTS:
        return f"cases of kind {vector.kind} are for ports of the specification"
    if vector.kind == "refused":
        return _check_refused(executor, vector, name, device)
    assert vector.problem is not None
    lacking = undeclared(vector.problem, executor.capabilities)
    if lacking and vector.kind != "route":
        return f"{executor.name} does not declare {lacking}"
    if vector.kind == "route":
        return _check_routing(executor, vector, name, device)
    if vector.kind == "layer" and not executor.capabilities.routing:
        return f"{executor.name} leaves routing to others"
    assert vector.arrays is not None
    assert vector.bars is not None
    problem, arrays = vector.problem, vector.arrays
    truth = with_bars(problem, arrays, vector.bars)
    if not hasattr(executor, "route") and truth.broken_routing.any() and problem.config.scale_input:
        return f"{executor.name} does not tell which experts a broken row chooses"

    def choosing(ids: tuple[int, ...]) -> Reference:
        return reference_of(problem, replace(arrays, topk_ids=np.reshape(ids, arrays.topk_ids.shape)))

    check_numbers(executor, problem, truth, choosing, device)
    if "D4" in vector.clauses:
        _check_recompute(executor, problem, arrays, device)
    if vector.part_of and executor.capabilities.batch_invariant:
        _check_part(executor, vector, folder.vector(vector.part_of), device)
    return ""


def _check_recompute(executor: Executor, problem: Problem, arrays: Arrays, device: str) -> None:
    """D4: with the option ``recompute``, where there is one, all bits are the same."""
    if not executor.capabilities.backward:
        return
    if not is_dataclass(executor) or "recompute" not in {f.name for f in fields(executor)}:
        return
    plain, again = (
        run(replace(executor, recompute=option), to_torch(problem, arrays, device)) for option in (False, True)
    )
    fault = different(plain, again, "runs with and without recompute")
    if fault is not None:
        raise ConformanceError(executor, problem, "D4", fault.message)


def _check_part(executor: Executor, part: Vector, whole: Vector, device: str) -> None:
    """C2: tokens have the same bits among others and by themselves."""
    assert part.problem is not None
    rows = torch.from_numpy(part.stored["case.tokens"].array.copy())
    outputs: list[Any] = []
    for vector in (part, whole):
        assert vector.problem is not None
        assert vector.arrays is not None
        with torch.no_grad():
            outputs.append(run(executor, to_torch(vector.problem, vector.arrays, device), backward=False).tensors["y"])
    if not same_bits(outputs[0], outputs[1][rows]):
        raise ConformanceError(
            executor, part.problem, "C2", f"y differs from that of the same tokens in {part.part_of}"
        )


def _check_routing(executor: Executor, vector: Vector, name: str, device: str) -> str:
    """The executor's own choice, if it tells."""
    problem, stored = vector.problem, vector.stored
    assert problem is not None
    route = getattr(executor, "route", None)
    if route is None or not executor.capabilities.routing:
        return f"{executor.name} does not tell which experts it chooses"
    able = executor.capabilities
    kind = "dense" if "dense" in able.weights else min(able.weights)
    dtype = next(d for d in ("float32", "bfloat16", "float16", "float64") if d in able.dtypes)
    activation = "swiglu" if "swiglu" in able.activations else min(able.activations)
    config = replace(problem.config, activation=activation)  # type: ignore[arg-type]
    problem = replace(problem, config=config, dtype=dtype, quant_type="" if kind == "dense" else kind)
    lacking = undeclared(problem, able)
    if lacking:
        return f"{executor.name} does not declare {lacking}"
    gate_up, down = (np.zeros((problem.experts, n, 32)) for n in (problem.gate_up_rows, 32))
    others: Any = {n: stored[f"in.{n}"].numbers() for n in ("selection_bias", "expert_scale") if f"in.{n}" in stored}
    weights = quantized(MoEWeights(gate_up, down, config=config, **others), problem)
    logits, ids = stored["in.router_logits"].numbers(), stored["out.topk_ids"].array
    x = np.zeros((problem.tokens, 32))
    arrays = Arrays(x, x, ids, logits, None, weights)
    inputs = to_torch(problem, arrays, device)
    with torch.no_grad():
        check_route(executor, problem, with_bars(problem, arrays, {}), route(inputs.router_logits, inputs.weights))
    return ""


def _check_refused(executor: Executor, vector: Vector, name: str, device: str) -> str:
    """What a file has wrong is refused, as `refusal_fault` says."""
    able = executor.capabilities
    if "dense" not in able.weights or not able.routing:
        return f"{executor.name} takes no dense weights or no logits"
    arguments = refused_inputs(name, vector, device)
    config = arguments.weights.config
    tokens, hidden = arguments.x.shape
    problem = Problem(tokens, arguments.weights.num_experts, hidden, arguments.weights.intermediate_size, config)
    check_refusal(executor, problem, arguments, text(name, vector.stored, "out.argument"), f"vector {name}")
    return ""


def refused_inputs(file: str, vector: Vector, device: str = "cpu") -> Inputs:
    """The arguments of a call that must be refused, in torch, in the dtypes that the file has."""
    stored = vector.stored
    config = config_of(file, stored, checked=False)
    tensors = {n.removeprefix("in."): v.tensor().to(device) for n, v in stored.items() if n.startswith("in.")}
    wide = weights_of(file, stored, config)
    own = {name: tensors[name] for name in wide.parameters()}
    factors: Any = {name: tensors[name] for name in LORA_FACTORS if name in tensors}
    weights = replace(wide, lora=ExpertLoRA(**factors) if factors else None).with_parameters(own)
    weights = replace(weights, selection_bias=tensors.get("selection_bias"))
    ids = torch.from_numpy(np.zeros((len(tensors["x"]), 1), dtype=np.int64)).to(device)
    return Inputs(tensors["x"], tensors["dy"], tensors["router_logits"], ids, None, weights)
