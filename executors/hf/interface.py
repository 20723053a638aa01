"""Puts executors into transformers' table of experts functions, and models on them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from executors import _registry
from executors._protocol import Executor, UnknownExecutor, Unsupported, check_norm
from executors.hf.adapters import PREFIX, lora_of
from executors.hf.module import experts_in, find_config, has_norm, weights_of
from executors.hf.parameters import class_name
from moe_ref.types import PROJECTIONS, MoEConfig, MoEWeights, PackedTensor
from moe_ref.validation import dtype_name

_made: dict[str, Executor] = {}


@dataclass(frozen=True)
class SwitchedLayer:
    """An experts module that was switched.

    Attributes:
        name: in the model, such as "model.layers.0.mlp.experts".
        kind: its class.
        config: what it computes; without ``top_k``, which is the router's.
        adapters: its parameters that have adapters of PEFT, which are never formed into W + B A.
        post_expert_norm: whether it normalises each expert's output, with the configuration's epsilon.
    """

    name: str
    kind: str
    config: MoEConfig
    adapters: tuple[str, ...] = ()
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
        adapted = sorted({name for layer in self.layers for name in layer.adapters})
        apart = f", adapters of {' and '.join(adapted)} apart" if adapted else ""
        return f"{len(self.layers)} layers of {kinds} run on {self.executor!r}{apart}"


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

    Adapters that PEFT has put on experts' parameters (``target_parameters``) run separately from then on: the executor
    gets A and B, and nothing forms W + B A.

    Args:
        model: a transformers model, with PEFT's adapters or without, or any module that contains its experts modules.
        executor: a name of `executors.names`.

    Returns:
        What was switched. Everything was, or nothing is and an error is raised.

    Raises:
        TypeError: the model is no torch.nn.Module.
        UnknownExecutor, Unavailable: as `executors.get`.
        Unsupported: there is no experts module that transformers dispatches, no `MoEConfig` says what one computes, or
            one has a norm after each expert, which the executor does not declare, or an adapter does more than add
            ``scaling * B A`` to a projection.
        ValueError: an adapter has ``target_parameters`` that PEFT did not find: experts in 4 bits outside of `peft`.
    """
    found = experts_in(model)
    made = _registry.get(executor)
    (implementation,) = register(executor)
    configs = [find_config(module) for module in found.values()]
    for module in filter(has_norm, found.values()):
        check_norm(made, weights_of(module))
    adapted = separate(model)
    found = experts_in(model)  # by other names where PEFT's wrappers were nested anew
    layers = tuple(
        SwitchedLayer(name, class_name(module), config, adapted.get(module, ()), has_norm(module))
        for (name, module), config in zip(found.items(), configs, strict=True)
    )
    _made[executor] = made
    own: list[Any] = [model, *found.values()]  # the model's is what transformers shows; each layer's is what it asks
    for module in own:
        if hasattr(module, "config"):
            module.config._experts_implementation = implementation
    return Switched(executor, layers)


def separate(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Changes PEFT's wrappers of a model's experts: see `executors.hf.wrappers.separate`. PEFT is not imported here."""
    if "peft" not in sys.modules:
        return {}
    from executors.hf import wrappers

    return wrappers.separate(model)


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="executors.hf makes an executor before it is traced: call the model once before that"
)
def _make(name: str) -> Executor:
    """The executor, made at the first call: one that this machine lacks may still be registered."""
    return _made.setdefault(name, _registry.get(name))


def _check_there(module: nn.Module, weights: MoEWeights) -> None:
    """Refuses projections that are offloaded at the time of the call."""
    for name in PROJECTIONS:
        value = getattr(weights, name)
        if value.device.type == "meta":
            packed = isinstance(value, PackedTensor)
            allowed = "must stay on a device, in 4 bits" if packed else "must be brought by a hook on the module itself"
            raise Unsupported(f"{class_name(module)}: {name} is on the meta device (offloaded?): {allowed}")


@cache
def _function(name: str) -> Callable[..., Tensor]:
    def forward(
        module: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapters: tuple[Any, ...] = (),
    ) -> Tensor:
        """As transformers' grouped_mm: in the dtype of the weights, and back in that of the hidden states.

        The dtype of weights in 4 bits is the one that they decode to.
        """
        weights, executor = weights_of(module), _made.get(name) or _make(name)
        check_norm(executor, weights)
        if adapters:  # PEFT's wrappers that the call passed through
            weights = replace(weights, lora=lora_of(adapters))
        if not hidden_states.is_meta:
            _check_there(module, weights)
        x = hidden_states.to(getattr(torch, dtype_name(weights.gate_up_proj)))
        y = executor.experts(x, topk_ids=top_k_index, topk_weights=top_k_weights, weights=weights)
        return y.to(hidden_states.dtype)

    forward.__name__ = PREFIX + name
    return forward
