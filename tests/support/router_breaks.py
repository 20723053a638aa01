"""Wrong rules: what a table may get wrong about a router. The judge must find each on some case of the router."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from executors.hf import RouterRule
from moe_ref import MoEConfig

OTHER_SCORING = {"softmax": "sigmoid", "sigmoid": "softmax", "topk_softmax": "softmax", "sqrtsoftplus": "sigmoid"}


def breaks(rule: RouterRule, has_block: bool) -> Iterator[tuple[str, RouterRule]]:
    """Each break by name, without those that change no number."""
    config = rule.config

    def other(**fields: Any) -> RouterRule:
        return replace(rule, config=replace(config, **fields))

    yield "scoring", other(scoring=OTHER_SCORING[config.scoring])
    yield "routed_scaling_factor", other(routed_scaling_factor=config.routed_scaling_factor * (1 + 1e-5))
    if config.scoring != "topk_softmax":  # there the sum is 1 already
        yield "renormalize", other(renormalize=not config.renormalize)
        if config.renormalize:
            yield "renormalize_eps", other(renormalize_eps=_other_eps(rule))
        if _eps_counts(config):
            yield "renormalize_form", other(renormalize_form="max" if config.renormalize_form == "add" else "add")
    if config.num_groups > config.topk_groups:
        yield "groups", other(num_groups=1, topk_groups=1)
        yield "topk_groups", other(topk_groups=config.topk_groups + 1)
        yield "group_score", other(group_score="max" if config.group_score == "top2_sum" else "top2_sum")
    if rule.selection_bias is not None:
        yield "selection_bias", replace(rule, selection_bias=None)
        yield "its sign", replace(rule, selection_bias=-rule.selection_bias)
        yield "selection_key", other(selection_key="logit" if config.selection_key == "score" else "score")
    if rule.expert_scale is not None:
        yield "expert_scale", replace(rule, expert_scale=None)
        yield "its order", replace(rule, expert_scale=rule.expert_scale.flip(0))
    if rule.returns == "probabilities":
        yield "returns", replace(rule, returns="logits")
    if has_block:
        yield "output_scale", replace(rule, output_scale=rule.output_scale * 1.01)


def _other_eps(rule: RouterRule) -> float:
    """A percent more, where a sum comes near it."""
    eps = rule.config.renormalize_eps
    return eps * 1.01 if _eps_counts(rule.config) else eps + 1e-5


def _eps_counts(config: MoEConfig) -> bool:
    """Whether sums come near the epsilon: those of a softmax do only where a case has an epsilon of their size."""
    near = config.scoring in ("sigmoid", "sqrtsoftplus") or config.renormalize_form == "max"
    return near and config.renormalize and config.renormalize_eps > 0
