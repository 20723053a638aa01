"""4-bit tensors as entries of a state dict: the keys and bytes that bitsandbytes writes, and reads."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from executors import nf4
from moe_ref import nf4 as specification
from nf4_cases import (
    FORMS,
    NAME,
    OLDER,
    TENSORS,
    State,
    decoded,
    joined,
    older,
    random,
    same,
    same_entries,
    small,
    state_of,
)


@pytest.mark.parametrize(("quant_type", "nested"), FORMS)
def test_entries_are_those_of_bitsandbytes(quant_type: Any, nested: bool) -> None:
    """Byte for byte what the hook of its parametrization writes, whose prefix is the module's path."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    functional = pytest.importorskip("bitsandbytes.functional")
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(random(3, 20, 34, dtype=torch.bfloat16))
    packed, state = functional.quantize_4bit(
        model.experts.gate_up_proj.data, quant_type=quant_type, compress_statistics=nested
    )
    parametrize.replace_parameter_4bit(model.experts, "gate_up_proj", nested, quant_type)
    written = model.state_dict()
    same_entries(nf4.to_state_dict(nf4.from_quant_state(packed, state), NAME), dict(written))
    same_entries(nf4.to_state_dict(nf4.from_state_dict(written, NAME), NAME), dict(written))


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_reads_our_entries(nested: bool) -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    tensor = small(2, 32, 64, nested=nested)
    entries = nf4.to_state_dict(tensor, "w")
    module = nn.Module()
    module.w = nn.Parameter(entries.pop("w"), requires_grad=False)
    parametrize.replace_parameter_4bit_prequantized(module, "w", entries, torch.device("cpu"))
    assert torch.equal(module.w, specification.decode(tensor).bfloat16())


@pytest.mark.parametrize("kind", TENSORS)
def test_round_trip_through_entries(kind: str) -> None:
    tensor = TENSORS[kind]
    found = nf4.from_state_dict(nf4.to_state_dict(tensor, NAME), NAME, transposed=tensor.transposed)
    offset = None if tensor.nested_offset is None else tensor.nested_offset.reshape(())
    same(found, replace(tensor, nested_offset=offset))
    assert found.packed.data_ptr() == tensor.packed.data_ptr()


def test_segments_are_written_plain() -> None:
    stack = joined()
    entries = nf4.to_state_dict(stack, NAME)
    assert f"{NAME}.nested_absmax" not in entries
    assert entries[f"{NAME}.absmax"].dtype == torch.float32
    assert decoded(nf4.from_state_dict(entries, NAME)) == decoded(stack)


def test_the_shape_is_that_of_the_stored_bytes() -> None:
    tensor = small(2, 5, 7).transpose(1, 2)
    entries = nf4.to_state_dict(tensor, NAME)
    text = bytes(entries[f"{NAME}.quant_state.bitsandbytes__nf4"].tolist())
    assert text == b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 5, 7]}'
    assert nf4.from_state_dict(entries, NAME).shape == (2, 5, 7)
    assert nf4.from_state_dict(entries, NAME, transposed=True).shape == (2, 7, 5)


@pytest.mark.parametrize("nested", [False, True])
def test_linear_layers_of_older_checkpoints(nested: bool) -> None:
    experts = [small(4, 32, nested=nested, seed=seed) for seed in range(12)]
    expected = nf4.from_linears([(expert.packed, state_of(expert)) for expert in experts])
    same(nf4.from_state_dict(older(nested=nested), OLDER), expected)
    same(nf4.from_state_dict(older(nested=nested), OLDER, transposed=True), expected.transpose(1, 2))


def test_linear_layers_written_by_bitsandbytes() -> None:
    modules = pytest.importorskip("bitsandbytes.nn")
    functional = pytest.importorskip("bitsandbytes.functional")
    linears = nn.ModuleList(modules.Linear4bit(64, 12, bias=True, quant_type="nf4") for _ in range(2)).to("cpu")
    expected = torch.stack([functional.dequantize_4bit(one.weight, one.weight.quant_state) for one in linears])
    assert torch.equal(specification.decode(nf4.from_state_dict(linears.state_dict(), "{}.weight")), expected)


EXPERTS: dict[str, tuple[str, Callable[[], State]]] = {
    f"'{OLDER.format(4)}' is missing: must be there, as '{OLDER.format(11)}' is": (OLDER, lambda: older(skip=4)),
    f"'{OLDER.format(0)}' is missing": (OLDER, lambda: older(skip=0)),
    "no key matches 'model.experts.down_projs.{}.weight': must have an entry 'model.experts.down_projs.0.weight'": (
        "model.experts.down_projs.{}.weight",
        older,
    ),
    "name='{}.{}': must be text, with {} at most once": ("{}.{}", older),
    f"{OLDER.format(3)} has 63 bytes: must be 64": (
        OLDER,
        lambda: older() | {OLDER.format(3): torch.ones(63, dtype=torch.uint8)},
    ),
    f"{OLDER.format(11)}.shape=(8, 16): must be (4, 32), that of {OLDER.format(0)}": (
        OLDER,
        lambda: older() | nf4.to_state_dict(small(8, 16, nested=True), OLDER.format(11)),
    ),
    f"{OLDER.format(0)}.shape=(5, 7) has 35 numbers: must be a multiple of blocksize=64": (
        OLDER,
        lambda: {k: v for e in (0, 1) for k, v in nf4.to_state_dict(small(5, 7), OLDER.format(e)).items()},
    ),
}


@pytest.mark.parametrize("message", EXPERTS)
def test_experts_of_a_state_dict_that_are_refused(message: str) -> None:
    name, state = EXPERTS[message]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        nf4.from_state_dict(state(), name)
    assert str(caught.value).startswith(message)


def test_a_number_without_a_neighbour_takes_no_time() -> None:
    state = older(2) | nf4.to_state_dict(small(4, 32, nested=True), OLDER.format(10**15))
    with pytest.raises(ValueError, match=r"^'model.experts.gate_up_projs.2.weight' is missing"):
        nf4.from_state_dict(state, OLDER)


def test_a_number_with_a_zero_in_front_is_no_expert() -> None:
    state = older(2) | {OLDER.format("01"): torch.ones(1), OLDER.format(""): torch.ones(1)}
    assert nf4.from_state_dict(state, OLDER).shape == (2, 4, 32)


def test_entries_of_tensors_with_one_table_share_no_memory() -> None:
    """safetensors refuses to save them otherwise."""
    first = small(nested=True)
    second = replace(small(seed=1, nested=True), nested_code=first.nested_code)
    tables = [nf4.to_state_dict(tensor, "w")["w.nested_quant_map"] for tensor in (first, second)]
    assert tables[0].data_ptr() != tables[1].data_ptr()
