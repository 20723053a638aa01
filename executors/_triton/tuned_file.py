"""The file of tuned tiles, in JSON. Writes are atomic, and every entry is validated on reading.

``{"schema": 1, "entries": [{"key": {...}, "tiles": {product: {...}}, "found": {...}}, ...]}``. Entries of other devices
and versions stay in the file and are not used. Reading rejects a tile that no kernel can take: it would crash, or give
wrong results.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from executors._files.text import one_line, parse_json
from executors._files.text import read as read_bytes
from executors._files.whole import cannot_write, locked, write_json
from executors._triton.configs import KernelConfig, Tile

SCHEMA = 1
POWERS = {"block_m": (16, 256), "block_n": (16, 256), "block_k": (16, 256), "warps": (1, 16)}  # of two: least, most
COUNTS = {"stages": (1, 8), "per_sm": (0, 8)}
PRODUCTS = tuple(name for name in KernelConfig._fields if name != "rows")
SHARING = tuple(name for name in PRODUCTS if name != "outer")  # one list of row tiles serves them
GATED_COLUMNS = 32  # of ``up``, at least: half of them are gates


class Key(NamedTuple):
    """What a choice of tiles depends on. It omits biases, limits and scales, which cost next to nothing.

    Attributes:
        device: its name and architecture.
        versions: of torch, Triton and this package, and a digest of the kernels.
        dtype: of x and the projections.
        precision: of products: "ieee" or "tf32".
        experts, top_k, hidden, intermediate: E, K, H, I.
        storage: which inner dimension of each projection is last, or "not aligned".
        act: activation and layout.
        rank: of adapters, rounded up as the kernels take it; 0 without.
        bucket: S / E is at most 2**bucket, and more than half of it.
    """

    device: str
    versions: str
    dtype: str
    precision: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    storage: str
    act: str
    rank: int
    bucket: int


Entries = dict[Key, KernelConfig]


def read(path: Path, versions: str) -> Entries:
    """The entries of a file for these versions. Warns in one line (RuntimeWarning) if anything is wrong with the file.

    Args:
        path: of the file; a missing file has no entries.
        versions: as in `Key`.
    """
    try:
        raw = _load(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        return _warned(path, f"cannot be read: {error.strerror}")
    except ValueError as error:
        return _warned(path, str(error))
    found, faults = {}, []
    for number, entry in enumerate(raw):
        try:
            key, config = parse(entry)
        except ValueError as error:
            faults.append(f"entry {number}: {error}")
            continue
        found[key] = config
    own = {key: config for key, config in found.items() if key.versions == versions}
    if faults:
        _warn(path, f"{faults[0]}; left out, {len(faults)} of {len(raw)} entries")
    elif found and not own:
        _warn(path, f"tuned with {next(iter(found)).versions}, but this is {versions}: the shipped tiles are used")
    return own


def save(path: Path, key: Key, config: KernelConfig, found: dict[str, Any]) -> Path | None:
    """Adds an entry, or replaces the one of that key; all others stay.

    Of several processes that save at once each waits for the others, so that no entry is lost (but on Windows).

    Args:
        path: of the file; folders are made.
        key: of the entry.
        config: the tiles.
        found: whatever else is worth keeping, such as times.

    Returns:
        Where a file that could not be parsed was moved to, or None.

    Raises:
        OSError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            return _add(path, as_entry(key, config, found))
    except OSError as error:
        raise cannot_write(path, error) from error


def _add(path: Path, new: dict[str, Any]) -> Path | None:
    aside, old = None, []
    try:
        old = _load(path)
    except FileNotFoundError:
        pass
    except ValueError:
        aside = path.with_name(f"{path.name}.old")
        os.replace(path, aside)
    others = [entry for entry in old if not (isinstance(entry, dict) and entry.get("key") == new["key"])]
    write_json(path, {"schema": SCHEMA, "entries": [*others, new]})
    return aside


def as_entry(key: Key, config: KernelConfig, found: dict[str, Any]) -> dict[str, Any]:
    """An entry as it stands in the file."""
    tiles = {name: getattr(config, name)._asdict() for name in PRODUCTS}
    return {"key": key._asdict(), "tiles": tiles, "found": found}


def parse(entry: Any) -> tuple[Key, KernelConfig]:
    """The key and the tiles of an entry.

    Raises:
        ValueError: the entry has other fields, or tiles that no kernel takes; in one line.
    """
    key = _fields(_part(entry, "key"), get_type_hints(Key), "key")
    tiles = _part(entry, "tiles")
    if set(tiles) != set(PRODUCTS):
        raise ValueError(f"tiles={sorted(tiles)}: must be {', '.join(PRODUCTS)}")
    found = {name: Tile(**_fields(tiles[name], dict.fromkeys(Tile._fields, int), f"tiles.{name}")) for name in PRODUCTS}
    for name, tile in found.items():
        check_tile(name, tile)
    rows = {name: found[name].block_m for name in SHARING}
    if len(set(rows.values())) > 1:
        raise ValueError(f"block_m={rows}: must be the same for all")
    if not -64 <= key["bucket"] <= 64:
        raise ValueError(f"key.bucket={key['bucket']}: must be from -64 to 64")
    return Key(**key), KernelConfig(2.0 ** key["bucket"], **found)


def check_tile(name: str, tile: Tile) -> None:
    """Raises ValueError for a tile that no kernel takes."""
    for field, (least, most) in POWERS.items():
        size = getattr(tile, field)
        least = GATED_COLUMNS if (name, field) == ("up", "block_n") else least
        if not least <= size <= most or size & (size - 1):
            raise ValueError(f"tiles.{name}.{field}={size}: must be a power of two from {least} to {most}")
    for field, (least, most) in COUNTS.items():
        if not least <= getattr(tile, field) <= most:
            raise ValueError(f"tiles.{name}.{field}={getattr(tile, field)}: must be from {least} to {most}")


def _load(path: Path) -> list[Any]:
    """The entries, not yet validated.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file of tuned tiles; in one line.
    """
    raw = parse_json(read_bytes(path))
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if type(schema) is not int or schema != SCHEMA:
        raise ValueError(f"schema={schema!r}: must be {SCHEMA}")
    if not isinstance(raw.get("entries"), list):
        raise ValueError(f"entries is {type(raw.get('entries')).__name__}: must be a list")
    return raw["entries"]


def _part(entry: Any, name: str) -> dict[str, Any]:
    part = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(part, dict):
        raise ValueError(f"{name} is {type(part).__name__}: must be an object")
    return part


def _fields(values: Any, kinds: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(values, dict) or set(values) != set(kinds):
        named = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{where}={named}: must have {', '.join(kinds)}")
    for name, value in values.items():
        if type(value) is not kinds[name]:
            raise ValueError(f"{where}.{name}={value!r}: must be of type {kinds[name].__name__}")
    return values


def _warned(path: Path, problem: str) -> Entries:
    _warn(path, f"{problem}; the shipped tiles are used")
    return {}


def _warn(path: Path, problem: str) -> None:
    warnings.warn(f"{path}: {one_line(problem)}", RuntimeWarning, stacklevel=2)
