"""What becomes of each MoE layer of a model: which executor, with which configuration, or why not."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from executors import _registry
from executors._files.text import one_line
from executors._protocol import Executor, Unavailable, Unsupported, check_norm
from executors.hf.classes import class_of
from executors.hf.module import OWN_LOOPS, is_experts, weights_of
from executors.hf.parameters import class_name
from moe_ref.types import MoEWeights
from moe_ref.validation import dtype_name


@dataclass(frozen=True)
class LayerRow:
    """Layers of one model that fare alike.

    Attributes:
        layers: their names in the model.
        kind: the class of their experts.
        sizes: "E=8 H=64 I=32", or "".
        config: what is not the default of ``MoEConfig``, such as "swiglu limit=7"; or "".
        executor: the name of the one that takes them; or "".
        reason: why none does; or "".
    """

    layers: tuple[str, ...]
    kind: str
    sizes: str
    config: str
    executor: str
    reason: str


def explain_model(model: nn.Module, executor: str = "auto", device: str = "cpu") -> list[LayerRow]:
    """A row for each kind of MoE layer, in the model's order. Nothing is switched.

    Args:
        model: of transformers; a model on the meta device will do.
        executor: a name of `executors.names`; "auto" tells which one it would choose.
        device: where parameters that are on the meta device would be.

    Raises:
        UnknownExecutor, Unavailable: as `executors.get`.
    """
    asked = _registry.get(executor)
    found: dict[tuple[str, ...], list[str]] = {}
    for name, module in model.named_modules():
        if is_experts(module):
            found.setdefault(_fate(module, asked, device), []).append(name)
        elif (kind := class_name(module)) in OWN_LOOPS:
            found.setdefault(
                (kind, "", "", "", "it has a loop of its own, which transformers does not dispatch"), []
            ).append(name)
    return [LayerRow(tuple(names), *fate) for fate, names in found.items()]


def meta_model(name: str, changes: dict[str, Any] | None = None) -> nn.Module:
    """A model without memory.

    Args:
        name: a folder with a config.json, or a model class of transformers, such as "MixtralForCausalLM", which gets
            its default configuration.
        changes: of the configuration, such as {"num_local_experts": 8}; a text configuration within it gets them too.

    Raises:
        ValueError: it is neither, one of ``changes`` is no field, or transformers cannot make the model.
    """
    kind: Any
    if Path(name).is_dir():
        kind, config = class_of(Path(name))
    else:
        kind = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.config_class):
            raise ValueError(f"model={name!r}: must be a folder, or a model class of transformers")
        config = kind.config_class()
    for field, value in (changes or {}).items():
        owners = [own for own in {id(c): c for c in (config, config.get_text_config())}.values() if hasattr(own, field)]
        if not owners:
            raise ValueError(f"model={name}: {field}={value}: must be a field of its configuration")
        for own in owners:
            setattr(own, field, value)
    try:
        with torch.device("meta"):
            return kind(config)
    except (ArithmeticError, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model={name}: transformers cannot make it: {type(error).__name__}: {one_line(error)}"
        ) from error


def _fate(module: Any, executor: Executor, device: str) -> tuple[str, ...]:
    kind = class_name(module)
    try:
        weights = weights_of(module)
    except Unsupported as error:
        return kind, "", "", "", one_line(error)
    sizes = f"E={weights.num_experts} H={weights.hidden_size} I={weights.intermediate_size}"
    gate_up = weights.gate_up_proj
    if str(gate_up.device) == "meta":  # shapes of any size take the memory of one number
        weights = weights.map(lambda stack: torch.empty((), dtype=stack.dtype, device=device).expand(stack.shape))
    x = torch.empty(
        1, weights.hidden_size, dtype=getattr(torch, dtype_name(gate_up)), device=weights.gate_up_proj.device
    )
    try:
        if hasattr(executor, "choose"):
            chosen, _why = executor.choose(x, weights)
        else:
            executor.check(x, weights)
            check_norm(executor, weights)
            chosen = executor.name
    except (Unavailable, Unsupported) as error:
        return kind, sizes, in_short(weights), "", one_line(error)
    return kind, sizes, in_short(weights), chosen, ""


def in_short(weights: MoEWeights) -> str:
    """The activation, and what differs from the defaults of ``MoEConfig``: "swiglu limit=7 clamp=after interleaved"."""
    config = weights.config
    parts: list[str] = [config.activation]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "post_expert_norm_eps":
            parts += [] if weights.post_expert_norm is None else [f"post_expert_norm eps={value:g}"]
        elif field.name not in ("top_k", "activation") and value != field.default:
            shown = value if isinstance(value, str) else f"{value:g}"
            parts.append(shown if field.name == "gate_up_layout" else f"{field.name}={shown}")
    return " ".join(parts)
