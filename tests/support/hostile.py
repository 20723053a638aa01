"""Files that were made to harm a reader: safetensors headers, JSON texts, and indices of shards."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

Header = dict[str, Any]


def parts(content: bytes) -> tuple[Header, bytes]:
    """The header of a safetensors file, and its numbers."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: Header | bytes, data: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def files(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Variants of a good file, by name. Some mean the same; most must be refused."""
    header, data = parts(content)
    text = json.dumps(header).encode()
    yield from {
        "empty": b"",
        "three bytes": b"abc",
        "size of the header 0": joined(b"", data, 0),
        "size of the header 2**64 - 1": joined(text, data, 2**64 - 1),
        "size of the header 2**63": joined(text, data, 2**63),
        "size of the header 99 MB": joined(text, data, 99_000_000),
        "size of the header beyond the file": joined(text, data, len(text) + len(data) + 1),
        "header that is no JSON": joined(b"{" * 64, data),
        "header that is a list": joined(b"[1]", data),
        "header nested 100000 deep": joined(b'{"a":' + b"[" * 100_000, data),
        "header that is not UTF-8": joined(b'{"\xff":1}', data),
        "number that is no JSON": joined(text.replace(b'"shape": [', b'"shape": [NaN, ', 1), data),
        "more numbers than the header has": joined(text, data + b"abc"),
        "numbers missing": joined(text, data[:-1]),
        "a pickle": b"\x80\x02c__builtin__\nexec\n(S'raise SystemExit'\ntR.",
    }.items()
    for name in (each for each in header if each != "__metadata__"):
        yield from _entries(header, data, name)
    for key in header.get("__metadata__", {}):
        yield from _metadata(header, data, key)
    yield "metadata of numbers", joined(header | {"__metadata__": {"format": 1}}, data)
    yield "metadata that is a list", joined(header | {"__metadata__": [1]}, data)
    yield "no metadata", joined({name: entry for name, entry in header.items() if name != "__metadata__"}, data)


def _entries(header: Header, data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    entry = header[name]
    start, end = entry["data_offsets"]
    shape = entry["shape"]
    changes: dict[str, Header] = {
        "beyond the file": {"data_offsets": [start, end + 10**9]},
        "overlapping": {"data_offsets": [max(start - 8, 0), max(end - 8, 0)]},
        "backwards": {"data_offsets": [end, start]},
        "negative offset": {"data_offsets": [-1, end]},
        "negative size": {"shape": [-1, *shape[1:]]},
        "size 2**63": {"shape": [2**63, 0], "data_offsets": [start, start]},
        "sizes that overflow": {"shape": [2**62, 2**62, *shape]},
        "size of a float": {"shape": [1.5]},
        "shape of text": {"shape": "12"},
        "a size of more": {"shape": [*shape[:-1], shape[-1] + 1] if shape else [2]},
        "flat": {"shape": [size_of(shape)]},
        "one dimension more": {"shape": [1, *shape]},
        "10000 dimensions": {"shape": [*shape, *[1] * 10_000]},
        "nothing": {"shape": [0], "data_offsets": [start, start]},
        "unknown dtype": {"dtype": "Q8"},
        "dtype that is a number": {"dtype": 7},
        **{
            f"as {dtype}": {"dtype": dtype}
            for dtype in ("BOOL", "I8", "U16", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4")
        },
        "a field more": {"extra": 1},
    }
    for what, change in changes.items():
        yield f"{name}: {what}", joined(header | {name: entry | change}, data)
    rest = {key: value for key, value in header.items() if key != name}
    yield f"{name}: missing", joined(rest, data)
    for other in (f"{name}\n\x1b[31m", f"../{name}", "", "x" * 100_000, f"{name}.absmax", "\ud83d\ude00"):
        yield f"{name}: named {other[:12]!r}", joined(rest | {other: entry}, data)
    text, own = json.dumps(header).encode(), json.dumps({name: entry}).encode()[1:-1]
    other_entry = json.dumps({name: entry | {"dtype": "I8" if entry["dtype"] == "U8" else "U8"}}).encode()[1:-1]
    yield f"{name}: twice", joined(text[:-1] + b", " + own + b"}", data)
    yield f"{name}: twice, once in another dtype", joined(b"{" + other_entry + b", " + text[1:], data)
    yield f"{name}: dtype twice", joined(text.replace(b'"dtype"', b'"dtype": "U8", "dtype"', 1), data)


def size_of(shape: list[int]) -> int:
    found = 1
    for each in shape:
        found *= each
    return found


def _metadata(header: Header, data: bytes, key: str) -> Iterator[tuple[str, bytes]]:
    own = header["__metadata__"]
    for what, text in TEXTS.items():
        yield f"metadata {key}: {what}", joined(header | {"__metadata__": own | {key: text}}, data)
    yield (
        f"metadata {key}: missing",
        joined(header | {"__metadata__": {k: v for k, v in own.items() if k != key}}, data),
    )
    twice = f'"{key}": "{own[key][:3]}x", '.encode() if own[key][:3].isalnum() else b'"extra": "1", "extra": "2", '
    text = json.dumps(header).encode().replace(b'"__metadata__": {', b'"__metadata__": {' + twice, 1)
    yield f"metadata {key}: twice", joined(text, data)


TEXTS = {
    "empty": "",
    "no JSON": "{",
    "null": "null",
    "a number": "7",
    "a list": "[1]",
    "an object": '{"a": 1}',
    "text": '"x"',
    "NaN": "NaN",
    "an object with NaN": '{"top_k": NaN}',
    "Infinity": '{"top_k": 1, "alpha": Infinity}',
    "a key twice": '{"top_k": 1, "top_k": 2}',
    "nested 100000 deep": "[" * 100_000,
    "objects 100000 deep": '{"a":' * 100_000,
    "5000 digits": "9" * 5000,
    "two lines": '{"a\nb": "c\u2028d"}',
    "half a surrogate": '{"\\ud800": 1}',
}

PATHS = (
    "../model.safetensors",
    "/etc/passwd",
    "a/../model.safetensors",
    "./model.safetensors",
    "..\\model.safetensors",
    "model.bin",
    "",
    ".",
    "..",
    ".safetensors",
    "\0.safetensors",
    "\ud800.safetensors",
    "x" * 5000 + ".safetensors",
    "none\n.safetensors",
    7,
    None,
    ["model.safetensors"],
)


def indices(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Variants of an index of shards, of which every one must be refused or mean the same."""
    index = json.loads(content)
    where = index["weight_map"]
    first = min(where)
    for path in PATHS:
        yield f"file {path!r:.30}", json.dumps(index | {"weight_map": where | {first: path}}).encode()
    for what, other in {
        "no map": None,
        "a list": [1],
        "an empty map": {},
        "a key more": where | {"more\n": where[first]},
        "a key less": {key: value for key, value in where.items() if key != first},
        "another file": where | {first: next((v for v in where.values() if v != where[first]), "none.safetensors")},
    }.items():
        yield f"weight_map: {what}", json.dumps(index | {"weight_map": other}).encode()
    yield "keys twice", content.rstrip()[:-1] + b', "weight_map": ' + json.dumps(where).encode() + b"}"


def texts(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Variants of a JSON object: other texts, and each entry gone or with other values."""
    for what, text in TEXTS.items():
        yield what, text.encode()
    yield "not UTF-8", b'{"a": "\xff"}'
    yield "UTF-16", content.decode().encode("utf-16")
    yield "twice", content + content
    value = json.loads(content)
    for key in value:
        yield f"{key} missing", json.dumps({name: each for name, each in value.items() if name != key}).encode()
        for other in (None, True, -1, 0, 10**30, 0.5, float("nan"), "x", [], [1], {}, {"a": 1}, ["x"]):
            yield f"{key}={other!r:.20}", json.dumps(value | {key: other}).encode()
        own = json.dumps({key: 0}).encode()[1:-1]
        yield f"{key} twice", b"{" + own + b", " + json.dumps(value).encode()[1:]
