"""State dicts that are truncated, mislabelled or foreign: refused by key, whole, and unchanged."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from executors import nf4
from moe_ref import nf4 as specification
from nf4_cases import (
    NAME,
    PLAIN,
    WITH_NESTED,
    State,
    changed_code,
)


def json_entry(**changed: Any) -> Callable[[State], None]:
    """Changes entries of the JSON object; None takes one away."""

    def change(state: State) -> None:
        key = f"{NAME}.quant_state.bitsandbytes__nf4"
        entries = json.loads(bytes(state[key].tolist())) | changed
        text = json.dumps({name: value for name, value in entries.items() if value != "absent"})
        state[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def entry(field: str, make: Callable[[Tensor], Any] | None) -> Callable[[State], None]:
    """Changes one entry; None takes it away."""

    def change(state: State) -> None:
        key = f"{NAME}{field}"
        if make is None:
            del state[key]
        else:
            state[key] = make(state.get(key, torch.ones(1)))

    return change


def relabelled(state: State) -> None:
    state[f"{NAME}.quant_state.bitsandbytes__fp4"] = state.pop(f"{NAME}.quant_state.bitsandbytes__nf4")


def relabelled_throughout(state: State) -> None:
    json_entry(quant_type="fp4")(state)
    relabelled(state)


def twice(state: State) -> None:
    state[f"{NAME}.quant_state.bitsandbytes__fp4"] = state[f"{NAME}.quant_state.bitsandbytes__nf4"]


def text(value: bytes) -> Callable[[Tensor], Tensor]:
    return lambda _: torch.tensor(list(value), dtype=torch.uint8)


KEY, STATE = NAME, f"{NAME}.quant_state.bitsandbytes__nf4"
BOTH = f"{STATE}, {NAME}.quant_state.bitsandbytes__fp4"
BAD: dict[str, tuple[str, Callable[[State], None]]] = {
    "no bytes": (f"'{KEY}' is missing: must be there, with the bytes of the 4-bit tensor", entry("", None)),
    "bytes missing": (
        f"{KEY} has 989 bytes: must be 990, two of the 1980 codes of shape (3, 20, 33) to a byte",
        entry("", lambda v: v[:-1]),
    ),
    "too many bytes": (f"{KEY} has 991 bytes: must be 990", entry("", lambda v: torch.cat([v, v[:1]]))),
    "bytes with holes": (f"{KEY}.stride()=(2, 1): must be contiguous", entry("", lambda v: v.repeat(1, 2)[:, :1])),
    "never quantised": (f"{KEY} has 3960 bytes: must be 990", entry("", lambda v: torch.ones(3, 20, 33).bfloat16())),
    "bytes no tensor": (f"{KEY}=7: must be a torch.Tensor", entry("", lambda v: 7)),
    "no absmax": (f"'{KEY}.absmax' is missing: must be there, as '{STATE}' is", entry(".absmax", None)),
    "absmax short": (f"{KEY}.absmax.shape=(30,): must be (31,)", entry(".absmax", lambda v: v[1:])),
    "absmax in two dimensions": (f"{KEY}.absmax.shape=(31, 1): must be (31,)", entry(".absmax", lambda v: v[:, None])),
    "absmax narrow": (
        f"{KEY}.absmax.dtype=torch.bfloat16: must be torch.uint8",
        entry(".absmax", lambda v: v.bfloat16()),
    ),
    "absmax no tensor": (f"{KEY}.absmax.dtype=list: must be torch.uint8", entry(".absmax", lambda v: [1])),
    "no table": (f"'{KEY}.quant_map' is missing: must be there", entry(".quant_map", None)),
    "another table": (f"{KEY}.quant_map=[-1.0, ", entry(".quant_map", lambda v: changed_code())),
    "a table of fp4": (f"{KEY}.quant_map=[0.0, ", entry(".quant_map", lambda v: torch.tensor(specification.FP4_CODE))),
    "a short table": (f"{KEY}.quant_map.shape=(15,): must be (16,)", entry(".quant_map", lambda v: v[1:])),
    "nf4 under fp4's key": (
        f"{NAME}.quant_state.bitsandbytes__fp4: quant_type='nf4': must be 'fp4'",
        relabelled,
    ),
    "nf4's table under fp4's key": (f"{KEY}.quant_map=[-1.0, ", relabelled_throughout),
    "both kinds": (f"{KEY} has {NAME}.quant_state.bitsandbytes__fp4 and {STATE}: must have one of {BOTH}", twice),
    "no kind": (f"{KEY} is not in 4 bits: must have one of {BOTH}", entry(".quant_state.bitsandbytes__nf4", None)),
    "unknown kind": (
        f"'{KEY}.quant_state.bitsandbytes__int8' is unknown: must be {KEY} or one of its fields absmax, ",
        entry(".quant_state.bitsandbytes__int8", lambda v: v),
    ),
    "unknown field": (f"'{KEY}.SCB' is unknown: must be", entry(".SCB", lambda v: v)),
    "no nested absmax": (f"'{KEY}.nested_absmax' is missing: must be there", entry(".nested_absmax", None)),
    "no nested table": (f"'{KEY}.nested_quant_map' is missing: must be there", entry(".nested_quant_map", None)),
    "nested absmax long": (
        f"{KEY}.nested_absmax.shape=(2,): must be (1,)",
        entry(".nested_absmax", lambda v: v.repeat(2)),
    ),
    "nested absmax infinite": (
        f"{KEY}.nested_absmax has NaN or infinite elements: must be finite",
        entry(".nested_absmax", lambda v: v / 0),
    ),
    "nested table short": (
        f"{KEY}.nested_quant_map.shape=(255,): must be (256,)",
        entry(".nested_quant_map", lambda v: v[1:]),
    ),
    "nested table NaN": (
        f"{KEY}.nested_quant_map has NaN or infinite elements: must be finite",
        entry(".nested_quant_map", lambda v: v * torch.nan),
    ),
    "JSON broken": (
        f'{STATE}=b\'{{"quant_type": "nf4", "b\': must be JSON',
        entry(".quant_state.bitsandbytes__nf4", lambda v: v[:24]),
    ),
    "JSON no text": (
        f"{STATE}=b'\\xff\\xfe': must be JSON",
        entry(".quant_state.bitsandbytes__nf4", text(b"\xff\xfe")),
    ),
    "JSON too deep": (f"{STATE}=b'[[[[", entry(".quant_state.bitsandbytes__nf4", text(b"[" * 100_000))),
    "JSON a list": (f"{STATE}=[]: must be an object of", entry(".quant_state.bitsandbytes__nf4", text(b"[]"))),
    "JSON of numbers": (
        f"{STATE} is torch.float32 (1,): must be uint8 (bytes,), JSON",
        entry(".quant_state.bitsandbytes__nf4", lambda v: torch.ones(1)),
    ),
    "JSON in two dimensions": (
        f"{STATE} is torch.uint8 (",
        entry(".quant_state.bitsandbytes__nf4", lambda v: v[:, None]),
    ),
    "an entry elsewhere": (f"{KEY}.absmax.device=meta: must be cpu", entry(".absmax", lambda v: v.to("meta"))),
    "an entry missing": (f"{STATE}=['dtype', ", json_entry(blocksize="absent")),
    "an entry unknown": (f"{STATE}=['absmax', 'blocksize', ", json_entry(absmax=1)),
    "nested entries missing": (f"{STATE}=['blocksize', ", json_entry(nested_offset="absent")),
    "another quant_type": (f"{STATE}: quant_type='fp4': must be 'nf4'", json_entry(quant_type="fp4")),
    "blocksize unknown": (f"{STATE}: blocksize=48: must be one of (32, 64, ", json_entry(blocksize=48)),
    "blocksize a float": (f"{STATE}: blocksize=64.0: must be one of", json_entry(blocksize=64.0)),
    "another blocksize": (f"{KEY}.nested_absmax", json_entry(blocksize=32, nested_blocksize=1)),
    "dtype unknown": (f"{STATE}: dtype='float64': must be one of", json_entry(dtype="float64")),
    "dtype a list": (f"{STATE}: dtype=[]: must be one of", json_entry(dtype=[])),
    "another shape": (f"{KEY} has 990 bytes: must be 1023, two of the 2046 codes", json_entry(shape=[3, 22, 31])),
    "shape a text": (f"{STATE}: shape='3': must be a list of integers, each at least 0", json_entry(shape="3")),
    "shape null": (f"{STATE}: shape=None: must be a list of integers", json_entry(shape=None)),
    "shape negative": (f"{STATE}: shape=[-3, -20, 33]: must be a list of integers", json_entry(shape=[-3, -20, 33])),
    "shape with truth": (f"{STATE}: shape=[True, 1980]: must be a list of integers", json_entry(shape=[True, 1980])),
    "nested_blocksize 0": (f"{STATE}: nested_blocksize=0: must be an integer", json_entry(nested_blocksize=0)),
    "nested_dtype": (f"{STATE}: nested_dtype='bfloat16': must be 'float32'", json_entry(nested_dtype="bfloat16")),
    "offset NaN": (f"{STATE}: nested_offset=nan: must be a finite number", json_entry(nested_offset=float("nan"))),
    "offset too large": (f"{STATE}: nested_offset=1e+39: must be a finite number", json_entry(nested_offset=1e39)),
    "offset a huge integer": (f"{STATE}: nested_offset=1000000000", json_entry(nested_offset=10**400)),
    "offset nearly too large": (f"{STATE}: nested_offset=3.40282365", json_entry(nested_offset=2.0**128 - 2.0**100)),
    "offset a text": (f"{STATE}: nested_offset='1': must be a finite number", json_entry(nested_offset="1")),
    "offset a truth": (f"{STATE}: nested_offset=True: must be a finite number", json_entry(nested_offset=True)),
}


@pytest.mark.parametrize("what", BAD)
def test_entries_that_are_refused(what: str) -> None:
    """By key; and what was given stays as it is."""
    message, change = BAD[what]
    state = nf4.to_state_dict(WITH_NESTED, NAME)
    change(state)
    before = copy.copy(state)
    with pytest.raises((ValueError, TypeError)) as caught:
        nf4.from_state_dict(state, NAME)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list(state) == list(before)
    assert all(state[key] is before[key] for key in state)


def test_plain_absmax_that_is_refused() -> None:
    state = nf4.to_state_dict(PLAIN, NAME)
    state[f"{NAME}.absmax"] = state[f"{NAME}.absmax"] * torch.inf
    with pytest.raises(ValueError, match=r"^experts.gate_up_proj.absmax has NaN or infinite elements"):
        nf4.from_state_dict(state, NAME)
    state[f"{NAME}.absmax"] = WITH_NESTED.absmax
    with pytest.raises(ValueError, match=r"absmax.dtype=torch.uint8: must be torch.float32$"):
        nf4.from_state_dict(state, NAME)
