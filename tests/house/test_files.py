"""Who writes and reads files: all of them are on the lists of `fault_writers` and `fault_readers`, or named here."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fault_readers import READERS
from fault_writers import WRITERS

ROOT = Path(__file__).parents[2]
PACKAGES = ("moe_ref", "executors", "examples", "benchmarks", "data")
HELPERS = {"executors/_files/whole.py", "executors/_files/tensors.py", "executors/_files/text.py"}
BY_PATH = {"benchmarks/gpu_summary.py", "examples/peers/moe_ref_peers/alone.py"}  # they take a helper so
# What makes a file by itself, and what makes one whole.
RAW = {"write_text", "write_bytes", "savefig", "save_file", "save_pretrained", "mkstemp", "NamedTemporaryFile", "touch"}
RAW |= {
    "os.replace",
    "os.rename",
    "torch.save",
    "json.dump",
    "pickle.dump",
    "shutil.copy",
    "shutil.move",
    "open for writing",
}
WHOLE = {
    "executors._files.whole": {"replacing", "write_json", "write_text"},
    "executors._files.tensors": {"write"},
}
PRIVATE = "files of a folder that nobody else knows"
RAW_ALLOWED = {
    "executors/_bench/memory.py": PRIVATE,
    "executors/_triton/inspect/disassembly.py": PRIVATE,
    "executors/_triton/inspect/resources.py": PRIVATE,
    "executors/_compare/memory.py": "asks the kernel to forget a peak",
    "executors/_bench/peers/kt.py": "silences a library",
    "benchmarks/gpu_run.py": "the log of a process, as it runs",
    "executors/_cli/report.py": "by the helper of that name",
    "executors/_compare/plot.py": "into the temporary file of `replacing`",
    "data/train_tiny_gpt_oss.py": "into the temporary file of `replacing`, and into memory",
    "executors/_triton/tuned_file.py": "moves aside what it does not understand",
    "executors/hf/save.py": "configurations into a folder that is renamed when all is there",
    "executors/hf/adapter_file.py": "a configuration into a folder of its own, whose files are renamed last",
    "moe_ref/conformance/isolation/worker.py": PRIVATE,
    "moe_ref/conformance/vectors/folder.py": "into a folder that is renamed when all is there",
    "moe_ref/conformance/vectors/archive.py": "into the temporary file of `replacing`",
    "moe_ref/conformance/reporting/saved.py": "a folder that is renamed when all is there",
    "examples/qlora_finetune.py": "PEFT's own form, into a folder that is read back at once",
    "examples/peers/findings/transformers_empty_tp_plan.py": PRIVATE,
    "examples/peers/moe_ref_peers/judged.py": PRIVATE,
}
OPENS = {
    "safe_open",
    "load_file",
    "opened",
    "read_json",
    "read_bytes",
    "read_text",
    "parse_json",
    "json.loads",
    "header",
}
OPENS |= {"checkpoint.open", "json.load", "torch.load", "pickle.load", "open for reading"}
OPENS_ALLOWED = {
    "moe_ref/conformance/isolation/process.py": "what a process of ours printed",
    "moe_ref/conformance/vectors/archive.py": "files that were just written",
    "executors/_bench/memory.py": PRIVATE,
    "executors/_compare/measure.py": "what a process of ours printed",
    "executors/_compare/memory.py": "the kernel's figures",
    "executors/_compare/report.py": "the kernel's figures",
    "executors/_report/page.py": "the package's own style and script",
    "executors/_triton/tuned.py": "the package's own source",
    "executors/_files/checksums.py": "part of `opened`",
    "executors/parallel/agreement.py": "what other ranks said",
    "examples/qlora/memory.py": "what a process of ours was given",
    "examples/peers/moe_ref_peers/__main__.py": "results of its own",
    "examples/peers/moe_ref_peers/alone.py": "results of its own",
    "examples/peers/moe_ref_peers/interpreter.py": "what a process of ours printed",
    "examples/peers/moe_ref_peers/judged.py": "what a process of ours printed",
    "examples/peers/moe_ref_peers/machine.py": "the processor's name",
    "examples/tiny/report.py": "digests of the bundled files",
    "benchmarks/four_bit_counts.py": "figures of this repository",
    "benchmarks/gpu_run.py": "the log of a process, for people",
    "benchmarks/gpu_summary.py": "the log of a process, for people",
    "data/train_tiny_gpt_oss.py": "files that it has just written",
}


def calls(source: str) -> Iterator[str]:
    """The functions that a text calls: "save" of ``plot.save(x)``, "os.replace", and "open for writing"."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        last = name.rpartition(".")[2]
        yield from {name, last}
        if last == "open" and not name.endswith(("os.open", "checkpoint.open")):
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            texts += [k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
            mode = texts[-1] if texts and len(texts[-1]) < 4 else "r"
            yield "open for writing" if set(mode) & set("wax+") else "open for reading"


def dotted(node: ast.expr) -> str:
    """ "a.b.c", or ".c" of what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@cache
def called_in(path: Path) -> frozenset[str]:
    return frozenset(calls(path.read_text()))


def imports_a_helper(source: str) -> bool:
    """Whether a text imports what writes a file whole."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    names = {(node.module, alias.name) for node in nodes for alias in node.names}
    return any(module in WHOLE and name in WHOLE[module] for module, name in names)


def found(names: set[str], root: Path = ROOT) -> dict[str, set[str]]:
    """The modules that call one of the names, without the helpers."""
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    own = {str(path.relative_to(root)): set(names & called_in(path)) for path in files}
    return {module: called for module, called in own.items() if called and module not in HELPERS}


def whole(root: Path = ROOT) -> set[str]:
    """Modules that write by the helpers."""
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    writing = {str(path.relative_to(root)) for path in files if imports_a_helper(path.read_text())}
    return writing - HELPERS | BY_PATH


def test_whoever_makes_a_file_does_it_whole_or_is_named_here() -> None:
    assert found(RAW).keys() - RAW_ALLOWED.keys() == set()
    assert RAW_ALLOWED.keys() - found(RAW).keys() == set()


def test_every_writer_is_on_the_list_that_has_the_faults() -> None:
    listed = {module for writer in WRITERS for module in writer.modules}
    assert whole() - listed == set()
    assert listed - whole() == set()


def test_every_reader_is_on_the_list_that_has_the_faults() -> None:
    listed = {module for reader in READERS for module in reader.modules}
    assert found(OPENS).keys() - listed - OPENS_ALLOWED.keys() == set()
    assert listed - found(OPENS).keys() == set()
    assert OPENS_ALLOWED.keys() - found(OPENS).keys() == set()
    assert not OPENS_ALLOWED.keys() & listed


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("path.write_text('x')", "write_text"),
        ("open(path, 'w')", "open for writing"),
        ("path.open('ab')", "open for writing"),
        ("open(path, mode='r+')", "open for writing"),
        ("import os\nos.replace(a, b)", "os.replace"),
        ("from safetensors.torch import save_file\nsave_file(t, p)", "save_file"),
        ("import torch\ntorch.save(t, p)", "torch.save"),
    ],
)
def test_a_new_writer_is_seen(tmp_path: Path, line: str, name: str) -> None:
    planted = tmp_path / "executors" / "planted.py"
    planted.parent.mkdir()
    planted.write_text(line)
    assert found(RAW, tmp_path) == {"executors/planted.py": {name}}


@pytest.mark.parametrize("line", ["open(path)", "path.open('rb')", "path.read_text()", "import json\njson.loads(x)"])
def test_a_new_reader_is_seen(tmp_path: Path, line: str) -> None:
    planted = tmp_path / "executors" / "planted.py"
    planted.parent.mkdir()
    planted.write_text(line)
    assert found(RAW, tmp_path) == {}
    assert found(OPENS, tmp_path).keys() == {"executors/planted.py"}
