"""The tables of fields in docs/spec.md are those of the dataclasses, and their bounds are those of the checks (R8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import spec_tables
from moe_ref.types import MoEConfig
from moe_ref.validation import check_config
from spec_tables import CONFIG, Bound

E = 4


def test_the_tables_are_up_to_date() -> None:
    text = spec_tables.PAGE.read_text()
    assert text == spec_tables.with_tables(text), "run python tests/support/spec_tables.py"


@pytest.mark.parametrize("name", list(CONFIG))
def test_bounds_are_those_that_are_checked(name: str) -> None:
    """R8: on both sides of each."""
    _, bound = CONFIG[name]
    assert bound.refused
    plain = MoEConfig(1, **bound.beside)
    for value in bound.allowed:
        check_config(with_field(plain, name, value), E)
    for value in bound.refused:
        with pytest.raises((ValueError, TypeError), match=name):
            check_config(with_field(plain, name, value), E)
    for others, value in bound.refused_beside:
        with pytest.raises(ValueError, match=name):
            check_config(with_field(replace(plain, **others), name, value), E)


@pytest.mark.parametrize("name", [name for name, (_, bound) in CONFIG.items() if bound == Bound(refused=bound.refused)])
def test_every_name_on_the_page_is_allowed(name: str) -> None:
    for word in spec_tables.bound_text(name).split(", "):
        check_config(with_field(MoEConfig(1), name, {"True": True, "False": False}.get(word, word.strip('"'))), E)


def with_field(config: MoEConfig, name: str, value: Any) -> MoEConfig:
    return replace(config, **{name: value})
