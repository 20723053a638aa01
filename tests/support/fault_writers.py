"""All that writes files, and what each fault does to it. A new writer belongs into `WRITERS`; the faults are given."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import executors
import families
import peft_models
from executors import hf, nf4
from executors._compare import plot
from executors._files.whole import write_json, write_text
from executors._report.page import Report, page
from executors._triton import tuned_file
from executors._triton.configs import KernelConfig, Tile
from executors.layer_file import load_layer, save_layer
from faults import FULL, AtEvent, as_nobody, in_a_child, limited, open_folder, racing, read_only
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.vectors.archive import write_archive
from qlora import state

ROOT = Path(__file__).parents[2]
NOTHING = "nothing"


@dataclass(frozen=True)
class Writer:
    """Something that writes a file or a folder.

    Attributes:
        name: as a user calls it.
        modules: which call the helpers of `executors._files`.
        write: two versions of the content, 0 and 1.
        read: what is there, as the user's reader finds it; raises for half a file.
        replaces: whether it takes the place of what is there.
        adds: whether what is there stays, and both versions are there in the end.
        reads_beside: whether a reader may read while it is replaced.
        gone: whether a kill may leave nothing that is read, rather than the old.
        slow: fewer points in every run.
    """

    name: str
    modules: tuple[str, ...]
    write: Callable[[Path, int], object]
    read: Callable[[Path], Any]
    replaces: bool = True
    adds: bool = False
    reads_beside: bool = True
    gone: bool = False
    slow: bool = False


def numbers(version: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(version))


def write_nf4(path: Path, version: int) -> None:
    nf4.save(path, {"a": nf4.quantize_tensor(numbers(version, 4, 32, 32), nested=True), "b": numbers(version, 3)})


def read_nf4(path: Path) -> str:
    tensor = nf4.load(path, "a")
    return hashlib.sha256(b"".join(array.numpy().tobytes() for array in tensor.arrays().values())).hexdigest()


def write_layer(path: Path, version: int) -> None:
    weights = MoEWeights(numbers(version, 2, 8, 4), numbers(version, 2, 4, 4), config=MoEConfig(1))
    save_layer(path, numbers(version, 3, 4), numbers(version, 3, 2), weights, f"version {version}")


def read_layer(path: Path) -> str:
    layer = load_layer(path)
    return f"{layer.source} {layer.x.sum()} {layer.weights.down_proj.sum()}"


TILE = Tile(16, 32, 16, 2, 2, 1)
TILES = KernelConfig(16.0, *[TILE] * len(tuned_file.PRODUCTS))
KEY = tuned_file.Key("GPU", "torch 1", "bfloat16", "ieee", 8, 2, 64, 32, "rows, rows", "swiglu", 0, 4)


def write_tuned(path: Path, version: int) -> None:
    tuned_file.save(path, KEY._replace(bucket=4 + version), TILES, {"ms": 1.0 + version})


def read_tuned(path: Path) -> str:
    json.loads(path.read_text())  # whose reader only warns
    return str(sorted(key.bucket for key in tuned_file.read(path, KEY.versions)))


def write_figures(path: Path, version: int) -> None:
    write_json(path, {"version": version, "rows": list(range(300))})


def write_picture(path: Path, version: int) -> None:
    figure = Figure(figsize=(0.4, 0.4), dpi=50)
    figure.text(0.1 * version, 0.5, "x")
    plot.save(figure, path)


def read_picture(path: Path) -> str:
    content = path.read_bytes()
    if not content.endswith(b"IEND\xaeB`\x82"):
        raise ValueError(f"{path}: must end as a PNG does")
    return hashlib.sha256(content).hexdigest()


def write_page(path: Path, version: int) -> None:
    write_text(path, page(Report([], [f"version {version}"], [])))


def read_page(path: Path) -> str:
    content = path.read_text(encoding="utf-8")
    if not content.endswith("</html>\n"):
        raise ValueError(f"{path}: must end as a page does")
    return content


@cache
def packed_model(version: int) -> Any:
    torch.manual_seed(version)
    model = families.build(families.named("mixtral"))
    hf.quantize_experts(model)
    return model


def write_model(path: Path, version: int) -> None:
    hf.save_quantized(packed_model(version), path, shard_bytes=30_000)


def read_model(path: Path) -> str:
    found = hashlib.sha256()
    for name, value in sorted(hf.load_quantized(path).state_dict().items()):
        found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@cache
def adapter(version: int) -> Any:
    return peft_models.adapted("mixtral", torch.float32, r=2 + version)


def write_adapter(path: Path, version: int) -> None:
    hf.export_adapter(adapter(version), path)


def read_adapter(path: Path) -> str:
    """As PEFT does: without a configuration there is no adapter, and with one both files fit."""
    if not (path / "adapter_config.json").exists():
        return NOTHING
    rank = json.loads((path / "adapter_config.json").read_text())["r"]
    with executors._files.tensors.opened(path / "adapter_model.safetensors") as file:
        ranks = {file.tensor(name).shape[0] for name in file.names if name.endswith("lora_A.weight")}
    assert ranks == {rank}, (ranks, rank)
    return f"rank {rank}"


def write_state(path: Path, version: int) -> None:
    parameter = torch.nn.Parameter(numbers(version, 40))
    optimiser = torch.optim.AdamW([parameter])
    parameter.grad = numbers(version + 2, 40)
    optimiser.step()
    state.save_state(path, "run", state.State([1.0 + version], [0.1]), {"p": parameter}, optimiser)


def read_state(path: Path) -> str:
    parameter = torch.nn.Parameter(torch.zeros(40))
    found = state.load_state(path, "run", {"p": parameter}, torch.optim.AdamW([parameter]))
    if found is None:
        raise FileNotFoundError(f"{path}: there is no state")
    return f"{found.losses} {parameter.sum().item()}"


def write_summary(path: Path, version: int) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import gpu_summary
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    gpu_summary.write_json(path, {"version": version, "rows": list(range(100))})


@cache
def folder_of_vectors(version: int) -> Path:
    """Written before any fault, and kept until the process ends."""
    folder = Path(tempfile.mkdtemp()) / "vectors"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    folder.mkdir()
    folder.parent.chmod(0o755)
    (folder / "case.mrv").write_bytes(bytes(numbers(version, 100).numpy()))
    return folder


def write_vectors_archive(path: Path, version: int) -> None:
    write_archive(folder_of_vectors(version), path)


def read_archive(path: Path) -> str:
    with tarfile.open(path) as archive:
        (member,) = archive.getmembers()
        content = archive.extractfile(member)
        assert content is not None
        return hashlib.sha256(content.read()).hexdigest()


def read_json(path: Path) -> str:
    return str(json.loads(path.read_text()))


WRITERS = (
    Writer("executors.nf4.save", ("executors/nf4/file.py",), write_nf4, read_nf4),
    Writer("executors.layer_file.save_layer", ("executors/layer_file.py",), write_layer, read_layer),
    Writer("python -m executors tune", ("executors/_triton/tuned_file.py",), write_tuned, read_tuned, adds=True),
    Writer(
        "JSON of compare, bench, crossover, tune, kernels, plan, benchmarks and examples",
        (
            *(
                f"executors/_cli/{name}.py"
                for name in (
                    "bench",
                    "bench_model",
                    "bench_ranks",
                    "compare",
                    "crossover",
                    "kernels",
                    "kernels_executed",
                    "plan",
                    "tune",
                )
            ),
            *(f"benchmarks/{name}.py" for name in ("calibrate", "cpu_products", "four_bit_counts")),
            "moe_ref/conformance/reporting/results.py",
            *("examples/qlora_finetune.py", "examples/train_tiny.py", "data/train_tiny_gpt_oss.py"),
            *(f"examples/peers/moe_ref_peers/{name}.py" for name in ("__main__", "alone")),
        ),
        write_figures,
        read_json,
    ),
    Writer(
        "pictures of the same",
        ("executors/_compare/plot.py",),
        write_picture,
        read_picture,
        slow=True,
    ),
    Writer("python -m executors report", ("executors/_cli/report.py",), write_page, read_page),
    Writer(
        "executors.hf.save_quantized",
        ("executors/hf/save.py",),
        write_model,
        read_model,
        replaces=False,
        slow=True,
    ),
    Writer(
        "executors.hf.export_adapter",
        ("executors/hf/adapter_file.py",),
        write_adapter,
        read_adapter,
        reads_beside=False,
        gone=True,
        slow=True,
    ),
    Writer("state of the fine-tune (examples/qlora)", ("examples/qlora/state.py",), write_state, read_state),
    Writer(
        "python -m moe_ref.conformance vectors --archive",
        ("moe_ref/conformance/vectors/archive.py",),
        write_vectors_archive,
        read_archive,
    ),
    Writer("benchmarks/gpu.py", ("benchmarks/gpu_summary.py",), write_summary, read_json),
)


@dataclass
class Tally:
    """How often each fault was injected, and what was lost."""

    injected: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)


FAULTS = ("killed at a byte", "full at a byte", "killed at a step", "error at a step", "read-only folder", "race")


def inject(writer: Writer, fault: str, points: int, tally: Tally) -> None:
    """One fault at up to so many points, spread evenly over the file's bytes or over the steps."""
    with open_folder() as root:
        case = _Case(writer, root, tally, fault)
        getattr(case, fault.replace(" ", "_").replace("-", "_"))(points)


class _Case:
    def __init__(self, writer: Writer, root: Path, tally: Tally, fault: str) -> None:
        self.writer, self.root, self.tally, self.fault, self.number = writer, root, tally, fault, 0
        whole = self.fresh()
        writer.write(whole, 0)
        self.old = writer.read(whole) if writer.replaces else NOTHING
        if not writer.replaces:
            whole = self.fresh()
        writer.write(whole, 1)
        self.new = writer.read(whole)
        files = whole.rglob("*") if whole.is_dir() else [whole]
        self.size = max(file.stat().st_size for file in files if file.is_file())

    def fresh(self) -> Path:
        """A path in a folder of its own."""
        self.number += 1
        folder = self.root / str(self.number)
        folder.mkdir(mode=0o777)
        folder.chmod(0o777)
        return folder / "model.bin"

    def prepared(self) -> Path:
        """A path with the old version, where the writer replaces."""
        path = self.fresh()
        if self.writer.replaces:
            self.writer.write(path, 0)
        return path

    def there(self, path: Path) -> Any:
        return self.writer.read(path) if path.exists() else NOTHING

    def expect(self, path: Path, where: str, *, killed: bool) -> None:
        """The old or the new version is there, whole; and after it the next write succeeds."""
        self.tally.injected[self.fault] += 1
        allowed = {self.old, self.new} | ({NOTHING} if self.writer.gone and killed else set())
        try:
            found = self.there(path)
            if found not in allowed:
                self.lost(f"{where}: neither old nor new")
            if self.writer.replaces or not path.exists():
                self.writer.write(path, 1)
                if self.writer.read(path) != self.new:
                    self.lost(f"{where}: the next write is not read")
        except (OSError, ValueError, AssertionError) as error:
            self.lost(f"{where}: {type(error).__name__}: {error}")

    def told(self, path: Path, where: str, outcome: Any) -> None:
        """An error is the system's, in one line that names the file; and nothing is left beside the file."""
        if outcome.killed or not outcome.error:
            self.lost(f"{where}: {'killed' if outcome.killed else 'no error'}")
        elif "OSError" not in outcome.error or "\n" in outcome.text or str(path) not in outcome.text:
            self.lost(f"{where}: unclear: {outcome.error[0]}: {outcome.text}")

    def lost(self, what: str) -> None:
        self.tally.losses.append(f"{self.writer.name}, {self.fault}, {what}")

    def sizes(self, points: int) -> list[int]:
        count = min(points, self.size)
        return sorted({int(self.size * (point + 0.5) / count) for point in range(count)})

    def killed_at_a_byte(self, points: int) -> None:
        for size in self.sizes(points):
            path = self.prepared()
            in_a_child(lambda path=path: self.writer.write(path, 1), limited(size, kills=True))
            self.expect(path, f"byte {size} of {self.size}", killed=True)

    def full_at_a_byte(self, points: int) -> None:
        for size in self.sizes(points):
            path, where = self.prepared(), f"byte {size} of {self.size}"
            outcome = in_a_child(lambda path=path: self.writer.write(path, 1), limited(size, kills=False))
            self.told(path, where, outcome)
            self.left(path, where)
            self.expect(path, where, killed=False)

    def left(self, path: Path, where: str) -> None:
        odd = [each.name for each in path.parent.iterdir() if each.name.endswith((".tmp", ".lock"))]
        if odd:
            self.lost(f"{where}: left {odd}")

    def steps(self) -> int:
        path = self.prepared()
        counter = AtEvent(path.parent)

        def count() -> int:
            self.writer.write(path, 1)
            return counter.seen

        return int(in_a_child(count, counter).said)

    def killed_at_a_step(self, points: int) -> None:
        for step in self.spread(points):
            path = self.prepared()
            in_a_child(lambda path=path: self.writer.write(path, 1), AtEvent(path.parent, step))
            self.expect(path, f"step {step}", killed=True)

    def error_at_a_step(self, points: int) -> None:
        for number, step in enumerate(self.spread(points)):
            path, where = self.prepared(), f"step {step}"
            fault = AtEvent(path.parent, step, FULL[number % len(FULL)])
            outcome = in_a_child(lambda path=path: self.writer.write(path, 1), fault)
            if not outcome.killed and outcome.error:
                self.told(path, where, outcome)
            self.expect(path, where, killed=self.writer.gone)

    def spread(self, points: int) -> list[int]:
        steps = self.steps()
        assert steps > 1
        return sorted({int(steps * (point + 0.5) / points) for point in range(points)})

    def read_only_folder(self, points: int) -> None:
        path = self.prepared()
        with read_only(path.parent):
            if path.is_dir():
                path.chmod(0o555)
            outcome = in_a_child(lambda: self.writer.write(path, 1), as_nobody)
            if path.is_dir():
                path.chmod(0o755)
        self.told(path, "folder", outcome)
        self.expect(path, "folder", killed=False)

    def race(self, points: int) -> None:
        path, rounds = self.fresh(), max(points, 2)
        seen = {self.old, self.new, NOTHING, *self.extra()}

        def write(version: int) -> None:
            for _ in range(rounds if self.writer.replaces else 1):
                self.writer.write(path, version)

        with racing(lambda: write(0), lambda: write(1)) as still:
            while still():
                if self.writer.reads_beside:
                    self.watched(path, seen)
        self.tally.injected[self.fault] += 2 * (rounds if self.writer.replaces else 1)
        self.watched(path, {self.new} if self.writer.adds else seen - {NOTHING})

    def extra(self) -> set[Any]:
        """What may be there besides: of a writer that does not replace, or that adds, the other version alone."""
        path = self.fresh()
        found = set()
        for version in (0, 1):
            other = path.with_name(f"other {version}")
            self.writer.write(other, version)
            found.add(self.writer.read(other))
        return found

    def watched(self, path: Path, seen: set[Any]) -> None:
        try:
            found = self.there(path)
        except (OSError, ValueError, AssertionError) as error:
            self.lost(f"a reader: {type(error).__name__}: {error}")
        else:
            if found not in seen:
                self.lost(f"a reader found {found!r:.100}")


def every_fault(points: int) -> Iterator[tuple[Writer, str, int]]:
    for writer in WRITERS:
        for fault in FAULTS:
            yield writer, fault, points


__all__ = ["FAULTS", "WRITERS", "Tally", "Writer", "every_fault", "inject", "replace"]
