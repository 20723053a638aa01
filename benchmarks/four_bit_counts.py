"""Counts what 4 bits cost, decoded in the products and before them: python benchmarks/four_bit_counts.py

Instructions come from the compiled kernels (``python -m executors kernels --json``), rates from the vendors' data
sheets, and H200's products and bandwidth from a measurement. It is arithmetic, no timing: where the two ways cross by
count, which `executors._triton.decode_rule` holds until ``python -m executors crossover`` has run on such a GPU.

Reads and writes benchmarks/results/four-bit-counted/; ``--kernels FILE`` takes fresh figures, repeatable.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib
import typer
from rich.console import Console
from rich.table import Table

from executors._compare.plot import save
from executors._files.whole import write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results" / "four-bit-counted"
SCHEMA = 1
KEPT = ("kernel", "layer", "dtype", "tile", "warps", "registers", "tensor_core_kind", "instructions_per_weight")
NF4_BYTES = 0.5 + 4 / 64  # of a weight: half a byte, and its share of a scale
DECODED_BYTES = 2.0  # bf16
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


class Device(NamedTuple):
    """Rates of a GPU.

    Attributes:
        name: of the product.
        multiprocessors, lanes, clock: of the clock, Hz; a multiprocessor issues for so many lanes in each cycle.
        products: flop/s of large bf16 products; on sm75 of fp16 without tensor cores, which Triton does not use there.
        bandwidth: bytes/s.
    """

    name: str
    multiprocessors: int
    lanes: int
    clock: float
    products: float
    bandwidth: float

    @property
    def instructions(self) -> float:
        """Thread instructions in a second."""
        return self.multiprocessors * self.lanes * self.clock


# H200's products and bandwidth were measured (docs/performance.md); of the others 70% and 80% of the data sheet's.
DEVICES = {
    "sm75": Device("T4", 40, 64, 1.59e9, 40 * 64 * 1.59e9 * 2, 0.8 * 0.32e12),
    "sm80": Device("A100 80GB", 108, 128, 1.41e9, 0.7 * 312e12, 0.8 * 2.04e12),
    "sm86": Device("RTX A6000", 84, 128, 1.8e9, 0.7 * 155e12, 0.8 * 0.768e12),
    "sm90": Device("H200", 132, 128, 1.98e9, 788e12, 4.3e12),
    "sm100": Device("B200", 148, 128, 1.85e9, 0.7 * 2250e12, 0.8 * 8e12),
    "gfx942": Device("MI300X", 304, 64, 2.1e9, 0.5 * 1307e12, 0.8 * 5.3e12),
}


class Counts(NamedTuple):
    """Costs of one weight, in seconds, on one device.

    Attributes:
        tiles: (rows, decoding in the product) of each row tile, the smallest first.
        row: its products with one row.
        write: decoding it before the products.
        read: reading it in 16 bits.
        read_codes: reading it in 4.
    """

    tiles: tuple[tuple[int, float], ...]
    row: float
    write: float
    read: float
    read_codes: float

    def tile(self, rows: int) -> tuple[int, float]:
        """The smallest tile that takes so many rows of an expert, else the largest."""
        return next((tile for tile in self.tiles if rows <= tile[0]), self.tiles[-1])

    def multiply(self, rows: int) -> float:
        """The products, of whole tiles."""
        height, _ = self.tile(rows)
        return -(-rows // height) * height * self.row

    def fused(self, rows: int, *, overlapped: bool) -> float:
        """Decoded in the products, with so many rows of an expert: beside the products' own work, or after it."""
        height, decode = self.tile(rows)
        parts = (-(-rows // height) * decode, self.multiply(rows))
        return max(max(parts) if overlapped else sum(parts), self.read_codes)

    def decoded(self, rows: int) -> float:
        """Decoded before the products."""
        return self.write + max(self.read, self.multiply(rows))

    def crossover(self) -> int:
        """The most rows, in whole largest tiles, up to which decoding in the products costs no more, not overlapped."""
        height, most = self.tiles[-1][0], 0
        while self.fused(most + height, overlapped=False) <= self.decoded(most + height):
            most += height
        return most


def counts_of(family: str, kernels: list[dict[str, Any]]) -> Counts:
    """The costs on a family's device, from its tiles of NF4."""
    device = DEVICES[family]
    own = [k for k in kernels if k["layer"] == "nf4" and k["dtype"] != "float32" and k["kernel"] in ("up", "down")]
    tiles = []
    for rows in sorted({k["tile"][0] for k in own}):
        multiplies = 0 if own[0]["tensor_core_kind"] else rows  # without tensor cores they are among the instructions
        each = [k["instructions_per_weight"] - multiplies for k in own if k["tile"][0] == rows]
        tiles.append((rows, sum(each) / len(each) / device.instructions))
    before = [k["instructions_per_weight"] for k in kernels if k["kernel"] == "decode" and k["dtype"] != "float32"]
    return Counts(
        tuple(tiles),
        2 / device.products,
        max((NF4_BYTES + DECODED_BYTES) / device.bandwidth, max(before) / device.instructions),
        DECODED_BYTES / device.bandwidth,
        NF4_BYTES / device.bandwidth,
    )


def load(fresh: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """The 4-bit kernels of each family: those stored, replaced by fresh ones."""
    stored = RESULTS / "kernels.json"
    found: dict[str, list[dict[str, Any]]] = json.loads(stored.read_text())["families"] if stored.exists() else {}
    for path in fresh:
        for family, target in json.loads(path.read_text())["targets"].items():
            rows = [k for k in target["kernels"] if k["instructions_per_weight"]]
            found[family] = [
                {name: k[name] for name in KEPT} | {"by_rows": k["constants"]["FORMAT"]["by_rows"]} for k in rows
            ]
    return {family: found[family] for family in DEVICES if family in found}


def draw(path: Path, families: dict[str, list[dict[str, Any]]]) -> None:
    """Left, instructions of a weight by tile; right, the time of a weight by rows of an expert, on an H200."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    shown = ("sm80", "sm90", "sm100", "gfx942")
    layers = ("nf4", "nf4-nest", "mxfp4")
    for place, family in enumerate(shown):
        for number, layer in enumerate(layers):
            own = [
                k["instructions_per_weight"]
                for k in families[family]
                if k["layer"] == layer and k["kernel"] in ("up", "down") and k["dtype"] == "bfloat16"
            ]
            at = place + 0.26 * (number - 1)
            label = f"{layer.replace('-nest', ', nested')}".upper().replace("NESTED", "nested") if not place else None
            left.bar(at, max(own), 0.22, color=COLOURS[number], alpha=0.35)
            left.bar(at, min(own), 0.22, color=COLOURS[number], label=label)
    left.set_xticks(range(len(shown)), [f"{family}\n{DEVICES[family].name}" for family in shown])
    left.set_ylabel("thread instructions for each weight")
    left.set_title("Decoding in the products (dark: best tile, light: worst)", fontsize=10)
    left.legend(frameon=False)
    counts = counts_of("sm90", families["sm90"])
    rows = [*range(1, 16), *range(16, 2049, 16)]
    lines = {
        "in the products, one after the other": [counts.fused(r, overlapped=False) for r in rows],
        "in the products, overlapped": [counts.fused(r, overlapped=True) for r in rows],
        "before the products": [counts.decoded(r) for r in rows],
        "16 bits from the start": [counts.decoded(r) - counts.write for r in rows],
    }
    styles = (("-", 0), ("--", 0), ("-", 1), (":", 2))
    for (label, seconds), (style, colour) in zip(lines.items(), styles, strict=True):
        right.plot(rows, [1e12 * s for s in seconds], style, color=COLOURS[colour], label=label)
    right.axvline(counts.crossover(), color="grey", linewidth=0.8)
    right.text(counts.crossover() * 0.93, 6.5, "the rule", rotation=90, ha="right", va="top", color="grey")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("rows of an expert")
    right.set_ylabel("ps for each weight")
    right.set_title("NF4 on an H200, counted, not measured", fontsize=10)
    right.legend(frameon=False, fontsize=8, loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path, 130)
    plt.close(figure)


def main(
    kernels: Annotated[list[Path] | None, typer.Option(help="What executors kernels --json wrote; repeatable.")] = None,
) -> None:
    """Counts, prints and draws."""
    families = load(kernels or [])
    RESULTS.mkdir(parents=True, exist_ok=True)
    table = Table(
        title="One NF4 weight, in ps; rows: of a tile, and by count the most of an expert to decode in products"
    )
    for name in ("family", "GPU", "tile", "decode", "multiply", "write", "read", "rows"):
        table.add_column(name, justify="left" if name in ("family", "GPU") else "right")
    counted = {family: counts_of(family, own) for family, own in families.items()}
    for family, own in counted.items():
        rows, decode = own.tiles[-1]
        cells = [f"{1e12 * t:.2f}" for t in (decode, own.multiply(rows), own.write, own.read)]
        table.add_row(family, DEVICES[family].name, str(rows), *cells, str(own.crossover()))
    console = Console(width=80)
    console.print(table)
    write_json(RESULTS / "kernels.json", {"schema": SCHEMA, "families": families})
    summary = {family: own._asdict() | {"crossover": own.crossover()} for family, own in counted.items()}
    write_json(RESULTS / "counts.json", {"schema": SCHEMA, "families": summary})
    draw(RESULTS / "counts.png", families)
    console.print(f"wrote {RESULTS}")


if __name__ == "__main__":
    typer.run(main)
