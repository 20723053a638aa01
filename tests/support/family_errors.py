"""How far a family's model strays from the same model in float64: on transformers' own loop, and on an executor.

The yardstick is transformers' own loop: its largest error over a few runs, one as it is, and some in which what goes
into the experts and what comes out of them is moved by about an ulp, in the forward and in the backward pass.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

import executors.hf
from executors.hf.interface import SwitchedLayer
from families import Family, build, experts_of
from family_sizes import VOCAB, WITH_IMAGES, WITHOUT_IDS

TOKENS = 12
MOVED = 2  # runs beside the one that is not moved
FACTORS = {torch.float32: 8.0, torch.bfloat16: 3.0}  # of the yardstick's errors: some of fp32 are a sum that cancels
SMALL = 1e-6  # of the largest gradient: smaller tensors are judged by this size


class InFloat64(TorchFunctionMode):
    """Runs code that asks for float32 in float64: norms, routers and rotations of transformers do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        func = Tensor.double if func is Tensor.float else func
        return func(*map(_wide, args), **{name: _wide(value) for name, value in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Move(torch.autograd.Function):
    """The identity, but for an ulp or so, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, generator: torch.Generator) -> Tensor:
        ctx.generator = generator
        return _moved(x, generator)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _moved(dy, ctx.generator), None


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    return x * (1 + torch.finfo(x.dtype).eps * torch.randn(x.shape, generator=generator)).to(x.dtype)


@dataclass(frozen=True)
class Results:
    """What a module gives: its output, and by name the gradients of all that has one."""

    output: Tensor
    gradients: dict[str, Tensor]

    def errors(self, exact: Results) -> dict[str, float]:
        """By name: the error's 2-norm relative to that of what is exact."""
        smallest = SMALL * max(value.norm().item() for value in exact.gradients.values())
        found = {"output": _error(self.output, exact.output, 0.0)}
        for name, value in exact.gradients.items():
            own = self.gradients.get(name)
            found[name] = math.inf if own is None else _error(own, value, smallest)
        return found


def _error(actual: Tensor, exact: Tensor, smallest: float) -> float:
    assert actual.isfinite().all()
    assert exact.dtype == torch.float64
    return (actual.double() - exact).norm().item() / max(exact.norm().item(), smallest)


@dataclass(frozen=True)
class Judgement:
    """Errors of an executor and of transformers' own loop, by name of the output and of each gradient.

    Attributes:
        layer: what the experts compute.
        ours: the executor's errors.
        own: the largest of the own loop's.
        dtype: of both.
    """

    layer: SwitchedLayer
    ours: dict[str, float]
    own: dict[str, float]
    dtype: torch.dtype

    def failures(self) -> dict[str, str]:
        """What is too far off, and how far."""
        factor, floor = FACTORS[self.dtype], torch.finfo(self.dtype).eps
        return {
            name: f"{error:.1e}, own loop {self.own[name]:.1e}"
            for name, error in self.ours.items()
            if not error <= factor * max(self.own[name], floor)
        }


def inputs(model: nn.Module) -> dict[str, Any]:
    """What the model is called with: random ids."""
    ids = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    given: dict[str, Any] = {"input_ids": ids}
    if type(model).__name__ in WITHOUT_IDS:
        given = {"inputs_embeds": model.get_input_embeddings()(ids)}
    if type(model).__name__ in WITH_IMAGES:
        given["moe_mm_token_type_ids"] = (ids % 2).int()  # every other token is an image's: its experts are others
    return given


def run_model(model: nn.Module) -> Results:
    """A forward and a backward pass."""
    output = model(**inputs(model))[0]
    output.backward(_random_like(output))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Results(output.detach(), gradients)


def run_experts(module: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> Results:
    """A forward and a backward pass of an experts module on x, topk_ids and topk_weights."""
    dtype = next(module.parameters()).dtype
    x, ids, weights = given
    wide = dtype == torch.float64
    leaves = {"x": x.to(dtype), "topk_weights": weights.double() if wide else weights}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    output = module(leaves["x"], ids, leaves["topk_weights"])
    output.backward(_random_like(output))
    leaves |= dict(module.named_parameters())
    return Results(output.detach(), {name: leaf.grad for name, leaf in leaves.items()})


def _random_like(output: Tensor) -> Tensor:
    """Upstream gradients, equal in every dtype that is no narrower than bf16."""
    made = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return made.bfloat16().to(output.dtype)


def move(modules: dict[str, nn.Module], seed: int) -> None:
    """Moves what goes into experts and what comes out of them from now on."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules.values():
        module.register_forward_pre_hook(lambda _, given: (Move.apply(given[0], generator), *given[1:]))
        module.register_forward_hook(lambda _, given, output: Move.apply(output, generator))


@cache
def judge_model(family: Family, executor: str = "native") -> Judgement:
    """The whole model in fp32.

    Raises:
        Unsupported: `executors.hf` refuses the family.
    """
    model = build(family)
    ours = copy.deepcopy(model)
    layer = executors.hf.use(ours, executor).layers[0]
    with InFloat64():
        exact = run_model(copy.deepcopy(model).double())
    runs = [run_model(copy.deepcopy(model))]
    for seed in range(MOVED):
        moved = copy.deepcopy(model)
        move(experts_of(moved, family), seed)
        runs.append(run_model(moved))
    return Judgement(layer, run_model(ours).errors(exact), _largest(runs, exact), torch.float32)


def _largest(runs: list[Results], exact: Results) -> dict[str, float]:
    errors = [run.errors(exact) for run in runs]
    return {name: max(found[name] for found in errors) for name in errors[0]}


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in a dtype as ``from_pretrained`` loads it: what its class keeps in fp32 stays there."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not any(part in name for part in kept):
            tensor.data = tensor.data.to(dtype)
    return model


@cache
def judge_experts(family: Family, dtype: torch.dtype, executor: str = "native") -> Judgement:
    """The first experts module alone, on what its model gives it in that dtype.

    Raises:
        Unsupported: `executors.hf` refuses the family.
    """
    model = in_dtype(build(family), dtype)
    (module, *_) = experts_of(model, family).values()
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    with module.register_forward_pre_hook(lambda _, given: calls.append(given)), torch.no_grad():
        model(**inputs(model))
    ours = copy.deepcopy(module)
    layer = executors.hf.use(ours, executor).layers[0]
    with InFloat64():
        exact = run_experts(copy.deepcopy(module).double(), calls[0])
    own = _largest([run_experts(copy.deepcopy(module), calls[0])], exact)
    return Judgement(layer, run_experts(ours, calls[0]).errors(exact), own, dtype)
