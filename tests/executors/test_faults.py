"""Files under faults (docs/reliability.md): each writer and each reader of the lists, with each fault."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import fault_readers
import fault_writers
import hostile
from executors._files import tensors, whole
from executors._files.text import one_line, parse_json
from fault_readers import READERS, Reader, Readings
from fault_writers import WRITERS, Tally, Writer, open_folder

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of PEFT and transformers, for files that are refused
]
NIGHTLY = pytest.mark.nightly
SHARD = "model-00001-of-00003.safetensors"


def named(entry: Any) -> str:
    return str(getattr(entry, "name", entry))


@pytest.mark.parametrize("fault", fault_writers.FAULTS)
@pytest.mark.parametrize("writer", WRITERS, ids=named)
def test_a_fault_leaves_the_old_file_or_the_new_one(writer: Writer, fault: str) -> None:
    tally = Tally()
    fault_writers.inject(writer, fault, 1, tally)
    assert tally.losses == []
    assert tally.injected.total() >= 1


@pytest.mark.parametrize("fault", fault_readers.FAULTS)
@pytest.mark.parametrize("reader", READERS, ids=named)
def test_what_is_damaged_or_hostile_is_refused_in_one_line(reader: Reader, fault: str) -> None:
    found = Readings()
    fault_readers.inject(reader, fault, 2 if reader.slow else 40, found)
    assert found.losses == []
    assert found.injected.total() >= 1
    assert found.refused.total() > found.injected.total() / 3


@NIGHTLY
@pytest.mark.parametrize("fault", fault_writers.FAULTS)
@pytest.mark.parametrize("writer", WRITERS, ids=named)
def test_a_fault_at_many_points(writer: Writer, fault: str) -> None:
    tally = Tally()
    fault_writers.inject(writer, fault, 40, tally)
    assert tally.losses == []


@NIGHTLY
@pytest.mark.parametrize("fault", fault_readers.FAULTS)
@pytest.mark.parametrize("reader", READERS, ids=named)
def test_damage_at_many_points(reader: Reader, fault: str) -> None:
    found = Readings()
    fault_readers.inject(reader, fault, 60 if reader.slow else 4000, found)
    assert found.losses == []


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a machine that stops leaves an empty file under the name."""
    synced, early = set(), []
    fsync, rename = os.fsync, os.replace

    def synced_first(source: Path, target: Path) -> None:
        files = [file for file in Path(source).rglob("*") if file.is_file()] or [Path(source)]
        early.extend(file.name for file in files if file.stat().st_ino not in synced)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino) or fsync(descriptor))
    monkeypatch.setattr(os, "replace", synced_first)
    for number, writer in enumerate(WRITERS):
        writer.write(tmp_path / str(number), 0)
        assert early == [], writer.name


def test_two_threads_write_one_file_whole(tmp_path: Path) -> None:
    """Two temporary files of one process have two names."""
    with whole.replacing(tmp_path / "x") as one, whole.replacing(tmp_path / "x") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "x").read_text() == "one"


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors opens it twice, for the header and for the numbers."""
    path, opens = tmp_path / "x", []
    tensors.write(path, {"a": torch.zeros(3)}, {})

    def slow(name: Path, **given: str) -> Any:
        opens.append(name)
        file = safe_open(name, **given)
        if len(opens) < 3:
            tensors.write(path, {"a": torch.full((3,), float(len(opens)))}, {})
        return file

    monkeypatch.setattr(tensors, "safe_open", slow)
    with tensors.opened(path) as file:
        assert file.tensor("a").tolist() == [2.0] * 3
    assert len(opens) == 3


def test_a_file_that_never_stays_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    tensors.write(path, {"a": torch.zeros(3)}, {})
    monkeypatch.setattr(tensors, "safe_open", lambda name, **_: tensors.write(name, {"a": torch.ones(3)}, {}))
    refused = pytest.raises(ValueError, match=r"x: was replaced while it was opened, 100 times: must stay$")
    with refused, tensors.opened(path):
        pass


def test_a_header_that_safetensors_takes_and_nobody_should(tmp_path: Path) -> None:
    path = tmp_path / "x"
    tensors.write(path, {"a": torch.zeros(3), "b": torch.zeros(8, dtype=torch.uint8)}, {"key": "1"})
    good, tried = path.read_bytes(), 0
    for what, content in hostile.files(good):
        if what.endswith((": twice", "in another dtype", "size 2**63")):
            path.write_bytes(content)
            refused = pytest.raises(
                ValueError, match=rf"^{re.escape(str(path))}: .*(is there twice|must have sizes|must be a safe)"
            )
            with refused, tensors.opened(path, verify=False):
                pass
            tried += 1
    assert tried == 8


def test_a_lock_waits_or_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    refused = pytest.raises(BlockingIOError, match=r"must not be written by another process meanwhile: '.*/x'$")
    with whole.locked(tmp_path / "x"), refused, whole.locked(tmp_path / "x", wait=False):
        pass
    with whole.locked(tmp_path / "x", wait=False):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reader", [reader for reader in READERS if not reader.slow], ids=named)
def test_any_bytes_are_refused_in_one_line(reader: Reader) -> None:
    """Bytes are changed, put in, taken out and doubled, in the file's header above all."""
    with open_folder() as root:
        path = root / "model.bin"
        reader.write(path)
        expected = reader.read(path)

        @settings(max_examples=max(settings().max_examples // 4, 5) if reader.files == ("",) else 10, deadline=None)
        @given(data=st.data())
        def spoiled(data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(reader.files), label="file")
            file = path / name if name else path
            good = file.read_bytes()
            try:
                file.write_bytes(data.draw(fault_readers.edits(good), label="content"))
                found = Readings()
                fault_readers.read_spoiled(reader, path, "fuzzed", "hostile", expected, found)
                assert found.losses == []
            finally:
                file.write_bytes(good)

        spoiled()


def renamed_key(good: bytes) -> bytes:
    return good.replace(b"experts.0.w1", b"experts.0.w1}", 1)


def long_key(good: bytes) -> bytes:
    return good.replace(b'"block_k"', b'"' + b"[" * 3000 + b'"', 1)


MODEL, CHECKPOINT = "executors.hf.load_quantized, of save_quantized", "executors.checkpoint"
FOUND: dict[str, tuple[str, str, Callable[[bytes], bytes]]] = {  # by fuzzing: the reader, the file, what is put in
    "read of 2**63 bytes": (MODEL, SHARD, lambda good: b"\xff" * 8 + good[8:]),
    "memory for 2**40 bytes": (MODEL, SHARD, lambda good: (2**40).to_bytes(8, "little") + good[8:]),
    "embedded null byte": (
        MODEL,
        fault_readers.INDEX,
        lambda good: good.replace(b'"config.json"', b'"config\\u0000json"'),
    ),
    "file of another folder": (
        MODEL,
        fault_readers.INDEX,
        lambda good: good.replace(b'"config.json"', b'"../config.json"'),
    ),
    "half a surrogate": (MODEL, fault_readers.INDEX, lambda good: good.replace(b'"config.json"', b'"\\ud800.json"')),
    "a brace in a key": (CHECKPOINT, fault_readers.INDEX, renamed_key),
    "a message of 3000 characters": ("tuned tiles", "", long_key),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_fuzzing_found(what: str) -> None:
    named, name, change = FOUND[what]
    (reader,) = [each for each in READERS if each.name == named]
    with open_folder() as root:
        reader.write(root / "model.bin")
        file = root / "model.bin" / name if name else root / "model.bin"
        file.write_bytes(change(file.read_bytes()))
        found = Readings()
        fault_readers.read_spoiled(reader, root / "model.bin", what, "hostile", "", found)
        assert (found.refused.total(), found.losses) == (1, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "key 'a' is there twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "key 'a' is there twice"),
        ("[NaN]", "NaN is no number of JSON"),
        ("-Infinity", "-Infinity is no number of JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "4300 digits"),
        (b"\xff", "can't decode byte"),
        (b'{"a\\uD800": 1}', "surrogates not allowed"),
    ],
)
def test_json_means_one_thing(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_one_line_is_one_line() -> None:
    assert one_line("a\n b\x1b[31m\u2028c\x00\ud800") == "a b\\x1b[31m c\\x00\\ud800"
    assert len(one_line("x" * 10**6)) == 1000
    assert torch.equal(torch.tensor(parse_json("[1, 2]")), torch.tensor([1, 2]))
