"""The order in which the suite's tests run: the cheap ones first, so that a wrong executor fails soon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

SUITE = "moe_ref.conformance.suite"
ORDER = (
    "test_exact_cases",
    "test_ranges",
    "test_bad_input_is_refused_in_one_line",
    "test_undeclared_weights_are_refused",
    "test_second_derivatives",
    "test_pinned_problems",
    "test_every_code",
    "test_matches_specification",
    "test_repeatable",
    "test_batch_invariance",
    "test_past_the_range",
    "test_laws",
    "test_citizen",
)
TINY = 100  # T times H up to which a pinned problem runs first
LARGE, WIDE = 20_000, 1000  # T times H, and H, from which it runs last


def cheap_first(items: list[pytest.Item]) -> None:
    """Sorts the suite's tests among the places that they have; those of one executor stay together."""
    places = [place for place, item in enumerate(items) if is_of_suite(item)]
    executors: dict[str, int] = {}
    for place in places:
        executors.setdefault(_parameter(items[place], "executor_name"), len(executors))
    own = [items[place] for place in places]
    own.sort(key=lambda item: (executors[_parameter(item, "executor_name")], *_rank(item)))
    for place, item in zip(places, own, strict=True):
        items[place] = item


def is_of_suite(item: pytest.Item) -> bool:
    """Whether a test is one of the suite, wherever it was collected."""
    return getattr(getattr(item, "function", None), "__module__", "") == SUITE


def _rank(item: pytest.Item) -> tuple[int, int]:
    """Tiny pinned problems are first, such as those without tokens; large ones are last."""
    name, problem = getattr(item, "originalname", ""), _parameter(item, "problem")
    size = problem.tokens * problem.hidden if problem != "" else TINY + 1
    large = size >= LARGE or (problem != "" and problem.hidden > WIDE)
    return 2 if large else int(size > TINY), ORDER.index(name) if name in ORDER else len(ORDER)


def _parameter(item: pytest.Item, name: str) -> Any:
    """A parameter of a test, or ""."""
    return getattr(getattr(item, "callspec", None), "params", {}).get(name, "")
