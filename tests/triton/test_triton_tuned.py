"""Tiles that ``tune`` stored: the file, what is believed of it, and when it is used."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import executors
from executors._base.arguments import arguments_of
from executors._triton import operator, tuned_file
from executors._triton import tuned as _tuned
from executors._triton.configs import FAMILIES, KernelConfig, Tile
from executors._triton.launch import products as _products
from executors._triton.launch.operands import are_aligned
from executors._triton.layer import Layer
from executors._triton.tuned_file import PRODUCTS, Key, as_entry, parse, read, save
from moe_ref.conformance.judgement.call import Inputs, call
from moe_ref.conformance.judgement.checks import check_problem
from moe_ref.conformance.judgement.faults import same_bits
from triton_cases import ALIGNED, DEVICE, inputs_of

OTHER = Tile(16, 32, 16, 2, 2, 1)  # no family ships it
TILES = KernelConfig(16.0, *[OTHER] * len(PRODUCTS))
SMALL = replace(ALIGNED, tokens=12, hidden=32, intermediate=32)
KEY = Key("GPU 1", "torch 1", "bfloat16", "ieee", 8, 2, 64, 32, "rows, rows", "swiglu concatenated", 0, 4)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """The tiles that products were launched with, from now on."""
    found: list[Tile] = []
    plain = _products.blocks
    monkeypatch.setattr(_products, "blocks", lambda tile: found.append(tile) or plain(tile))
    return found


def layer_of(inputs: Inputs) -> Layer:
    routing = executors.get("triton").route(inputs.router_logits, inputs.weights)
    given = arguments_of(inputs.x, routing.topk_ids, routing.topk_weights, inputs.weights)
    return operator.layer_of(given)


def key_of(inputs: Inputs) -> Key:
    layer = layer_of(inputs)
    return _tuned.key_of(layer, "ieee", are_aligned(layer.up.matrices, layer.down.matrices))


def gradients(executor: executors.Executor, inputs: Inputs) -> list[torch.Tensor]:
    """y and all gradients."""
    y = call(executor, inputs)
    leaves = [leaf for leaf in inputs.tensors().values() if leaf.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, inputs.dy)]


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "tuned.json"
    assert read(path, KEY.versions) == {}
    other = KEY._replace(bucket=-3)
    wide = TILES._replace(down=OTHER._replace(block_n=128))
    for key, config in ((KEY, wide), (other, TILES), (KEY, TILES), (KEY._replace(versions="torch 2"), TILES)):
        assert save(path, key, config, {"ms": 1.5}) is None
    assert read(path, KEY.versions) == {KEY: TILES, other: TILES._replace(rows=2.0**-3)}
    assert len(json.loads(path.read_text())["entries"]) == 3  # the other versions' too
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("what", ["write", "replace"])
def test_file_is_replaced_whole_or_not_at_all(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    save(path, KEY, TILES, {})
    before = path.read_text()

    def half(file: Path, text: str, **_: object) -> None:
        with open(file, "w") as out:
            out.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    def refuses(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", half) if what == "write" else monkeypatch.setattr(os, "replace", refuses)
    with pytest.raises(OSError, match=r"No space|Read-only"):
        save(path, KEY._replace(bucket=5), TILES, {})
    assert path.read_text() == before
    assert os.listdir(tmp_path) == [path.name]


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save(tmp_path / "file" / "tuned.json", KEY, TILES, {})


NOT_SUCH_FILES = {
    "empty": (b"", "Expecting value"),
    "cut": (b'{"schema": 1, "entr', "Unterminated string"),
    "no object": (b"[]", "schema=None: must be 1"),
    "of another schema": (b'{"schema": 2, "entries": []}', "schema=2: must be 1"),
    "true is not 1": (b'{"schema": true, "entries": []}', "schema=True: must be 1"),
    "no list": (b'{"schema": 1, "entries": {}}', "entries is dict: must be a list"),
    "not text": (b"\xff\xfe\x00", "codec can't decode"),
    "too deep": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize(("content", "message"), NOT_SUCH_FILES.values(), ids=NOT_SUCH_FILES)
def test_file_that_is_not_understood_costs_a_warning(stored: Path, content: bytes, message: str) -> None:
    stored.parent.mkdir()
    stored.write_bytes(content)
    with pytest.warns(RuntimeWarning) as said:
        executor = executors.get("triton", tuned=True)
    (warning,) = said
    text = str(warning.message)
    assert text.startswith(f"{stored}: ")
    assert message in text
    assert text.endswith("the shipped tiles are used")
    assert "\n" not in text
    inputs = inputs_of(SMALL)
    assert same_bits(call(executor, inputs), call(executors.get("triton"), inputs))  # and no second warning


def test_file_that_cannot_be_read_costs_a_warning(stored: Path) -> None:
    stored.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="cannot be read: Is a directory; the shipped tiles are used"):
        executors.get("triton", tuned=True)


def test_file_that_is_not_understood_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text('{"schema": 2, "theirs": 1}')
    assert save(path, KEY, TILES, {}) == tmp_path / "tuned.json.old"
    assert (tmp_path / "tuned.json.old").read_text() == '{"schema": 2, "theirs": 1}'
    assert read(path, KEY.versions) == {KEY: TILES}


def changed(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(entry: dict[str, Any]) -> None:
        for name in path[:-1]:
            entry = entry[name]
        if to is KeyError:
            del entry[path[-1]]
        else:
            entry[path[-1]] = to

    return change


BAD = [
    (changed("tiles", "down", "block_n", to=48), "tiles.down.block_n=48: must be a power of two from 16 to 256"),
    (changed("tiles", "down", "block_n", to=8), "tiles.down.block_n=8: must be"),
    (changed("tiles", "down", "block_k", to=2**20), "tiles.down.block_k=1048576: must be"),
    (changed("tiles", "down", "block_k", to=-16), "tiles.down.block_k=-16: must be"),
    (changed("tiles", "down", "block_k", to=0), "tiles.down.block_k=0: must be"),
    (changed("tiles", "down", "block_k", to=True), "tiles.down.block_k=True: must be of type int"),
    (changed("tiles", "down", "block_k", to=32.0), "tiles.down.block_k=32.0: must be of type int"),
    (changed("tiles", "outer", "warps", to=3), "tiles.outer.warps=3: must be a power of two from 1 to 16"),
    (changed("tiles", "outer", "stages", to=0), "tiles.outer.stages=0: must be from 1 to 8"),
    (changed("tiles", "outer", "per_sm", to=-1), "tiles.outer.per_sm=-1: must be from 0 to 8"),
    (changed("tiles", "outer", "more", to=1), "tiles.outer="),
    (changed("tiles", "outer", "warps", to=KeyError), "tiles.outer="),
    (changed("tiles", "outer", to=[1, 2]), "tiles.outer=list"),
    (changed("tiles", "up", "block_n", to=16), "tiles.up.block_n=16: must be a power of two from 32 to 256"),
    (changed("tiles", "down", "block_m", to=32), "must be the same for all"),
    (changed("tiles", "outer", to=KeyError), "tiles="),
    (changed("tiles", to=None), "tiles is NoneType: must be an object"),
    (changed("key", to=KeyError), "key is NoneType: must be an object"),
    (changed("key", "bucket", to=10**9), "key.bucket=1000000000: must be from -64 to 64"),
    (changed("key", "device", to=["a"]), "key.device=['a']: must be of type str"),
    (changed("key", "device", to=KeyError), "key="),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_tiles_that_no_kernel_takes_are_not_believed(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """The entry is left out, and the others count."""
    path, good = tmp_path / "tuned.json", KEY._replace(bucket=1)
    bad = as_entry(KEY, TILES, {})
    change(bad)
    save(path, good, TILES, {})
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"entries": [*content["entries"], bad]}))
    with pytest.warns(RuntimeWarning) as said:
        assert list(read(path, KEY.versions)) == [good]
    assert len(said) == 1
    assert message in str(said[0].message)
    assert str(said[0].message).endswith("left out, 1 of 2 entries")


def test_all_that_ships_would_be_believed() -> None:
    """So a search may start from it; and every field of a tile is checked."""
    assert set(tuned_file.POWERS) | set(tuned_file.COUNTS) == set(Tile._fields)
    for family in FAMILIES.values():
        for config in (*family.narrow, *family.wide, *family.odd):
            assert parse(as_entry(KEY, config, {})) == (KEY, config._replace(rows=16.0))


def test_tiles_of_the_file_are_launched(stored: Path, launched: list[Tile]) -> None:
    """Forward and backward, and the gates hold."""
    save(stored, key_of(inputs_of(ALIGNED)), TILES, {})
    launched.clear()
    check_problem(executors.get("triton", tuned=True), ALIGNED, DEVICE)
    assert set(launched) == {OTHER}


def test_without_the_option_the_file_is_never_read(
    stored: Path, launched: list[Tile], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(SMALL)
    save(stored, key_of(inputs), TILES, {})

    def read(*_: object) -> None:
        raise ValueError("the file was read")

    monkeypatch.setattr(tuned_file, "read", read)
    for options in ({}, {"batch_invariant": True}, {"recompute": True}, {"tuned": False}):
        gradients(executors.get("triton", **options), inputs)
    assert launched
    assert OTHER not in launched
    with pytest.raises(ValueError, match="was read"):
        executors.get("triton", tuned=True)


@pytest.mark.parametrize("field", [field for field in Key._fields if field != "versions"])
def test_entry_of_something_else_is_not_used(stored: Path, field: str, launched: list[Tile]) -> None:
    """Silently."""
    inputs = inputs_of(SMALL)
    key = key_of(inputs)
    value = getattr(key, field)
    save(stored, key._replace(**{field: value + 1 if isinstance(value, int) else f"{value}, another"}), TILES, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = call(executors.get("triton", tuned=True), inputs)
    assert OTHER not in launched
    assert same_bits(y, call(executors.get("triton"), inputs))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("bucket", {"tokens": 40}),
        ("dtype", {"dtype": "float16"}),
        ("hidden", {"hidden": 48}),
        ("intermediate", {"intermediate": 48}),
        ("act", {"config": replace(ALIGNED.config, gate_up_layout="concatenated")}),
        ("act", {"config": replace(ALIGNED.config, activation="geglu", alpha=1.0, limit=None, up_offset=0.0)}),
        ("storage", {"weights_layout": "transposed"}),
        ("rank", {"down_rank": 3}),
    ],
)
def test_key_tells_calls_apart(field: str, change: dict[str, Any]) -> None:
    one, other = key_of(inputs_of(SMALL)), key_of(inputs_of(replace(SMALL, **change)))
    assert [name for name in Key._fields if getattr(one, name) != getattr(other, name)] == [field]


def test_key_has_the_precision_of_products() -> None:
    layer = layer_of(inputs_of(replace(SMALL, dtype="float32")))
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert _tuned.key_of(layer, operator.precision_of(layer), True).precision == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_entries_of_other_versions_cost_a_warning(stored: Path, launched: list[Tile]) -> None:
    inputs = inputs_of(SMALL)
    key = key_of(inputs)
    save(stored, key._replace(versions="torch 1.0"), TILES, {})
    with pytest.warns(RuntimeWarning, match=r"tuned with torch 1\.0, but this is torch .*: the shipped tiles are used"):
        call(executors.get("triton", tuned=True), inputs)
    assert OTHER not in launched
    save(stored, key, TILES, {})
    _tuned.table.cache_clear()
    call(executors.get("triton", tuned=True), inputs)  # those of other versions may stand beside
    assert OTHER in launched


def test_file_is_read_once(stored: Path, launched: list[Tile]) -> None:
    """Else forward and backward could differ."""
    inputs = inputs_of(SMALL)
    executor = executors.get("triton", tuned=True)
    save(stored, key_of(inputs), TILES, {})
    call(executor, inputs)
    assert OTHER not in launched


def test_no_slots(stored: Path) -> None:
    save(stored, key_of(inputs_of(SMALL)), TILES, {})
    inputs = inputs_of(replace(ALIGNED, tokens=0))
    found = gradients(executors.get("triton", tuned=True), inputs)
    assert all(not tensor.any() for tensor in found)


def test_strides_may_change_between_forward_and_backward(stored: Path) -> None:
    """Hooks on saved tensors may hand back the same numbers in another order: with row tiles of another size."""
    inputs = inputs_of(replace(ALIGNED, weights_layout="transposed"))
    key = key_of(inputs)
    assert key.storage == "columns, columns"
    large = OTHER._replace(block_m=64)
    save(stored, key, KernelConfig(16.0, *[large] * len(PRODUCTS)), {})
    save(stored, key._replace(storage="rows, rows"), TILES, {})
    expected = gradients(executors.get("triton"), inputs)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda tensor: tensor):
        found = gradients(executors.get("triton", tuned=True), inputs)
    for own, right in zip(found, expected, strict=True):
        assert (own - right).float().norm() <= 2**-7 * right.float().norm()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tuned": "yes"}, TypeError, "tuned='yes': must be True or False"),
        ({"tuned": 1}, TypeError, "tuned=1: must be True or False"),
        ({"tuned": True, "batch_invariant": True}, ValueError, "tuned=True: must be False with batch_invariant=True"),
    ],
)
def test_option_is_validated(stored: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as refusal:
        executors.get("triton", **options)
    assert "\n" not in str(refusal.value)


def test_bucket_holds_up_to_a_power_of_two() -> None:
    for experts in (1, 5, 8, 96):
        for slots in [*range(1, 200), 2**20, 2**20 + 1, 2**31 - 5000]:
            rows, bucket = Fraction(slots, experts), _tuned.bucket_of(slots, experts)
            assert Fraction(2) ** (bucket - 1) < rows <= Fraction(2) ** bucket
    assert _tuned.bucket_of(16 * 8, 8) == int(math.log2(16))


def test_versions_follow_the_text_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "triton"
    shutil.copytree(Path(_tuned.__file__).parent, package)
    monkeypatch.setattr(_tuned.resources, "files", lambda _: package)
    before = _tuned.versions.__wrapped__()
    assert before == _tuned.versions()
    assert torch.__version__ in before
    (package / "README").write_text("no kernel")
    assert _tuned.versions.__wrapped__() == before
    for name in ("kernels/products.py", "launch/products.py"):
        (package / name).write_text((package / name).read_text() + "\n")
        after = _tuned.versions.__wrapped__()
        assert after != before
        before = after
    shutil.copy(package / "kernels" / "combine.py", package / "kernels" / "new.py")
    assert _tuned.versions.__wrapped__() != before


def test_place_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("", "relative"):  # which the XDG specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        assert _tuned.default_path() == Path.home() / ".cache" / "moe-ref" / "tuned.json"
