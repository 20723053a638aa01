"""The one small layer on which every behaviour is judged, in each kind of weights that the executor takes."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import numpy as np
import torch

from moe_ref.activations import split_gate_up
from moe_ref.conformance.judgement.call import Inputs, call, to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, applicable
from moe_ref.conformance.judgement.exact import held
from moe_ref.conformance.judgement.faults import same_bits
from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.declared import without_undeclared
from moe_ref.conformance.problems.packed import in_whole_blocks
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import WEIGHTS
from moe_ref.types import Activation, MoEConfig, MoEWeights
from moe_ref.validation import DECODED_DTYPES, FLOAT_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from executors import Executor

STEEP_GATES = 1024.0  # of plain SwiGLU: the sigmoid of a whole number times that is 0, 1/2 or 1, also in fp64
PLAIN = 0.9  # the smallest slope for which that is so; in fp16, whose range it passes, 128 is enough
STEEP = 1000.0  # so steep a slope of the gate that its sigmoid is 0, 1/2 or 1 for whole numbers


class NotApplicableError(Exception):
    """A behaviour says nothing about this executor; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Case:
    """One executor on one layer.

    Attributes:
        executor: the executor under judgement.
        problem: the layer: small, with everything that the executor declares.
        arrays: its numbers.
        device: where it runs.
        plain: y and every gradient of a plain call, by name; y alone of an executor without a backward pass.
        behaviour: the name of the behaviour that is judged.
        whole: whether all sums are exact: then they are equal in any order, but -0 may be 0.
    """

    executor: Executor
    problem: Problem
    arrays: Arrays
    device: str
    plain: Mapping[str, Tensor]
    behaviour: str = ""
    whole: bool = False

    def inputs(self) -> Inputs:
        """The layer's arguments as new leaves."""
        return to_torch(self.problem, deepcopy(self.arrays), self.device)  # ids and fp64 would share their memory

    def call(self, inputs: Inputs) -> Tensor:
        """Y of the executor under judgement."""
        return call(self.executor, inputs)

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """Y and, where the executor has them, all gradients."""
        y = self.call(inputs)
        return self.backward(inputs, y) if self.executor.capabilities.backward else {"y": y.detach()}

    def backward(self, inputs: Inputs, y: Tensor) -> dict[str, Tensor]:
        """Differentiates y by the layer's dy; returns `found`."""
        torch.autograd.backward(y, inputs.dy)
        return found(inputs, y)

    def needs_backward(self) -> None:
        """Says that the behaviour is about gradients."""
        if not self.executor.capabilities.backward:
            raise NotApplicableError(f"{self.executor.name} declares no backward pass")

    def needs_empty_slots(self) -> None:
        """Says that the behaviour is about ids outside [0, E)."""
        if not self.executor.capabilities.empty_slots:
            raise NotApplicableError(f"{self.executor.name} does not declare empty slots")

    def needs_cpu(self) -> None:
        """Says that the behaviour is about processes, of which only CPUs allow a copy."""
        if torch.device(self.device).type != "cpu":
            raise NotApplicableError(f"not judged on {self.device}: a process that uses it cannot be copied")

    def demand(self, truth: bool, message: str) -> None:
        """Fails with a message, unless something is true."""
        if not truth:
            self.fail(message)

    def fail(self, message: str) -> NoReturn:
        """Fails with a message."""
        raise ConformanceError(self.executor, self.problem, self.clause, message)

    @property
    def clause(self) -> str:
        """What a failure is said to break."""
        return f"the behaviour {self.behaviour}"

    def demand_same(
        self, actual: Mapping[str, Tensor], when: str, expected: Mapping[str, Tensor] | None = None
    ) -> None:
        """Fails unless all tensors have the bits of the plain call, or of those that are expected."""
        difference = self.difference(actual, self.plain if expected is None else expected)
        self.demand(not difference, f"{when}: {difference}")

    def difference(self, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
        """What is not the same, in a few words; or ""."""
        if missing := expected.keys() - actual.keys():
            return f"no gradient for {', '.join(sorted(missing))}"
        if unasked := actual.keys() - expected.keys():
            return f"a gradient for {', '.join(sorted(unasked))}"
        for name, value in actual.items():
            wanted = expected[name]
            if (value.dtype, value.device, value.shape) != (wanted.dtype, wanted.device, wanted.shape):
                forms = (f"{v.dtype} {tuple(v.shape)} on {v.device}" for v in (value, wanted))
                return f"{name} is {', but must be '.join(forms)}"
            if not (torch.equal if self.whole else same_bits)(value, wanted):
                return f"{name} has other bits"
        return ""

    def exact(self) -> Case:
        """A layer of whole numbers, with ids and weights given, where every sum is exact in whatever order."""
        return replace(_exact(_Same(self.executor), self.problem, self.device), behaviour=self.behaviour)


def found(inputs: Inputs, y: Tensor) -> dict[str, Tensor]:
    """Y, and the gradients that there are, by name."""
    gradients = {name: leaf.grad for name, leaf in inputs.tensors().items()}
    return {"y": y.detach()} | {name: value for name, value in gradients.items() if value is not None}


def with_tensors(inputs: Inputs, tensors: dict[str, Tensor]) -> Inputs:
    """The arguments with others in place of `Inputs.tensors`."""
    own: dict[str, Any] = {n: tensors[n] for n in ("x", "router_logits", "topk_weights") if n in tensors}
    return replace(inputs, weights=inputs.weights.with_parameters(tensors), **own)


def cases(executor: Executor, device: str, behaviour: str) -> list[Case]:
    """The executor's layers: one with dense weights, and one with a projection in 4 bits, as far as it takes them."""
    made = _cases(_Same(executor), device)
    return [replace(case, behaviour=behaviour) for case in made]


class _Same:
    """Keeps an executor in a cache: one that is equal to another is still judged on its own."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def __hash__(self) -> int:
        return id(self.executor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.executor is self.executor


@lru_cache(maxsize=8)
def _cases(same: _Same, device: str) -> list[Case]:
    executor = same.executor
    problems = (applicable(executor, problem) for problem in problems_of(executor))
    return [_case(executor, problem, build(problem), device) for problem in problems]


def _case(executor: Executor, problem: Problem, arrays: Arrays, device: str) -> Case:
    case = Case(executor, problem, arrays, device, {})
    return replace(case, plain=case.run(case.inputs()))


def problems_of(executor: Executor) -> list[Problem]:
    """The problems of `cases`, with all that the executor declares; fewer and smaller ones under an interpreter."""
    able = executor.capabilities
    activation = next(a for a in get_args(Activation) if a in able.activations)
    config = MoEConfig(2, renormalize=True, activation=activation)
    full = Problem(
        *(2 if able.interpreted else 3, 4, 8, 4),
        config,
        gate_up_bias=True,
        down_bias=True,
        selection_bias="small",
        expert_scale=True,
        gate_up_rank=0 if able.interpreted else 2,
        down_rank=0 if able.interpreted else 2,
        blocksize=32,
    )
    found = []
    for kinds in _kinds(executor):
        quant_type, down_quant_type = ("" if kind == "dense" else kind for kind in kinds)
        dtypes = FLOAT_DTYPES if quant_type == down_quant_type == "" else DECODED_DTYPES
        dtype = next(d for d in ("float32", *dtypes) if d in able.dtypes)
        form = replace(full, dtype=dtype, quant_type=quant_type, down_quant_type=down_quant_type)
        form = replace(form, post_expert_norm=quant_type != "")
        found.append(without_undeclared(in_whole_blocks(form), able))
    return found[-1:] if able.interpreted else found


def _kinds(executor: Executor) -> list[tuple[str, str]]:
    """Two dense projections, and one in 4 bits beside a dense one or another; what is not declared is left out."""
    able = executor.capabilities
    packed = [(kind, down) for kind in WEIGHTS[1:] for down in ("dense", kind) if able.takes(kind, down)]
    return [pair for pair in (("dense", "dense"), *packed[:1]) if able.takes(*pair)]


@lru_cache(maxsize=8)
def _exact(same: _Same, problem: Problem, device: str) -> Case:
    executor = same.executor
    config, factor = _config_of_whole_numbers(executor, problem)
    problem = replace(
        problem,
        config=config,
        entry="experts",
        post_expert_norm=False,
        selection_bias="",
        expert_scale=False,
        ids_dtype="int64",
        margins=False,
    )
    problem = without_undeclared(problem, executor.capabilities)
    arrays = build(replace(problem, quant_type="", down_quant_type=None))
    weights = held(_with_steep_gates(arrays.weights.map(_whole), factor), problem)
    if weights is None:
        raise NotApplicableError(f"{executor.name}: no weights in {problem.kinds[0]} are exact with plain SwiGLU")
    assert arrays.topk_weights is not None
    whole = replace(
        arrays,
        x=_whole(arrays.x),
        dy=_whole(arrays.dy),
        topk_weights=np.abs(_whole(arrays.topk_weights)) + 1,
        weights=weights,
    )
    return replace(_case(executor, problem, whole, device), whole=True)


def _config_of_whole_numbers(executor: Executor, problem: Problem) -> tuple[MoEConfig, float]:
    """A configuration with which whole numbers stay exact, and a factor of gates, of whose inverse ups are."""
    able = executor.capabilities
    steep = replace(problem.config, activation="swiglu", alpha=STEEP, gate_softcap=None, up_softcap=None)
    own = without_undeclared(replace(problem, config=steep), able).config
    swiglu = "swiglu" in able.activations
    if swiglu and own.alpha == STEEP:
        return own, 1.0
    if "relu2" in able.activations:
        relu2 = replace(steep, activation="relu2", alpha=1.0, limit=None, up_offset=0.0, clamp="before")
        return replace(relu2, gate_up_layout="concatenated"), 1.0
    if not swiglu:
        raise NotApplicableError(f"{executor.name} declares neither swiglu nor relu2, whose numbers can be exact")
    if own.limit is not None or own.alpha < PLAIN:
        raise NotApplicableError(f"{executor.name} declares no swiglu whose numbers can be exact")
    return own, 128.0 if problem.dtype == "float16" else STEEP_GATES


def _with_steep_gates(weights: MoEWeights, factor: float) -> MoEWeights:
    """The layer with gates so many times as large, and ups as many times smaller: act(g) u is what it was."""
    if factor == 1.0:
        return weights
    changed: dict[str, Any] = {}
    for name in ("gate_up_proj", "gate_up_proj_bias", "gate_up_lora_b"):
        if name in weights.parameters():
            changed[name] = np.array(weights.parameters()[name])
            gate, up = split_gate_up(np.moveaxis(changed[name], 1, -1), weights.config)  # views
            gate *= factor
            up /= factor
    return weights.with_parameters(changed)


def _whole(value: np.ndarray) -> np.ndarray:
    """-1, 0 or 1 for each number, most of them not 0."""
    return np.sign(value) * (np.abs(value) > 0.3 * np.abs(value).mean())
