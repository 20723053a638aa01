"""What `Capabilities` refuses: names and numbers that no executor can mean, each in one line with what is allowed."""

from dataclasses import fields
from typing import Any, get_args

import pytest

from executors import Capabilities
from executors._declared import ACTIVATIONS, DTYPES, GATE_UP_LAYOUTS, NUMBERS, SETS, SIZES, WEIGHTS
from moe_ref.conformance.problems import strategies
from moe_ref.types import Activation, GateUpLayout
from moe_ref.validation import FLOAT_DTYPES

FLOATS = "'bfloat16', 'float16', 'float32', 'float64'"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtypes": {"fp32"}}, f"dtypes has 'fp32': must be of {FLOATS}"),
        ({"dtypes": {"float32", "bf16"}}, f"dtypes has 'bf16': must be of {FLOATS}"),
        ({"dtypes": {"x"}}, f"dtypes has 'x': must be of {FLOATS}"),
        ({"bias_dtypes": {"same"}}, f"bias_dtypes has 'same': must be of {FLOATS}, 'x'"),
        ({"topk_ids_dtypes": {"int8"}}, "topk_ids_dtypes has 'int8': must be of 'int32', 'int64'"),
        ({"devices": {"cuda:0"}}, "devices has 'cuda:0': must be types of devices, such as 'cpu' and 'cuda'"),
        ({"blocksizes": {48}}, "blocksizes has 48: must be of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
        ({"alphas": {"1"}}, "alphas has '1': must be finite numbers"),
        ({"limits": {0.0}}, "limits has 0.0: must be finite numbers above 0, or None for none"),
        ({"up_offsets": frozenset()}, "up_offsets={}: must have finite numbers"),
        ({"align_hidden": 0}, "align_hidden=0: must be a whole number of at least 1"),
        ({"activations": frozenset()}, "activations={}: must have at least one of 'geglu', "),
        ({"scorings": frozenset()}, "scorings={}: must have at least one of 'sigmoid', "),
        ({"lora_dtypes": frozenset()}, "lora_dtypes={}: must have at least one of 'bfloat16', "),
        ({"gate_up_layouts": frozenset()}, "gate_up_layouts={}: must have at least one of 'concatenated', "),
        ({"weights": {"nf4"}, "blocksizes": frozenset()}, "blocksizes={}: must have at least one of 32, "),
        ({"weights": {"nf4"}, "dtypes": {"float64"}}, "weights has 'nf4': must stand beside dtypes that 4 bits"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\S.*: must ") as caught:
        Capabilities(**given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", sorted({*SETS, "devices"}))
def test_every_set_of_names_knows_its_own(field: str) -> None:
    for odd in ("Odd one", 7):
        with pytest.raises(ValueError, match=rf"^{field} has {odd!r}: must be "):
            Capabilities(**{field: {odd}})
    for value in (["float32"], "float32", None):
        with pytest.raises(TypeError, match=rf"^{field}=.*: must be a set, as frozenset"):
            Capabilities(**{field: value})


def test_every_field_is_checked() -> None:
    for field in fields(Capabilities):
        if field.name not in {*SETS, *NUMBERS, *SIZES, "devices"}:
            with pytest.raises(TypeError, match=rf"^{field.name}='no': must be True or False$"):
                Capabilities(**{field.name: "no"})


def test_names_are_those_of_the_specification() -> None:
    assert {*get_args(Activation)} == ACTIVATIONS
    assert {*get_args(GateUpLayout)} == GATE_UP_LAYOUTS
    assert {*FLOAT_DTYPES} == DTYPES
    assert {*strategies.WEIGHTS} == WEIGHTS


def test_what_is_not_promised_may_be_empty() -> None:
    none = frozenset[Any]()
    Capabilities(routing=False, scorings=none, renormalize_forms=none, selection_keys=none, router_logits_dtypes=none)
    Capabilities(biases=False, lora=False, bias_dtypes=none, lora_dtypes=none, strided=none, devices=none)
    Capabilities(activations=frozenset({"relu2"}), gate_up_layouts=none, blocksizes=none, nested=none)


def test_a_set_is_kept_as_one_that_can_be_hashed() -> None:
    able = Capabilities(dtypes={"float32"}, limits={None})  # type: ignore[arg-type]
    assert able == Capabilities(dtypes=frozenset({"float32"}), limits=frozenset({None}))
    assert hash(able)
