"""What a family of models fixes: the gate, the routing, the order of its stacks, and where its router lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Order = Literal["rows", "columns", "either"]
MISSING = object()


@dataclass(frozen=True)
class Key:
    """An entry of config.json.

    Attributes:
        names: what it may be called; the first that is there counts.
        default: what holds where none is there, as in the family's own class; `MISSING`: it must be there.
    """

    names: tuple[str, ...]
    default: Any = MISSING


def key(*names: str, default: Any = MISSING) -> Key:
    """An entry of config.json, by its names."""
    return Key(names, default)


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        fields: `MoEConfig`'s fields, each a value or a `Key`. ``activation`` is the activation function's name in
            config.json's words ("silu", "gelu_new", ...), of the gate or, without gates, of the experts.
        cases: for an entry of config.json, the values that are understood, and the fields that each of them changes.
            Any other value is refused by name.
        gated: whether the experts have gates.
        stacks: the order of stacks on disk: "rows" [E, 2I, H], "columns" [E, H, 2I], or "either": both are found, and
            the two projections' shapes tell which (2I = H and I = H cannot hold at once).
        interleaved: whether joined gate and up rows alternate: gate 0, up 0, gate 1, ...
        router: names of the router's weight [E, H] after the layer's prefix; the first that is there counts.
        router_bias: names of its bias [E]; empty where the family has none.
        selection_bias: names of the selection bias [E] or [1, E]; empty where the family has none. A name that begins
            with "../" is beside the block.
        router_in_fp32: whether the router's product is in fp32 whatever the model's dtype.
    """

    fields: Mapping[str, Any]
    cases: Mapping[Key, Mapping[Any, Mapping[str, Any]]] = field(default_factory=dict)
    gated: bool = True
    stacks: Order = "rows"
    interleaved: bool = False
    router: tuple[str, ...] = ("gate.weight",)
    router_bias: tuple[str, ...] = ()
    selection_bias: tuple[str, ...] = ()
    router_in_fp32: bool = False


TOP_K = key("num_experts_per_tok")
SILU = {"activation": key("hidden_act", default="silu")}
DEEPSEEK_BIAS = ("gate.e_score_correction_bias",)


def softmax(top_k: Key = TOP_K, **fields: Any) -> dict[str, Any]:
    """Scores over all experts, then the choice; a renormalised sum gets no epsilon."""
    return {"top_k": top_k, "scoring": "softmax", "renormalize_eps": 0.0, **SILU, **fields}


def topk_softmax(top_k: Key = TOP_K, **fields: Any) -> dict[str, Any]:
    """The choice by logits, then a softmax over what is chosen."""
    return {"top_k": top_k, "scoring": "topk_softmax", **SILU, **fields}


def sigmoid(top_k: Key = TOP_K, **fields: Any) -> dict[str, Any]:
    """A score for each expert by itself."""
    return {"top_k": top_k, "scoring": "sigmoid", **SILU, **fields}


def sqrtsoftplus(top_k: Key = TOP_K, **fields: Any) -> dict[str, Any]:
    """As `sigmoid`, with sqrt(softplus(logit)) as the score."""
    return {"top_k": top_k, "scoring": "sqrtsoftplus", **SILU, **fields}


def normalized(default: bool) -> Key:
    """Whether weights are renormalised, where config.json says it."""
    return key("norm_topk_prob", default=default)


def scaled(default: float) -> Key:
    """What the weights are multiplied by."""
    return key("routed_scaling_factor", default=default)


def grouped(groups: int | None, kept: int | None, name: str = "n_group") -> dict[str, Any]:
    """Groups of neighbouring experts, by the sum of their two best."""
    return {
        "num_groups": key(name, "n_group", default=groups),
        "topk_groups": key("topk_group", default=kept),
        "group_score": "top2_sum",
    }


def deepseek_v3(
    norm: bool = True, scaling: float = 2.5, groups: int | None = 8, kept: int | None = 4, **changes: Any
) -> Family:
    """DeepSeek-V3's router, which many have taken over: sigmoid, bias, groups, epsilon 1e-20."""
    fields = sigmoid(renormalize=normalized(norm), routed_scaling_factor=scaled(scaling), **grouped(groups, kept))
    fields |= changes.pop("fields", {})
    cases: dict[Key, dict[Any, dict[str, Any]]] = {
        key("scoring_func", default="sigmoid"): {"sigmoid": {}},
        key("topk_method", default="noaux_tc"): {"noaux_tc": {}},
    }
    cases |= changes.pop("cases", {})
    made: dict[str, Any] = {"selection_bias": DEEPSEEK_BIAS, "router_in_fp32": True, "cases": cases}
    return Family(fields, **{**made, **changes})


def deepseek_v2(groups: int | None, kept: int | None) -> Family:
    """DeepSeek-V2's router: softmax; groups by their best expert, where config.json asks for them."""
    limited = {
        "num_groups": key("n_group", default=groups),
        "topk_groups": key("topk_group", default=kept),
        "group_score": "max",
    }
    cases: dict[Key, dict[Any, dict[str, Any]]] = {
        key("topk_method", default="greedy"): {"greedy": {}, "group_limited_greedy": limited},
        key("scoring_func", default="softmax"): {"softmax": {}},
        key("norm_topk_prob", default=False): {False: {}},
    }
    return Family(softmax(routed_scaling_factor=scaled(1.0)), cases=cases, router_in_fp32=True)


def granite() -> Family:
    """Granite's router, as it is stored and as transformers calls it."""
    return Family(topk_softmax(), router=("router.layer.weight", "router.weight"))


def clamped_silu(limit: float) -> dict[str, Any]:
    """silu(min(g, limit)) * clamp(u, -limit, limit), whatever hidden_act says."""
    return {"activation": "silu", "limit": key("swiglu_limit", default=limit)}


def gpt_oss_gate() -> dict[str, Any]:
    """(clamp(u) + 1) * g * sigmoid(alpha * g), although hidden_act says silu."""
    return {
        "activation": "silu",
        "alpha": key("swiglu_alpha", default=1.702),
        "limit": key("swiglu_limit", default=7.0),
        "up_offset": 1.0,
    }
