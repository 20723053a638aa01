"""How fast a CPU multiplies rows with an expert's matrix: torch's 16-bit product, the widened one, and Numba's kernels.

python benchmarks/cpu_products.py [--out benchmarks/results/cpu-products] [--dtype bfloat16] [--width 2048]

The source of the bounds in executors/_pipeline/cpu_product.py and executors/_numba/products.py. One thread, in its own
processor time, so another process on the machine disturbs it little. For a processor without 16-bit instructions on one
that has them: ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 NUMBA_CPU_NAME=haswell
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from executors._compare.plot import save
from executors._files.whole import write_json
from executors._numba import products as compiled
from executors._pipeline import cpu_product

mpl.use("Agg")
from matplotlib import pyplot as plt

KINDS = ("bfloat16", "float16")
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)
ORDERS = {"rows": "summed over along rows: x Wᵀ", "columns": "summed over along columns: dy W", "outer": "dW = dyᵀ x"}
WAYS = {"torch": "o", "widened": "s", "numba": "D"}
TICKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
LONGEST = 0.3  # seconds of a call; slower ones are not measured for more rows
MATRICES = 4  # in turn, so that none is in the first caches
CALLS = 5  # of each; the fastest counts
SETTING = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "NUMBA_CPU_NAME")


def main(
    out: Annotated[Path, typer.Option(help="Folder for products.json and products.png.")] = Path("bench-results"),
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    width: Annotated[int, typer.Option(help="Numbers that are summed over.")] = 2048,
    columns: Annotated[int, typer.Option(help="Of the result.")] = 1536,
) -> None:
    """Times the products and writes the table and the picture."""
    if dtype not in KINDS:
        raise typer.BadParameter(f"--dtype {dtype}: must be one of {', '.join(KINDS)}")
    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    found = [
        {"order": order, "rows": rows} | microseconds(kind, order, rows, width, columns)
        for order in ORDERS
        for rows in track(ROWS, description=order, transient=True)
    ]
    machine = {
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "16-bit products": cpu_product.multiplies(kind),
        "setting": {name: os.environ[name] for name in SETTING if name in os.environ},
        "torch": str(torch.__version__),
    }
    result = {"machine": machine, "dtype": dtype, "width": width, "columns": columns, "microseconds": found}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "products.json", result)
    plot(out / "products.png", result)
    Console().print(table(result))


def microseconds(dtype: torch.dtype, order: str, rows: int, width: int, columns: int) -> dict[str, float | None]:
    """The time of one product, each way; None where one is too slow to wait for."""
    if order == "outer":
        return _microseconds_of_outer(dtype, rows, width, columns)
    matrices = [torch.randn(columns, width).mul_(width**-0.5).to(dtype) for _ in range(MATRICES)]
    if order == "columns":
        matrices = [matrix.t().contiguous().t() for matrix in matrices]
    a = torch.randn(rows, width).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)

    def by_numba(b: torch.Tensor) -> None:
        out.copy_(compiled._compiled(a, b[None], [(0, 0, rows)]))

    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "torch": lambda b: torch.mm(a, b, out=out),
        "widened": lambda b: cpu_product._multiply_widened(a.float(), b, out),
        "numba": by_numba,
    }
    return {name: _fastest(way, [matrix.t() for matrix in matrices]) for name, way in ways.items()}


def _microseconds_of_outer(dtype: torch.dtype, rows: int, width: int, columns: int) -> dict[str, float | None]:
    matrices = [torch.empty(columns, width, dtype=dtype) for _ in range(MATRICES)]
    dy, x = torch.randn(rows, columns).to(dtype), torch.randn(rows, width).to(dtype)

    def widened(out: torch.Tensor) -> None:
        cpu_product._multiply_outer_widened(dy, x, out)

    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "torch": lambda out: torch.mm(dy.t(), x, out=out),
        "widened": widened,
        "numba": lambda out: compiled._compiled_outer(dy, x, out[None], [(0, 0, rows)]),
    }
    return {name: _fastest(way, matrices) for name, way in ways.items()}


def _fastest(way: Callable[[torch.Tensor], Any], matrices: list[torch.Tensor]) -> float | None:
    start = time.thread_time()
    way(matrices[0])
    if time.thread_time() - start > LONGEST:
        return None
    times = []
    for _ in range(CALLS):
        start = time.thread_time()
        for matrix in matrices:
            way(matrix)
        times.append((time.thread_time() - start) / len(matrices))
    return round(min(times) * 1e6, 1)


def table(result: dict[str, Any]) -> Table:
    """Microseconds by order and rows."""
    made = Table(title=f"{result['dtype']} [n, {result['width']}] x [.., {result['columns']}], and dW, µs")
    for name in ("W", "rows", *WAYS):
        made.add_column(name, justify="right")
    for row in result["microseconds"]:
        made.add_row(row["order"], str(row["rows"]), *("-" if row[w] is None else f"{row[w]:,.0f}" for w in WAYS))
    return made


def plot(path: Path, result: dict[str, Any]) -> None:
    """GFLOP/s over rows, a panel for each order of the matrix."""
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.8), sharey=True, layout="constrained", dpi=130)
    for axis, order in zip(axes, ORDERS, strict=True):
        for way, marker in WAYS.items():
            points = [r for r in result["microseconds"] if r["order"] == order and r[way] is not None]
            rates = [2e-3 * r["rows"] * result["width"] * result["columns"] / r[way] for r in points]
            axis.loglog([r["rows"] for r in points], rates, marker=marker, label=way, markersize=4)
        axis.set(title=ORDERS[order], xlabel="rows of an expert")
        axis.grid(alpha=0.3, which="both")
        axis.set_xticks(TICKS, TICKS)
    axes[0].set_ylabel("GFLOP/s, one thread")
    axes[0].legend()
    machine = result["machine"]
    able = "with" if machine["16-bit products"] else "without"
    figure.suptitle(f"{result['dtype']} {able} 16-bit instructions ({machine['processor']}, torch {machine['torch']})")
    save(figure, path)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
