"""Puts executors into transformers' table of experts functions, and models on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from executors import _registry
from executors._protocol import Executor, UnknownExecutor, Unsupported, check_norm
from executors.hf.module import check_module, find_config, has_norm, is_experts, weights_of
from moe_ref.types import MoEConfig

PREFIX = "moe_"
_made: dict[str, Executor] = {}
OWN_LOOPS = {  # classes that hold experts, which transformers does not dispatch
    "DbrxExperts",
    "DogeCDMoE",
    "JetMoeParallelExperts",
    "Llama4TextExperts",
    "LongcatFlashExperts",
    "NllbMoeExperts",
    "Step3p7Experts",
    "SwitchTransformersExperts",
    "VitPoseNaiveMoe",
    "FP8Experts",
    "Mxfp4GptOssExperts",
    "FbgemmFp8Llama4TextExperts",
    "SequentialLlama4TextExperts",
}


@dataclass(frozen=True)
class SwitchedLayer:
    """An experts module that was switched.

    Attributes:
        name: in the model, such as "model.layers.0.mlp.experts".
        kind: its class.
        config: what it computes; without ``top_k``, which is the router's.
        post_expert_norm: whether it normalises each expert's output, with the configuration's epsilon.
    """

    name: str
    kind: str
    config: MoEConfig
    post_expert_norm: bool = False


@dataclass(frozen=True)
class Switched:
    """What `use` did.

    Attributes:
        executor: that runs the experts now.
        layers: the modules that were switched, in the model's order.
    """

    executor: str
    layers: tuple[SwitchedLayer, ...]

    def __str__(self) -> str:
        kinds = ", ".join(sorted({layer.kind for layer in self.layers}))
        return f"{len(self.layers)} layers of {kinds} run on {self.executor!r}"


def register(*names: str) -> tuple[str, ...]:
    """Lets ``experts_implementation="moe_NAME"`` choose the executor NAME, here and in ``from_pretrained``.

    Args:
        *names: of executors, plug-ins too; all that `executors.names` has by default.

    Returns:
        The names under which transformers has them now, such as "moe_auto".

    Raises:
        UnknownExecutor: no executor has this name.
    """
    known = _registry.names()
    for name in names:
        if name not in known:
            raise UnknownExecutor(f"executor={name!r}: must be one of {', '.join(map(repr, known))}")
    chosen = names or tuple(known)
    for name in chosen:
        _made.pop(name, None)  # a plug-in may be another by now
        ALL_EXPERTS_FUNCTIONS.register(PREFIX + name, _function(name))
    return tuple(PREFIX + name for name in chosen)


def use(model: nn.Module, executor: str = "auto") -> Switched:
    """Runs the experts of a model on an executor, from its next call on.

    Args:
        model: a transformers model, or any module that contains its experts modules.
        executor: a name of `executors.names`.

    Returns:
        What was switched. Everything was, or nothing is and an error is raised.

    Raises:
        TypeError: the model is no torch.nn.Module.
        UnknownExecutor, Unavailable: as `executors.get`.
        Unsupported: there is no experts module that transformers dispatches, no `MoEConfig` says what one computes, or
            one has a norm after each expert, which the executor does not declare.
    """
    check_module("model", model)
    found = {name: module for name, module in model.named_modules() if is_experts(module)}
    others = sorted({type(module).__name__ for module in model.modules()} & OWN_LOOPS)
    if others or not found:
        has = f"has {', '.join(others)}, with a loop of its own" if others else "has no experts"
        raise Unsupported(f"model={type(model).__name__}: {has}: must have experts that transformers dispatches")
    made = _registry.get(executor)
    (implementation,) = register(executor)
    layers = tuple(
        SwitchedLayer(name, type(module).__name__, find_config(module), has_norm(module))
        for name, module in found.items()
    )
    for module in filter(has_norm, found.values()):
        check_norm(made, weights_of(module))
    _made[executor] = made
    for module in (model, *found.values()):  # the model's own is what transformers shows; each layer's is what it asks
        if hasattr(module, "config"):
            module.config._experts_implementation = implementation
    return Switched(executor, layers)


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="executors.hf makes an executor before it is traced: call the model once before that"
)
def _make(name: str) -> Executor:
    """The executor, made at the first call: one that this machine lacks may still be registered."""
    return _made.setdefault(name, _registry.get(name))


@cache
def _function(name: str) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]:
    def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' grouped_mm: in the dtype of the weights, and back in that of the hidden states."""
        weights, executor = weights_of(module), _made.get(name) or _make(name)
        check_norm(executor, weights)
        x = hidden_states.to(weights.gate_up_proj.dtype)
        y = executor.experts(x, topk_ids=top_k_index, topk_weights=top_k_weights, weights=weights)
        return y.to(hidden_states.dtype)

    forward.__name__ = PREFIX + name
    return forward
