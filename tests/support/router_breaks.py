"""Wrong rules: what a table may get wrong about a router. The judge must find each on some case of the router."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from executors.hf import RouterRule

OTHER_SCORING = {"softmax": "sigmoid", "sigmoid": "softmax", "topk_softmax": "softmax"}


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
    if config.num_groups > config.topk_groups:
        yield "groups", other(num_groups=1, topk_groups=1)
        yield "topk_groups", other(topk_groups=config.topk_groups + 1)
        yield "group_score", other(group_score="max" if config.group_score == "top2_sum" else "top2_sum")
    if rule.selection_bias is not None:
        yield "selection_bias", replace(rule, selection_bias=None)
        yield "its sign", replace(rule, selection_bias=-rule.selection_bias)
    if has_block:
        yield "output_scale", replace(rule, output_scale=rule.output_scale * 1.01)


def _other_eps(rule: RouterRule) -> float:
    """A percent more, where a sum of sigmoids comes near it; a softmax's sum does not."""
    eps = rule.config.renormalize_eps
    return eps * 1.01 if eps > 0 and rule.config.scoring == "sigmoid" else eps + 1e-5
