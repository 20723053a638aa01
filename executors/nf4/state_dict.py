"""Writes and reads 4-bit tensors as entries of a state dict, with bitsandbytes' keys and bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from math import ceil, isfinite, prod
from typing import Any

import torch
from torch import Tensor

from executors._files.text import parse_json
from executors.nf4.codes import CODES, code_table, same_bits
from executors.nf4.convert import bytes_of, check_tensor, join, read_transposed, unnest
from moe_ref.types import NF4Tensor
from moe_ref.validation import DECODED_DTYPES, check_nf4
from moe_ref.validation.nf4 import BLOCKSIZES

STATES = {f"quant_state.bitsandbytes__{quant_type}": quant_type for quant_type in CODES}
PLAIN = ("absmax", "quant_map")
NESTED = ("nested_absmax", "nested_quant_map")
ENTRIES = ("quant_type", "blocksize", "dtype", "shape")  # of the JSON object, in the library's order
NESTED_ENTRIES = ("nested_blocksize", "nested_dtype", "nested_offset")


def to_state_dict(tensor: NF4Tensor, name: str) -> dict[str, Tensor]:
    """Writes a tensor as bitsandbytes does: the entries that its parametrization's hook puts into a state dict.

    The entries are ``name`` [bytes, 1] uint8, ``name.absmax``, ``name.quant_map`` [16], with nested statistics also
    ``name.nested_absmax`` and ``name.nested_quant_map`` [256], and ``name.quant_state.bitsandbytes__nf4`` (or
    ``__fp4``), JSON as bytes: quant_type, blocksize, dtype, shape, and nested_blocksize, nested_dtype, nested_offset.
    Only the tables are copied. Source: bitsandbytes 0.50.2, ``nn/parametrize.py`` and ``QuantState.as_dict``.

    This form has one nested offset and no flag for transposed reading. So the statistics of a tensor with several
    segments are written plain, which is exact (`unnest`), and the shape is the stored shape: to read a transposed
    tensor back, pass ``transposed=True``.

    Raises:
        ValueError, TypeError: one line naming the field, its value, and what is allowed.
    """
    check_tensor("tensor", tensor)
    if tensor.segments != 1:
        tensor = unnest(tensor)
    entries: dict[str, Any] = {
        "quant_type": tensor.quant_type,
        "blocksize": int(tensor.blocksize),
        "dtype": tensor.dtype,
        "shape": tensor.stored_shape,
    }
    found = {
        name: tensor.packed.unsqueeze(1),
        f"{name}.absmax": tensor.absmax,
        f"{name}.quant_map": code_table(tensor.quant_type, tensor.device),
    }
    arrays = tensor.arrays()
    if "nested_absmax" in arrays:
        found[f"{name}.nested_absmax"] = arrays["nested_absmax"]
        found[f"{name}.nested_quant_map"] = arrays["nested_code"].clone()  # tensors in one file may not share memory
        entries |= {"nested_blocksize": int(tensor.nested_blocksize), "nested_dtype": "float32"}
        entries["nested_offset"] = arrays["nested_offset"].item()
    text = json.dumps(entries).encode()
    found[f"{name}.quant_state.bitsandbytes__{tensor.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
    return found


def from_state_dict(state: Mapping[str, Tensor], name: str, *, transposed: bool = False) -> NF4Tensor:
    """Reads a tensor from the entries that bitsandbytes writes, with the same bytes.

    Args:
        state: a state dict; only ``name`` and keys that begin with ``name.`` are read, and nothing is changed.
        name: the name of a stack, such as "experts.gate_up_proj", whose entries are taken without a copy; or of linear
            layers, with "{}" for the expert's number, such as "experts.gate_up_projs.{}.weight". These are counted
            from 0 without a gap and joined as in `from_linears`.
        transposed: whether the stored shape is (E, H, 2I), and the tensor is to be read as (E, 2I, H). A shape does not
            tell.

    Raises:
        ValueError, TypeError: one line naming the key, its value, and what is allowed. Nothing is returned in part.
    """
    experts = fields_by_expert(state, name)
    if "{}" not in name:
        return read_transposed(_read(state, name, experts.get(None, set())), transposed)
    if not experts:
        raise ValueError(f"no key matches {name!r}: must have an entry {name.replace('{}', str(0))!r}")
    keys = [of_expert(name, expert) for expert in range(len(experts))]
    for expert, key in enumerate(keys):
        if expert not in experts:
            last = of_expert(name, max(number for number in experts if number is not None))
            raise ValueError(f"{key!r} is missing: must be there, as {last!r} is: experts are counted from 0")
    tensors = [_read(state, key, experts[expert]) for expert, key in enumerate(keys)]
    return read_transposed(join(tensors, lambda index: keys[index]), transposed)


def of_expert(name: str, expert: int | None) -> str:
    """A name with the expert's number for its "{}". (No format: names in files may have other braces.)"""
    return name if expert is None else name.replace("{}", str(expert))


def fields_by_expert(keys: Iterable[str], name: str) -> dict[int | None, set[str]]:
    """The fields of each expert that ``name`` matches (None if it names a stack); "" is the field of the bytes."""
    if not isinstance(name, str) or name.count("{}") > 1:
        raise ValueError(f"name={name!r:.60}: must be text, with {{}} at most once, for the expert's number")
    pattern = re.escape(name).replace(re.escape("{}"), "(?P<expert>0|[1-9][0-9]*)")
    matcher = re.compile(rf"{pattern}(?:\.(?P<field>.*))?", re.DOTALL)
    found: dict[int | None, set[str]] = {}
    for key in keys:
        if match := matcher.fullmatch(key):
            groups = match.groupdict()
            expert = None if groups.get("expert") is None else int(groups["expert"])
            found.setdefault(expert, set()).add(groups["field"] or "")
    return found


def _read(state: Mapping[str, Tensor], name: str, fields: set[str]) -> NF4Tensor:
    """Reads one tensor, of one segment, in storage order."""
    state_key, quant_type = _check_fields(name, fields)
    entries = _entries(state_key, state[state_key], quant_type, nested=NESTED[0] in fields)
    shape, blocksize = tuple(entries["shape"]), entries["blocksize"]
    size = prod(shape)
    blocks = ceil(size / blocksize)
    packed = bytes_of(name, state[name])
    if packed.shape[0] != ceil(size / 2):
        allowed = f"must be {ceil(size / 2)}, two of the {size} codes of shape {shape} to a byte"
        raise ValueError(f"{name} has {packed.shape[0]} bytes: {allowed}")
    code = _array(state, f"{name}.quant_map", torch.float32, 16)
    if not same_bits(code, code_table(quant_type, code.device)):
        raise ValueError(f"{name}.quant_map={code.tolist()!r:.60}: must be the numbers of {quant_type}, bit for bit")
    nested = {}
    if NESTED[0] in fields:
        nested_blocksize = entries["nested_blocksize"]
        nested = {
            "nested_absmax": _array(state, f"{name}.nested_absmax", torch.float32, ceil(blocks / nested_blocksize)),
            "nested_code": _array(state, f"{name}.nested_quant_map", torch.float32, 256),
            "nested_offset": torch.tensor(entries["nested_offset"], dtype=torch.float32, device=packed.device),
            "nested_blocksize": nested_blocksize,
        }
    absmax = _array(state, f"{name}.absmax", torch.uint8 if nested else torch.float32, blocks)
    form = {"shape": shape, "dtype": entries["dtype"], "quant_type": quant_type, "blocksize": blocksize}
    tensor = NF4Tensor(packed, absmax, **form, **nested)
    check_nf4(name, tensor)
    return tensor


def _check_fields(name: str, fields: set[str]) -> tuple[str, str]:
    """Checks the fields; returns the key of the JSON object and the quant_type in that key."""
    states = sorted(fields & STATES.keys())
    if "" not in fields:
        raise ValueError(f"{name!r} is missing: must be there, with the bytes of the 4-bit tensor")
    if len(states) != 1:
        both = " and ".join(f"{name}.{field}" for field in states)
        found = f"has {both}" if both else "is not in 4 bits"
        raise ValueError(f"{name} {found}: must have one of {', '.join(f'{name}.{field}' for field in STATES)}")
    required = {*PLAIN, *(NESTED if fields & set(NESTED) else ())}
    for field in sorted(required - fields):
        raise ValueError(f"'{name}.{field}' is missing: must be there, as '{name}.{states[0]}' is")
    for field in sorted(fields - required - {"", *states}):
        allowed = ", ".join((*PLAIN, *NESTED, *STATES))
        raise ValueError(f"{f'{name}.{field}'!r} is unknown: must be {name} or one of its fields {allowed}")
    return f"{name}.{states[0]}", STATES[states[0]]


def _array(state: Mapping[str, Tensor], key: str, dtype: torch.dtype, count: int) -> Tensor:
    """[count] Reads one entry as a plain tensor; floats must be finite."""
    value = state[key]
    if not isinstance(value, Tensor) or value.dtype != dtype:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{key}.dtype={found}: must be {dtype}")
    plain = value.detach().as_subclass(Tensor)
    if plain.shape != (count,):
        raise ValueError(f"{key}.shape={tuple(plain.shape)}: must be ({count},)")
    if plain.is_floating_point() and not torch.isfinite(plain).all():
        raise ValueError(f"{key} has NaN or infinite elements: must be finite")
    return plain


def _entries(key: str, value: Any, quant_type: str, *, nested: bool) -> dict[str, Any]:
    """Reads the JSON object and checks every entry."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 1:
        shown = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{key} is {shown}: must be uint8 (bytes,), JSON")
    text = bytes(value.tolist())
    try:
        entries = parse_json(text, finite=False)  # numbers are checked below
    except ValueError:
        raise ValueError(f"{key}={text!r:.60}: must be JSON") from None
    required = (*ENTRIES, *(NESTED_ENTRIES if nested else ()))
    if not isinstance(entries, dict) or set(entries) != set(required):
        found = sorted(entries) if isinstance(entries, dict) else entries
        raise ValueError(f"{key}={found!r:.160}: must be an object of {', '.join(required)}")
    allowed: dict[str, tuple[bool, str]] = {
        "quant_type": (entries["quant_type"] == quant_type, repr(quant_type)),
        "blocksize": (_count(entries["blocksize"]) and entries["blocksize"] in BLOCKSIZES, f"one of {BLOCKSIZES}"),
        "dtype": (entries["dtype"] in DECODED_DTYPES, f"one of {', '.join(DECODED_DTYPES)}"),
        "shape": (
            isinstance(entries["shape"], list) and all(_count(n) for n in entries["shape"]),
            "a list of integers, each at least 0",
        ),
    }
    if nested:
        blocksize, offset = entries["nested_blocksize"], entries["nested_offset"]
        allowed |= {
            "nested_blocksize": (_count(blocksize) and blocksize > 0, "an integer, at least 1"),
            "nested_dtype": (entries["nested_dtype"] == "float32", "'float32'"),
            "nested_offset": (_in_fp32(offset), "a finite number of fp32"),
        }
    for entry, (right, meaning) in allowed.items():
        if not right:
            raise ValueError(f"{key}: {entry}={entries[entry]!r:.60}: must be {meaning}")
    return entries


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _in_fp32(value: Any) -> bool:
    """Whether the value is a number that fp32 rounds to a finite one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2.0**128:
        return False
    return isfinite(torch.tensor(float(value), dtype=torch.float32).item())
