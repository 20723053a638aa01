"""All that reads files, and what each fault does to it. A new reader belongs into `READERS`; the faults are given."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import checkpoint_cases
import executors
import fault_writers
import hostile
from executors import checkpoint, hf
from executors._triton import tuned_file
from executors.checkpoint.extraction import given
from executors.layer_file import load_layer
from fault_writers import KEY, read_nf4, read_state, write_layer, write_model, write_nf4, write_state, write_tuned
from moe_ref.conformance.reporting.applicable import Lack
from moe_ref.conformance.reporting.expected import FORMAT, read_expected
from moe_ref.conformance.reporting.ledger import CLAUSES
from moe_ref.conformance.reporting.results import (
    ClauseResult,
    ExecutorResults,
    FailureKind,
    Results,
    read_results,
    write_results,
)
from moe_ref.conformance.vectors.cases import every_case
from moe_ref.conformance.vectors.folder import MANIFEST, write_vectors
from moe_ref.conformance.vectors.reading import read_folder

INDEX = "model.safetensors.index.json"
VECTOR = "decode-one-row"  # a small case


@dataclass(frozen=True)
class Reader:
    """Something that reads a file, or files of a folder.

    Attributes:
        name: as a user calls it.
        modules: which open files.
        write: makes a good file or folder.
        files: of the folder, each of which is spoiled in turn; "" is the file itself.
        read: a digest of all that it means.
        own: whether checksums find every bit; else a bit in the numbers means other numbers.
        slow: fewer points in every run.
    """

    name: str
    modules: tuple[str, ...]
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    files: tuple[str, ...] = ("",)
    own: bool = False
    slow: bool = False


def digest(value: Any) -> str:
    """Of tensors, at any depth."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(plain).hexdigest()}"
    if hasattr(value, "arrays"):
        return f"{value!r} {[digest(array) for array in value.arrays().values()]}"
    if isinstance(value, dict):
        return str({key: digest(each) for key, each in sorted(value.items())})
    return repr(value)


def of_weights(weights: Any) -> str:
    return digest(weights.parameters() | weights.packed() | {"config": weights.config, "b": weights.selection_bias})


def read_layer(path: Path) -> str:
    layer = load_layer(path)
    return f"{digest(layer.x)} {digest(layer.router_logits)} {of_weights(layer.weights)} {layer.source}"


def write_foreign_layer(path: Path) -> None:
    """As an earlier version wrote it, or somebody else: without checksums."""
    write_layer(path, 0)
    header, data = hostile.parts(path.read_bytes())
    del header["__metadata__"]["checksums"]
    path.write_bytes(hostile.joined(header, data))


def write_checkpoint(path: Path) -> None:
    """Two shards and their index."""
    state = checkpoint_cases.mixtral(rows=32)
    checkpoint_cases.folder(path, dict(list(state.items())[:6]), checkpoint_cases.MIXTRAL, "model-1.safetensors")
    checkpoint_cases.folder(path, dict(list(state.items())[6:]), checkpoint_cases.MIXTRAL, "model-2.safetensors")
    where = {key: f"model-{1 if number < 6 else 2}.safetensors" for number, key in enumerate(state)}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def read_checkpoint(path: Path) -> str:
    opened = checkpoint.open(path)
    router = opened.router(opened.layers[0])
    return f"{of_weights(opened.weights(opened.layers[0]))} {digest(router.weight)} {router.in_fp32}"


def write_hidden(path: Path) -> None:
    checkpoint_cases.save_file({"x": torch.ones(3, 8)}, path)


def read_tuned(path: Path) -> str:
    """It warns where others raise."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = tuned_file.read(path, KEY.versions)
    if said:
        raise ValueError(str(said[0].message))
    return str(found)


def write_two_tuned(path: Path) -> None:
    write_tuned(path, 0)
    write_tuned(path, 1)


def read_model(path: Path) -> str:
    model = hf.load_quantized(path)
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    return f"{digest(dict(model.state_dict()))} {config}"


def read_foreign_model(path: Path) -> str:
    return digest(dict(hf.load_quantized(path, "nf4").state_dict()))


def write_foreign_model(path: Path) -> None:
    torch.manual_seed(0)
    fault_writers.families.build(fault_writers.families.named("mixtral")).save_pretrained(path)


def write_one_vector(path: Path) -> None:
    write_vectors(path, {VECTOR: every_case()[VECTOR]})


def read_one_vector(path: Path) -> str:
    arrays = read_folder(path).arrays(VECTOR)
    return hashlib.sha256(b"".join(arrays[name].array.tobytes() for name in sorted(arrays))).hexdigest()


def write_expected(path: Path) -> None:
    known = {"clause": "C1", "tensor": "y", "dtype": "bfloat16", "reason": "adds slots in bf16"}
    path.write_text(json.dumps({"format": FORMAT, "executors": {"mine": [known]}}))


def write_some_results(path: Path) -> None:
    kind = FailureKind(("C1",), 2, "y(0, 0)=256.0, but must be exactly 258.0", again="check_exact(get('mine'))")
    clauses = {clause: ClauseResult("holds", 3) for clause in CLAUSES} | {"C1": ClauseResult("fails", 1, 2)}
    lacking = Lack("batch invariance is not declared; clause C2 is not applicable", ("C2",))
    write_results(path, Results({"mine": ExecutorResults(clauses, (kind,), lacks=(lacking,))}, "cpu", "quick"))


READERS = (
    Reader(
        "executors.nf4.load",
        ("executors/nf4/file.py", "executors/nf4/state_dict.py"),
        lambda path: write_nf4(path, 0),
        read_nf4,
        own=True,
    ),
    Reader(
        "executors.layer_file.load_layer",
        ("executors/layer_file.py",),
        lambda path: write_layer(path, 0),
        read_layer,
        own=True,
    ),
    Reader(
        "the same, a file without checksums",
        ("executors/layer_file.py", "executors/_bench/routing.py", "examples/tiny/checkpoint.py"),
        write_foreign_layer,
        read_layer,
    ),
    Reader(
        "executors.hf.load_quantized, of save_quantized",
        (
            "executors/hf/load.py",
            "executors/hf/load_own.py",
            "executors/hf/classes.py",
            "executors/hf/folder_checksums.py",
            "executors/hf/save.py",
        ),
        lambda path: write_model(path, 0),
        read_model,
        ("model-00001-of-00003.safetensors", INDEX, "config.json", "generation_config.json"),
        own=True,
        slow=True,
    ),
    Reader(
        "executors.hf.load_quantized, of others",
        ("executors/hf/load_checkpoint.py",),
        write_foreign_model,
        read_foreign_model,
        ("model.safetensors", "config.json", "generation_config.json"),
        slow=True,
    ),
    Reader(
        "executors.checkpoint",
        ("executors/checkpoint/shards.py", "executors/checkpoint/reader.py"),
        write_checkpoint,
        read_checkpoint,
        ("model-1.safetensors", INDEX, "config.json"),
    ),
    Reader(
        "hidden states for extract",
        ("executors/checkpoint/extraction.py",),
        write_hidden,
        lambda path: digest(given(path, torch.float32)),
    ),
    Reader(
        "expected failures of the suite",
        ("moe_ref/conformance/reporting/form.py",),
        write_expected,
        lambda path: str(read_expected(path)),
    ),
    Reader(
        "results of the suite",
        ("moe_ref/conformance/reporting/form.py",),
        write_some_results,
        lambda path: str(read_results(path)),
    ),
    Reader(
        "vectors",
        ("moe_ref/conformance/vectors/reading.py",),
        write_one_vector,
        read_one_vector,
        (MANIFEST, f"{VECTOR}.mrv"),
        own=True,
    ),
    Reader("tuned tiles", ("executors/_triton/tuned_file.py",), write_two_tuned, read_tuned),
    Reader(
        "state of the fine-tune (examples/qlora)",
        ("examples/qlora/state.py",),
        lambda path: write_state(path, 0),
        read_state,
        own=True,
    ),
)


@dataclass
class Readings:
    """How often each fault was injected, how often it was refused, and what else happened.

    Attributes:
        injected: by fault.
        refused: by fault, in one line.
        unseen: by fault: read, and means something else; allowed where a file has no checksums.
        losses: wrong numbers, and errors that are not clear.
    """

    injected: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    unseen: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)


FAULTS = ("truncated", "bit flipped", "hostile", "odd file")


def inject(reader: Reader, fault: str, points: int, found: Readings) -> None:
    """One fault at up to so many points, for each file of the reader; "hostile" takes so many of its cases."""
    with fault_writers.open_folder() as root:
        path = root / "model.bin"
        reader.write(path)
        expected = reader.read(path)
        for name in reader.files:
            file = path / name if name else path
            good = file.read_bytes()
            for what, content in variants(fault, file, good, points):
                place(file, content)
                read_spoiled(reader, path, f"{name} {what}", fault, expected, found)
            place(file, good)
        if reader.read(path) != expected:
            found.losses.append(f"{reader.name}: {fault}: the good file is not read again")


def place(file: Path, content: bytes | Callable[[Path], object]) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    if callable(content):
        content(file)
    else:
        file.write_bytes(content)


def variants(fault: str, file: Path, good: bytes, points: int) -> Iterator[tuple[str, Any]]:
    if fault == "truncated":
        yield from ((f"{size} of {len(good)} bytes", good[:size]) for size in spread(len(good), points))
    elif fault == "bit flipped":
        yield from flipped(file, good, points)
    elif fault == "odd file":
        yield from ODD.items()
    else:
        of_tensors = hostile.parts(good)[0] if good[8:9] == b"{" else None
        cases = list(hostile.files(good) if of_tensors else hostile.texts(good) if is_text(good) else ())
        cases += list(hostile.indices(good)) if file.name == INDEX else []
        yield from (cases[number] for number in spread(len(cases), points))


def is_text(content: bytes) -> bool:
    try:
        return bool(content.decode())
    except UnicodeDecodeError:
        return False


def flipped(file: Path, good: bytes, points: int) -> Iterator[tuple[str, bytes]]:
    """Most points in the header, where one has meaning."""
    size = (
        int.from_bytes(good[:8], "little") + 8 if file.suffix in (".safetensors", ".bin") and good[8:9] == b"{" else 0
    )
    places = [*spread(8 * size, points), *(8 * size + each for each in spread(8 * (len(good) - size), points))]
    for number in places:
        changed = bytearray(good)
        changed[number // 8] ^= 1 << number % 8
        yield f"bit {number % 8} of byte {number // 8}", bytes(changed)


def spread(count: int, points: int) -> list[int]:
    """Numbers below count, evenly; all of them, if there are no more than points."""
    return sorted({count * number // points for number in range(points)}) if count > points else list(range(count))


ODD: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nowhere")),
    "a link to what never ends": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": lambda path: executors._files.whole.os.mkfifo(path),
}


def read_spoiled(reader: Reader, path: Path, what: str, fault: str, expected: Any, found: Readings) -> None:
    found.injected[fault] += 1
    try:
        own = reader.read(path)
    except (ValueError, OSError, executors.Unsupported) as error:
        found.refused[fault] += 1
        text = str(error)
        if "\n" in text or str(path) not in text or len(text) > 2500:
            found.losses.append(f"{reader.name}: {what}: unclear: {type(error).__name__}: {text[:200]!r}")
    except Exception as error:
        found.losses.append(f"{reader.name}: {what}: unclear: {type(error).__name__}: {str(error)[:200]!r}")
    else:
        if own != expected:
            found.unseen[fault] += 1
            if reader.own and fault != "hostile":
                found.losses.append(f"{reader.name}: {what}: read, and means something else")


@st.composite
def edits(draw: st.DrawFn, good: bytes) -> bytes:
    """The content after up to four edits, most of them where the file says what it holds."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        most = draw(st.sampled_from((min(16, len(content)), min(600, len(content)), len(content))))
        place = draw(st.integers(0, most))
        size = draw(st.sampled_from((0, 1, 2, 8, 40)))
        content[place : place + size] = draw(st.one_of(st.binary(max_size=9), st.sampled_from(TOKENS)))
    return bytes(content)


TOKENS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-1", b"9" * 30, b"1e999", b"NaN", b"null", b"true", b'"x"'),
    *(b"\\ud800", b"\\u0000", b"\n", b"\x00", b"\xff" * 8, b"[" * 3000, b'"dtype":"F4"', b'"shape":[]', b"../"),
)
