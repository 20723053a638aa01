"""Files that are not vectors get one clear line; and the suite on a folder, as a user meets it."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref.conformance import plugin
from moe_ref.conformance.vectors.cases import every_case
from moe_ref.conformance.vectors.folder import MANIFEST, write_vectors
from moe_ref.conformance.vectors.layout import (
    DTYPES,
    ENTRY,
    HEADER,
    MAGIC,
    BadVectors,
    Stored,
    from_bytes,
    stored,
    to_bytes,
)
from moe_ref.conformance.vectors.options import CHOICES, config_arrays, config_of
from moe_ref.conformance.vectors.reading import read_folder
from moe_ref.conformance.vectors.vector import KINDS, vector_of
from moe_ref.types import MoEConfig
from plugin_runs import ONE_PERCENT, install, run_pytest

NAMES = (
    "batch",
    "empty-slots",
    "layer-nf4-nested-per-expert",
    "rows-softmax",
    "decode-mxfp4-rows",
    "refused-top-k-zero",
)
SUITE = ("--pyargs", "moe_ref.conformance.vectors_suite")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("read") / "v"
    write_vectors(path, {name: every_case()[name] for name in NAMES})
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """An empty directory to run in."""
    directory = tmp_path / "outside"
    directory.mkdir()
    return directory


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "v"))


def refused(action: Callable[[], Any], *words: str) -> None:
    """One line with these words."""
    with pytest.raises(BadVectors) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert "must" in message
    for word in words:
        assert word in message, message


ENTRY_AT = HEADER.size
SPOILED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "must begin with"),
    "half a header": (lambda data: data[:12], "must begin with"),
    "another magic": (lambda data: b"SAFETENS" + data[8:], "must begin with"),
    "more arrays than bytes": (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], "arrays in"),
    "truncated": (lambda data: data[:-8], "must lie at"),
    "one byte short": (lambda data: data[:-1], "must"),
    "one byte more": (lambda data: data + b"\0", "must have"),
    "a name of nothing": (lambda data: _at(data, 0, bytes(64)), "is named"),
    "a name that breaks lines": (lambda data: _at(data, 0, b"a\nb".ljust(64, b"\0")), "is named"),
    "a name without an end": (lambda data: _at(data, 0, b"a" * 64), "must end with a 0"),
    "an unknown dtype": (lambda data: _at(data, 64, struct.pack("<I", 9)), "dtype=9"),
    "a rank of five": (lambda data: _at(data, 68, struct.pack("<I", 5)), "rank=5"),
    "dimensions whose product is huge": (lambda data: _at(data, 72, struct.pack("<4Q", *[2**63] * 4)), "must"),
    "an offset into the table": (lambda data: _at(data, 104, struct.pack("<Q", 0)), "lies at 0"),
    "bytes of another size": (lambda data: _at(data, 112, struct.pack("<Q", 3)), "has 3 bytes"),
}


def _at(data: bytes, where: int, new: bytes) -> bytes:
    """The file with other bytes in its first entry."""
    return data[: ENTRY_AT + where] + new + data[ENTRY_AT + where + len(new) :]


@pytest.mark.parametrize("what", SPOILED)
def test_a_file_of_another_form_is_refused(written: Path, what: str) -> None:
    spoil, word = SPOILED[what]
    data = (written / "batch.mrv").read_bytes()
    refused(lambda: from_bytes("v/batch.mrv", spoil(data)), "v/batch.mrv", word)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.integers(0, 10**6))
def test_any_byte_may_be_wrong(place: int, value: int, cut: int) -> None:
    """Any change is refused in one line or gives arrays that are written as they were read."""
    data = bytearray(to_bytes({"a.b": stored(np.arange(3.0), "bfloat16"), "c": stored(2**40, "int64")}))
    data[place % len(data)] = value
    for tried in (bytes(data), bytes(data[: cut % len(data)])):
        assert to_bytes(_read(tried)) == tried or "\n" not in _said(tried)


def _read(data: bytes) -> dict[str, Stored]:
    try:
        return from_bytes("x", data)
    except BadVectors:
        return {}


def _said(data: bytes) -> str:
    with pytest.raises(BadVectors) as caught:
        from_bytes("x", data)
    return str(caught.value)


def test_filling_that_is_not_zero_is_refused() -> None:
    data = to_bytes({"a": stored(np.arange(3.0), "bfloat16")})
    assert data.endswith(b"\0\0")
    refused(lambda: from_bytes("x", data[:-1] + b"1"), "a is followed by other bytes")


def test_an_array_that_is_there_twice_is_refused() -> None:
    data = to_bytes({"a": stored(1, "int64"), "b": stored(2, "int64")})
    refused(lambda: from_bytes("x", data.replace(b"b" + bytes(63), b"a" + bytes(63))), "array a is there twice")


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda found: [], "format="),
    "another format": (lambda found: found | {"format": "moe-ref vectors 2"}, "format="),
    "no cases": (lambda found: found | {"cases": None}, "cases"),
    "a number for a case": (lambda found: found | {"cases": [1]}, "cases[0]"),
    "a path for a name": (lambda found: _first(found, name="../../etc/passwd"), "name="),
    "a kind that is none": (lambda found: _first(found, kind="other"), "kind="),
    "a clause that is none": (lambda found: _first(found, clauses=["E1; rm"]), "clauses="),
    "no files": (lambda found: _first(found, files={}), "files"),
    "a case twice": (lambda found: found | {"cases": found["cases"][:1] * 2}, "twice"),
}


def _first(found: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return found | {"cases": [found["cases"][0] | changes, *found["cases"][1:]]}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_of_another_form_is_refused(copied: Path, what: str) -> None:
    change, word = MANIFESTS[what]
    file = copied / MANIFEST
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    refused(lambda: read_folder(copied), str(file), word)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"1" * 5000])
def test_a_manifest_that_is_no_json_is_refused(copied: Path, content: bytes) -> None:
    (copied / MANIFEST).write_bytes(content)
    refused(lambda: read_folder(copied), MANIFEST)


def test_a_file_that_is_not_the_manifests_is_refused(copied: Path) -> None:
    other = (copied / "empty-slots.mrv").read_bytes()
    folder = read_folder(copied)
    (copied / "batch.mrv").write_bytes(other)
    refused(lambda: folder.vector("batch"), "sha256")
    (copied / "batch.mrv").unlink()
    refused(lambda: folder.vector("batch"), "must be a file that exists")
    (copied / "batch.mrv").mkdir()
    refused(lambda: folder.vector("batch"), "batch.mrv")
    refused(lambda: read_folder(copied / "elsewhere"), "must be a file that exists")


WRONG: dict[str, tuple[dict[str, Stored | None], str]] = {
    "an input is missing": ({"in.x": None}, "in.x"),
    "dy of another shape": ({"in.dy": stored(np.zeros((1, 8)), "float32")}, "dy.shape"),
    "ids of another shape": ({"out.topk_ids": stored(np.zeros((9, 3), dtype=np.int64), "int64")}, "topk_ids"),
    "x in whole numbers": ({"in.x": stored(np.zeros((9, 8), dtype=np.int64), "int64")}, "in.x"),
    "projections of another size": ({"in.down_proj": stored(np.zeros((4, 8, 4)), "float32")}, "down_proj.shape"),
    "biases of two dtypes": ({"in.down_proj_bias": stored(np.zeros((4, 8)), "float16")}, "down_proj_bias is float16"),
    "an answer is missing": ({"grad.x": None}, "grad.x"),
    "error bars below 0": ({"out.y.sd": stored(-np.ones((9, 8)), "float64")}, "out.y.sd"),
    "an answer of another shape": ({"grad.down_proj": stored(np.zeros((4, 8)), "float64")}, "grad.down_proj"),
    "a scoring that is none": ({"config.scoring": stored(9, "int64")}, "config.scoring=9"),
    "no experts chosen": ({"config.top_k": stored(0, "int64")}, "config.top_k=0"),
    "a flag of two": ({"config.scale_input": stored(2, "int64")}, "config.scale_input=2"),
    "a limit of nothing": ({"config.limit": stored(-1.0, "float64")}, "config.limit"),
    "strides that are none": ({"call.x_layout": stored(np.frombuffer(b"odd", np.uint8), "uint8")}, "call.x_layout"),
    "a kind that is none": ({"case.kind": stored(np.frombuffer(b"odd", np.uint8), "uint8")}, "case.kind"),
}


@pytest.mark.parametrize("what", WRONG)
def test_arrays_that_do_not_fit_are_refused(written: Path, what: str) -> None:
    changes, word = WRONG[what]
    arrays = read_folder(written).arrays("batch") | changes
    refused(lambda: vector_of("batch.mrv", {n: a for n, a in arrays.items() if a is not None}), "batch.mrv", word)


def test_four_bits_that_do_not_fit_are_refused(written: Path) -> None:
    arrays = read_folder(written).arrays("layer-nf4-nested-per-expert")
    short = arrays | {"in.gate_up_proj.packed": stored(np.zeros(3, np.uint8), "uint8")}
    refused(lambda: vector_of("x", short), "packed.shape")
    other = arrays | {"in.gate_up_proj.quant_type": stored(np.frombuffer(b"int4", np.uint8), "uint8")}
    refused(lambda: vector_of("x", other), "quant_type")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_configurations_come_back(data: st.DataObject) -> None:
    from moe_ref.conformance.problems.strategies import configs

    config = data.draw(configs(8))
    assert config_of("x", config_arrays(config)) == config
    assert config_of("x", config_arrays(MoEConfig(None))) == MoEConfig(None)


def test_the_suite_passes_on_a_folder_and_fails_a_wrong_executor(outside: Path, written: Path) -> None:
    install(outside, "one_percent", "one_percent:one_percent", ONE_PERCENT)
    ran = run_pytest(
        outside, *SUITE, "--vectors", str(written), "--executor", "native", "--executor", "one_percent", "-q"
    )
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    failed = [line for line in ran.stdout.splitlines() if line.startswith("FAILED")]
    assert failed
    assert all("one_percent-" in line for line in failed)
    assert "one_percent_more breaks C1, E1, E2: y" in ran.stdout
    assert "native: no weights in 4 bits" in ran.stdout


def test_a_folder_that_is_none_ends_the_run_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        plugin._folder(str(tmp_path))
    assert str(caught.value) == f"--vectors {tmp_path}: {tmp_path}/manifest.json: must be a file that exists"


def test_a_run_without_a_folder_says_what_is_missing() -> None:
    config = SimpleNamespace(stash=pytest.Stash())
    with pytest.raises(pytest.UsageError, match=r"^--vectors: must be given: a folder that "):
        plugin.pytest_generate_tests(SimpleNamespace(fixturenames=["vectors", "vector"], config=config))  # type: ignore[arg-type]


def test_the_form_is_what_the_page_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "vectors.md").read_text()
    assert f"{ENTRY.size} bytes" in page
    assert MAGIC.decode() in page
    for number, dtype in enumerate(DTYPES):
        assert f"| {number} | {dtype} |" in page
    for field, choices in CHOICES.items():
        assert f"| `{field}` | {', '.join(f'{n} {choice}' for n, choice in enumerate(choices))} |" in page
    for field in fields(MoEConfig):
        assert f"`{field.name}`" in page
    for kind in KINDS:
        assert f"`{kind}`" in page
