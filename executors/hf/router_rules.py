"""What the routers of transformers compute.

A rule is a function of the router, and of the block that contains it where there is one (None where the router is given
alone). It reads the module's own attributes. Its docstring is the rule in short, which docs/routers.md shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from executors._protocol import Unsupported
from moe_ref.types import GroupScore, MoEConfig, Scoring

ZEROED = (
    "experts outside the kept groups get the key 0 instead of minus infinity: equal while at least top_k keys in the "
    "kept groups are positive in float32"
)

SCORES: dict[tuple[str, str], Scoring] = {  # by the package and the name of the function's class
    ("torch", "Sigmoid"): "sigmoid",
    ("transformers", "SqrtSoftplusActivation"): "sqrtsoftplus",
}


@dataclass(frozen=True, eq=False)
class RouterRule:
    """How a router chooses and weighs, from the logits or probabilities that it returns.

    Attributes:
        config: the routing fields of `MoEConfig`; the experts' fields have their defaults.
        selection_bias: [E], the module's own tensor or a view of it, in its dtype; None where there is none.
        output_scale: the block multiplies the sum of the routed experts by it, after the router; None where only the
            block knows it and the router was given alone.
        note: under which condition the rule is equal to the router; "" where it always is.
        expert_scale: [E], the module's own tensor, in its dtype, by which the router multiplies the weights of each
            expert (R9); None where there is none.
        returns: what [T, E] the router returns. The logarithms of "probabilities", in float64, serve as logits: they
            differ from the router's logits by a number for each token, which changes neither choice nor weights.
    """

    config: MoEConfig
    selection_bias: Tensor | None = None
    output_scale: float | None = 1.0
    note: str = ""
    expert_scale: Tensor | None = None
    returns: Literal["logits", "probabilities"] = "logits"


Rule = Callable[[Any, Any], RouterRule]


def _config(
    router: Any, scoring: Scoring, renormalize: bool = False, eps: float = 0.0, scale: float = 1.0
) -> MoEConfig:
    return MoEConfig(int(router.top_k), scoring, bool(renormalize), eps, float(scale))


def _groups(router: Any, group_score: GroupScore) -> dict[str, Any]:
    """The fields for groups; none where all experts are one group."""
    if router.num_group in (None, 1):
        return {}
    return {"num_groups": int(router.num_group), "topk_groups": int(router.topk_group), "group_score": group_score}


def _zeroed(config: MoEConfig) -> str:
    return ZEROED if config.topk_groups < config.num_groups else ""


def _of_block(router: Any, block: Any, name: str) -> Tensor:
    """The selection bias that a block passes to its router."""
    if block is None:
        raise Unsupported(
            f"module is a {type(router).__name__}: must be the block that contains it: the selection bias is the "
            f"block's {name}"
        )
    return getattr(block, name)


def softmax(router: Any, block: Any) -> RouterRule:
    """Softmax over all experts."""
    return RouterRule(_config(router, "softmax"))


def softmax_renormalized(router: Any, block: Any) -> RouterRule:
    """Softmax over all experts, divided by the sum of the chosen."""
    return RouterRule(_config(router, "softmax", True))


def softmax_if_asked_renormalized(router: Any, block: Any) -> RouterRule:
    """Softmax over all experts; with norm_topk_prob divided by the sum of the chosen."""
    return RouterRule(_config(router, "softmax", router.norm_topk_prob))


def ernie(router: Any, block: Any) -> RouterRule:
    """Softmax over all experts, chosen with a bias, divided by max(sum, moe_norm_min)."""
    config = replace(_config(router, "softmax", True, float(router.norm_min)), renormalize_form="max")
    return RouterRule(config, router.moe_statics.e_score_correction_bias[0])


def gemma4(router: Any, block: Any) -> RouterRule:
    """Softmax over all experts, divided by the sum of the chosen, times the learned per_expert_scale of each expert.
    (The router returns probabilities: the logits are their logarithms.)
    """
    config = MoEConfig(int(router.config.top_k_experts), "softmax", True, 0.0)
    return RouterRule(config, expert_scale=router.per_expert_scale, returns="probabilities")


def chosen_softmax(router: Any, block: Any) -> RouterRule:
    """Softmax over the chosen experts."""
    return RouterRule(_config(router, "topk_softmax"))


def privacy_filter(router: Any, block: Any) -> RouterRule:
    """Softmax over the chosen experts, divided by top_k; the block multiplies by it again."""
    scale = None if block is None else float(block.num_experts)  # which holds K there
    return RouterRule(_config(router, "topk_softmax", scale=1 / router.top_k), output_scale=scale)


def cohere2(router: Any, block: Any) -> RouterRule:
    """Softmax over the chosen experts; or, with expert_selection_fn "sigmoid", sigmoid, and with norm_topk_prob divided
    by the sum of the chosen.
    """
    name = router.expert_selection_fn
    if name == "softmax":
        return RouterRule(_config(router, "topk_softmax"))
    if name == "sigmoid":
        return RouterRule(_config(router, "sigmoid", router.norm_topk_prob))
    raise Unsupported(f"{type(router).__name__}: expert_selection_fn={name!r}: must be 'softmax' or 'sigmoid'")


def deepseek_v2(router: Any, block: Any) -> RouterRule:
    """Softmax over all experts, times routed_scaling_factor; with topk_method "group_limited_greedy" within the groups
    of the largest scores.
    """
    config = _config(router, "softmax", scale=router.routed_scaling_factor)
    if router.topk_method == "group_limited_greedy":
        config = replace(config, **_groups(router, "max"))
    elif router.topk_method != "greedy":
        raise Unsupported(
            f"{type(router).__name__}: topk_method={router.topk_method!r}: must be 'greedy' or 'group_limited_greedy'"
        )
    return RouterRule(config, note=_zeroed(config))


def mistral4(router: Any, block: Any) -> RouterRule:
    """Softmax over all experts, within the groups of the largest sums of two scores; with norm_topk_prob divided by
    (sum + 1e-20); times routed_scaling_factor.
    """
    return _mistral(router, router.norm_topk_prob)


def mistral_large4(router: Any, block: Any) -> RouterRule:
    """Softmax over all experts, within the groups of the largest sums of two scores; divided by (sum + 1e-20); times
    routed_scaling_factor.
    """
    return _mistral(router, True)


def _mistral(router: Any, renormalize: bool) -> RouterRule:
    config = _config(router, "softmax", renormalize, 1e-20, router.routed_scaling_factor)
    config = replace(config, **_groups(router, "top2_sum"))
    return RouterRule(config, note=_zeroed(config))


def deepseek_v3(router: Any, block: Any) -> RouterRule:
    """Sigmoid, chosen with a bias, within the groups of the largest sums of two keys; with norm_topk_prob divided by
    (sum + 1e-20); times routed_scaling_factor.
    """
    config = _config(router, "sigmoid", router.norm_topk_prob, 1e-20, router.routed_scaling_factor)
    return RouterRule(replace(config, **_groups(router, "top2_sum")), router.e_score_correction_bias)


def axk2(router: Any, block: Any) -> RouterRule:
    """Sigmoid, chosen with a bias, and if n_group is set within the groups of the largest sums of two keys; with
    norm_topk_prob divided by (sum + 1e-20); times routed_scaling_factor.
    """
    found = deepseek_v3(router, block)
    return RouterRule(found.config, found.selection_bias, note=_zeroed(found.config))


def beam(router: Any, block: Any) -> RouterRule:
    """Sigmoid, chosen with a bias, within the groups of the largest sums of two keys; with norm_topk_prob divided by
    (sum + 1e-20); the block multiplies by routed_scaling_factor.
    """
    config = replace(_config(router, "sigmoid", router.norm_topk_prob, 1e-20), **_groups(router, "top2_sum"))
    return RouterRule(config, router.e_score_correction_bias, _scale_of(block))


def _scale_of(block: Any) -> float | None:
    return None if block is None else float(block.routed_scaling_factor)


def afmoe(router: Any, block: Any) -> RouterRule:
    """Sigmoid, chosen with a bias (the block's expert_bias), divided by (sum + 1e-20), times route_scale."""
    bias = _of_block(router, block, "expert_bias")
    return RouterRule(_config(router, "sigmoid", True, 1e-20, router.route_scale), bias)


def hy_v3(router: Any, block: Any) -> RouterRule:
    """Sigmoid, chosen with a bias (the block's), divided by (sum + 1e-20), times router_scaling_factor."""
    bias = _of_block(router, block, "e_score_correction_bias")
    return RouterRule(_config(router, "sigmoid", True, 1e-20, router.router_scaling_factor), bias)


def lfm2(router: Any, block: Any) -> RouterRule:
    """Sigmoid, with use_expert_bias chosen with a bias (the block's expert_bias); with norm_topk_prob divided by
    (sum + 1e-6); times routed_scaling_factor.
    """
    bias = _of_block(router, block, "expert_bias") if router.use_expert_bias else None
    return RouterRule(_config(router, "sigmoid", router.norm_topk_prob, 1e-6, router.routed_scaling_factor), bias)


def minimax_m2(router: Any, block: Any) -> RouterRule:
    """Sigmoid, chosen with a bias (the block's), divided by the sum."""
    bias = _of_block(router, block, "e_score_correction_bias")
    return RouterRule(_config(router, "sigmoid", True), bias)


def minimax_m3(router: Any, block: Any) -> RouterRule:
    """Sigmoid, chosen with a bias, divided by the sum; the block multiplies by its scaling factor. (Laguna returns the
    logits after its soft cap.)
    """
    return RouterRule(_config(router, "sigmoid", True), router.e_score_correction_bias, _scale_of(block))


def llama4(router: Any, block: Any) -> RouterRule:
    """Sigmoid; the weight multiplies the expert's input. (Its scores [T, E] are 0 for what is not chosen.)"""
    return RouterRule(replace(_config(router, "sigmoid"), scale_input=True))


def flint(router: Any, block: Any) -> RouterRule:
    """Sigmoid; with norm_topk_prob divided by the sum."""
    return RouterRule(_config(router, "sigmoid", router.norm_topk_prob))


def muse_spark(router: Any, block: Any) -> RouterRule:
    """Sigmoid, chosen with a bias, divided by (sum + norm_topk_prob_eps), times routed_scaling_factor; the logits are
    returned after output_multiplier.
    """
    config = _config(router, "sigmoid", True, float(router.norm_topk_prob_eps), router.routed_scaling_factor)
    return RouterRule(config, router.e_score_correction_bias)


def kolibri1(router: Any, block: Any) -> RouterRule:
    """Sigmoid, chosen by the logit with a bias; with norm_topk_prob divided by the sum."""
    config = replace(_config(router, "sigmoid", router.norm_topk_prob), selection_key="logit")
    return RouterRule(config, router.e_score_correction_bias)


def inkling2(router: Any, block: Any) -> RouterRule:
    """Sigmoid or sqrt(softplus(logit)) (scoring_func), chosen with a bias, divided by (sum + 1e-20), times
    routed_scaling_factor.
    """
    kind = type(router.score_fn)
    scoring = SCORES.get((kind.__module__.split(".")[0], kind.__name__))
    if scoring is None:
        raise Unsupported(
            f"{type(router).__name__}: scoring_func is a {kind.__name__}: must be 'sigmoid' or 'sqrtsoftplus': no "
            "MoEConfig.scoring is another function"
        )
    config = _config(router, scoring, True, 1e-20, router.routed_scaling_factor)
    return RouterRule(config, router.e_score_correction_bias)
