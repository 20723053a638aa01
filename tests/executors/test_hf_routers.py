"""Each router of the installed transformers against the rule that executors.hf has for it."""

import numpy as np
import pytest
import transformers

import router_page
from executors.hf import config_of
from executors.hf.router_rules import ZEROED
from executors.hf.router_table import CHECKED, REFUSED, RULES
from moe_ref import route
from router_breaks import breaks
from router_cases import cases
from router_judge import bias_of, fault, is_certain, is_right_choice, logits_of, scale_of
from router_walk import Place, places

SERVED = [place for place in places() if place.router not in REFUSED]


def named(place: Place) -> str:
    return place.router


def test_every_router_is_in_the_table() -> None:
    """A new one must be served, or refused by name."""
    unknown = [f"{place.family}: {place.router}" for place in places() if place.router not in RULES | REFUSED]
    assert not unknown, f"routers of transformers {transformers.__version__} that executors.hf does not know: {unknown}"


@pytest.mark.skipif(transformers.__version__ != CHECKED, reason=f"the table is that of transformers {CHECKED}")
def test_the_table_has_no_others() -> None:
    assert not RULES.keys() & REFUSED.keys()
    assert RULES.keys() | REFUSED.keys() == {place.router for place in places()}


@pytest.mark.parametrize("place", SERVED, ids=named)
def test_a_router_follows_its_rule(place: Place) -> None:
    certain = []
    for case in cases(place):
        rule = config_of(case.block)
        for routed in case.run():
            assert fault(routed, rule) == "", case.name
            certain.append(is_certain(logits_of(routed, rule), rule).mean())
    assert np.mean(certain) > 0.7  # of the tokens, where the rule has a condition


@pytest.mark.parametrize("place", SERVED, ids=named)
def test_a_wrong_rule_is_found(place: Place) -> None:
    """Every number of the rule counts, on some case."""
    applied, found = set(), set()
    for case in cases(place):
        rule = config_of(case.block)
        for routed in case.run():
            for name, wrong in breaks(rule, routed.output is not None):
                applied.add(name)
                if name not in found and fault(routed, wrong):
                    found.add(name)
    assert found == applied


def test_the_route_of_the_specification_is_the_routers() -> None:
    """As docs/routers.md shows it, for usual logits: the same experts, and weights to the last bits."""
    for place in SERVED:
        case = next(cases(place))
        rule = config_of(case.block)
        routed = next(case.run())
        exact = route(logits_of(routed, rule), rule.config, bias_of(rule), expert_scale=scale_of(rule))
        order = np.argsort(routed.ids, axis=1), np.argsort(exact.topk_ids, axis=1)
        ids, right_ids = (np.take_along_axis(a, i, 1) for a, i in zip((routed.ids, exact.topk_ids), order, strict=True))
        assert (ids == right_ids).all(), place.router
        weights, right = routed.weights, exact.topk_weights
        weights, right = (np.take_along_axis(a, i, 1) for a, i in zip((weights, right), order, strict=True))
        assert np.abs(weights / right - 1).max() < 1e-6, place.router


@pytest.mark.parametrize("router", ["AXK2TopkRouter", "DeepseekV2TopkRouter", "Mistral4TopkRouter"])
def test_the_note_is_needed(router: str) -> None:
    """Where keys are not positive, a group masked with 0 is chosen from."""
    (place,) = [place for place in SERVED if place.router == router]
    others = 0
    for case in cases(place):
        rule = config_of(case.block)
        for routed in case.run():
            wrong = ~is_right_choice(routed, rule)
            assert not wrong.any() or ZEROED in rule.note
            others += wrong.sum()
    assert others > 0


@pytest.mark.skipif(transformers.__version__ != CHECKED, reason=f"the page is that of transformers {CHECKED}")
def test_the_page_lists_the_installed_routers() -> None:
    assert router_page.PAGE.read_text() == router_page.page(), "run python tests/support/router_page.py"
