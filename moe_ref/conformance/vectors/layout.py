"""Arrays to bytes and back (docs/vectors.md says it to the byte): a header, a table, then the data.

Little endian, aligned to 8 bytes, and made so that a C program reads it in 30 lines. Each content has exactly one
sequence of bytes; whatever differs from it is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from moe_ref.numerics import round_to_nearest

MAGIC = b"MOEREFV1"
HEADER = struct.Struct("<8sQ")  # magic, number of arrays
ENTRY = struct.Struct("<64s2I4Q2Q")  # name, dtype, rank, four dimensions, offset, bytes
ALIGNMENT = 8
RANKS = 4
# By number in the table; what NumPy lacks is kept as its bits.
DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "uint8": np.dtype("u1"),
}
NAMES = tuple(DTYPES)
FLOATS = NAMES[:4]


class BadVectors(ValueError):
    """Files that are not vectors. The message is one line: the file, what is wrong, and what is allowed."""


@dataclass(frozen=True, eq=False)
class Stored:
    """An array as it lies in a file.

    Attributes:
        dtype: its name.
        array: its elements; of "bfloat16" and "float16" the bits, as uint16.
    """

    dtype: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.array.shape

    def tensor(self) -> torch.Tensor:
        """The array as a torch tensor of its own dtype, in memory of its own."""
        own = torch.from_numpy(self.array.astype(np.int16) if self.is_bits else self.array.copy())
        return own.view(getattr(torch, self.dtype)) if self.is_bits else own

    def numbers(self) -> np.ndarray:
        """Floats in float64, which holds them exactly; integers as they are."""
        return self.tensor().double().numpy() if self.dtype in FLOATS else self.array

    @property
    def is_bits(self) -> bool:
        """Whether the elements are the bits of numbers that NumPy does not have everywhere."""
        return self.dtype in ("bfloat16", "float16")


def stored(values: np.ndarray | float | int, dtype: str) -> Stored:
    """Numbers in the form of a file. The dtype must hold them, since answers are computed from the numbers."""
    array = np.asarray(values)
    rounded = round_to_nearest(array.astype(np.float64), dtype) if dtype in FLOATS else array.astype(DTYPES[dtype])
    assert np.array_equal(rounded, array, equal_nan=dtype in FLOATS), f"{dtype} does not hold {array}"
    if dtype in ("bfloat16", "float16"):
        bits = torch.from_numpy(np.array(array, dtype=np.float64)).to(getattr(torch, dtype)).view(torch.int16)
        array = bits.numpy().view(np.uint16)
    return Stored(dtype, np.array(array, dtype=DTYPES[dtype], order="C"))


def stored_text(text: str) -> Stored:
    """A text: its bytes in ASCII."""
    return stored(np.frombuffer(text.encode("ascii"), dtype=np.uint8), "uint8")


def to_bytes(arrays: Mapping[str, Stored]) -> bytes:
    """The file of some arrays, in their order."""
    table, data = [], []
    offset = HEADER.size + ENTRY.size * len(arrays)
    for name, value in arrays.items():
        encoded, raw = name.encode("ascii"), value.array.tobytes()
        assert len(encoded) < 64, name
        assert len(value.shape) <= RANKS, name
        dims = (*value.shape, *(1,) * (RANKS - len(value.shape)))
        table.append(ENTRY.pack(encoded, NAMES.index(value.dtype), len(value.shape), *dims, offset, len(raw)))
        padded = raw + bytes(-len(raw) % ALIGNMENT)
        data.append(padded)
        offset += len(padded)
    return b"".join([HEADER.pack(MAGIC, len(arrays)), *table, *data])


def from_bytes(file: str, data: bytes) -> dict[str, Stored]:
    """The arrays of a file.

    Args:
        file: its name, for messages.
        data: its bytes.

    Raises:
        BadVectors: the bytes are not those that `to_bytes` gives.
    """
    if len(data) < HEADER.size or data[:8] != MAGIC:
        raise BadVectors(f"{file}: begins with {data[:8]!r}: must begin with {MAGIC!r}")
    _, count = HEADER.unpack_from(data)
    first = HEADER.size + ENTRY.size * count
    if first > len(data):
        raise BadVectors(f"{file}: {count} arrays in {len(data)} bytes: must have {first} bytes or more")
    arrays: dict[str, Stored] = {}
    expected = first
    for number in range(count):
        name, value, expected = _array(file, data, number, expected)
        if name in arrays:
            raise BadVectors(f"{file}: array {name} is there twice: must be there once")
        arrays[name] = value
    if expected != len(data):
        raise BadVectors(f"{file}: has {len(data)} bytes: must have {expected}")
    return arrays


def _array(file: str, data: bytes, number: int, expected: int) -> tuple[str, Stored, int]:
    """One array: its name, itself, and where the next one begins."""
    raw, code, rank, *dims, offset, size = ENTRY.unpack_from(data, HEADER.size + ENTRY.size * number)
    text = raw.rstrip(b"\0")
    if not text or not text.isascii() or not all(part.isidentifier() for part in text.decode("ascii").split(".")):
        raise BadVectors(f"{file}: array {number} is named {raw[:40]!r}: must be names with dots between them")
    name = text.decode("ascii")
    if len(text) == len(raw):
        raise BadVectors(f"{file}: array {number} has a name of {len(raw)} bytes: must end with a 0")
    if code >= len(NAMES):
        raise BadVectors(f"{file}: {name}.dtype={code}: must be at most {len(NAMES) - 1}")
    if rank > RANKS or any(n != 1 for n in dims[rank:]):
        raise BadVectors(f"{file}: {name}.rank={rank}, dimensions {dims}: must be at most {RANKS}, and 1 beyond")
    dtype = DTYPES[NAMES[code]]
    if size != prod(dims) * dtype.itemsize:
        raise BadVectors(f"{file}: {name} has {size} bytes: must have {prod(dims) * dtype.itemsize}")
    if offset != expected or offset + size > len(data):
        raise BadVectors(f"{file}: {name} lies at {offset}: must lie at {expected}, within {len(data)} bytes")
    end = offset + size
    after = end + -end % ALIGNMENT
    if any(data[end:after]) or after > len(data):
        raise BadVectors(f"{file}: {name} is followed by other bytes than zeros: must be filled with zeros")
    array = np.frombuffer(data, dtype, prod(dims), offset).reshape(dims[:rank]).copy()
    return name, Stored(NAMES[code], array), after
