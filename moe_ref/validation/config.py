"""Checks a configuration. An error is one line: field, value, what is allowed."""

from __future__ import annotations

from typing import get_args

from moe_ref.types import (
    GATED,
    Activation,
    Clamp,
    GateUpLayout,
    GroupScore,
    MoEConfig,
    RenormalizeForm,
    Scoring,
    SelectionKey,
)
from moe_ref.validation.arrays import check_bool, check_choice, check_finite, check_integer, short

SOFTCAPS = ("gate_softcap", "up_softcap")
SMALLEST_EPS = 2.0**-126  # the smallest normal number of fp32


def check_config(config: MoEConfig, num_experts: int | None = None) -> None:
    """Checks a configuration by itself and, where E is known, its `check_sizes`.

    Raises:
        ValueError, TypeError: one line naming the field, its value, and what is allowed.
    """
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config={short(config)}: must be a moe_ref.MoEConfig")
    top_k = config.top_k
    if top_k is not None:
        check_integer("top_k", top_k)
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
    check_choice("scoring", config.scoring, get_args(Scoring))
    check_choice("renormalize_form", config.renormalize_form, get_args(RenormalizeForm))
    check_choice("group_score", config.group_score, get_args(GroupScore))
    check_choice("selection_key", config.selection_key, get_args(SelectionKey))
    check_choice("activation", config.activation, get_args(Activation))
    check_choice("gate_up_layout", config.gate_up_layout, get_args(GateUpLayout))
    for name in ("renormalize", "scale_input"):
        check_bool(name, getattr(config, name))
    for name in ("renormalize_eps", "routed_scaling_factor", "alpha", "up_offset", "post_expert_norm_eps"):
        check_finite(name, getattr(config, name))
    if config.renormalize_eps < 0:
        raise ValueError(f"renormalize_eps={config.renormalize_eps}: must be at least 0")
    if config.post_expert_norm_eps < SMALLEST_EPS:
        raise ValueError(
            f"post_expert_norm_eps={config.post_expert_norm_eps}: must be at least {SMALLEST_EPS:.2g}, so that an "
            "output of zeros has a norm in fp32"
        )
    if config.limit is not None:
        check_finite("limit", config.limit)
        if config.limit <= 0:
            raise ValueError(f"limit={config.limit}: must be positive, or None for no clamp")
    _check_activation(config)
    for name in ("num_groups", "topk_groups"):
        check_integer(name, getattr(config, name))
    if config.num_groups < 1:
        raise ValueError(f"num_groups={config.num_groups}: must be at least 1")
    if not 1 <= config.topk_groups <= config.num_groups:
        allowed = f"must be at least 1 and at most {config.num_groups} (num_groups)"
        raise ValueError(f"topk_groups={config.topk_groups}: {allowed}")
    if num_experts is not None:
        check_sizes(config, num_experts)


def _check_activation(config: MoEConfig) -> None:
    """Only swiglu has the fields of its forms, and clamps or caps; only gated activations have a layout."""
    check_choice("clamp", config.clamp, get_args(Clamp))
    for name in SOFTCAPS:
        cap = getattr(config, name)
        if cap is not None:
            check_finite(name, cap)
            if cap <= 0:
                raise ValueError(f"{name}={cap}: must be positive, or None for no cap")
    if config.activation != "swiglu":
        for name, plain in (("alpha", 1.0), ("limit", None), ("up_offset", 0.0), *dict.fromkeys(SOFTCAPS).items()):
            if getattr(config, name) != plain:
                only = f"must be {plain} for activation={config.activation!r} (others are for 'swiglu' only)"
                raise ValueError(f"{name}={getattr(config, name)}: {only}")
    if config.limit is None and config.clamp != "before":
        raise ValueError(f"clamp={config.clamp!r}: must be 'before' with limit=None, which clamps nothing")
    for name in SOFTCAPS:
        if config.limit is not None and getattr(config, name) is not None:
            raise ValueError(f"{name}={getattr(config, name)}: must be None with limit={config.limit}, which clamps")
    if config.activation not in GATED and config.gate_up_layout != "concatenated":
        only = f"must be 'concatenated' for activation={config.activation!r}, which is not gated"
        raise ValueError(f"gate_up_layout={config.gate_up_layout!r}: {only}")


def check_sizes(config: MoEConfig, num_experts: int) -> None:
    """Checks K and the groups of a configuration, right by itself, against the E experts to choose from (R8).

    Raises:
        ValueError: one line naming the field, its value, and what is allowed.
    """
    groups, kept, top_k = config.num_groups, config.topk_groups, config.top_k
    if top_k is not None and top_k > num_experts:
        raise ValueError(f"top_k={top_k}: must be at least 1 and at most {num_experts} (E)")
    if groups == 1:
        return
    if num_experts % groups:
        raise ValueError(f"num_groups={groups}: must be a divisor of {num_experts} (E)")
    size = num_experts // groups
    if config.group_score == "top2_sum" and size < 2:
        raise ValueError(f"group_score='top2_sum': must be 'max' for groups of one expert (E / num_groups = {size})")
    if top_k is not None and top_k > kept * size:
        raise ValueError(f"top_k={top_k}: must be at most {kept * size} (topk_groups * E / num_groups)")
