"""The command that compiles the Triton kernels for devices that need not be here, and shows what they take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

import executors
from executors._cli import kernels_executed
from executors._cli import options as cli
from executors._files.whole import write_json

if TYPE_CHECKING:
    from executors._triton.inspect.cases import Kernel
    from executors._triton.inspect.resources import Resources

SCHEMA = 2
KIB = 1024
DEFAULT_TARGETS = ("sm80", "sm90", "sm100", "gfx942")
ALL = "all"
DTYPES = ("bfloat16", "float16", "float32")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "int64": "i64"}
TENSOR_CORES = {"UTCHMMA": "UTC", "v_mfma": "MFMA"}
NOTES = """\
tile: of a product, rows x columns x k; of group and place, slots x experts x
  rows; then w: warps, s: stages of the loop over k
regs: registers of a thread; KiB: shared memory of a program, {shared} at most
  on {target}
tensor: instructions that multiply matrices (HMMA: mma.sync, HGMMA: wgmma,
  UTC: tcgen05, MFMA)
in k: loads from global memory in the loop over k, wide / all; wide: 16 bytes of
  a thread, or a tile by TMA
/w: instructions of a thread for each weight in 4 bits: in that loop, or in all
layers: k is last in memory in qwen3 and oss-rows, not in gpt-oss and deepseek;
  geglu, gelu (H=1040, I=528), relu2, step (a late clamp), inkling2 (softcaps):
  by activation; odd: H=50, I=17
in 4 bits: nf4 is qwen3; nf4-nest, nf4-peft (with adapters) and mxfp4 are
  gpt-oss, k last in memory in mxfp4 only"""


class KernelRow(NamedTuple):
    """A compiled kernel and what it takes."""

    kernel: Kernel
    resources: Resources

    @property
    def tile(self) -> str:
        """Such as "128x256x64 w8 s4"."""
        constants = self.kernel.constants
        stages = f" s{constants['num_stages']}" if "num_stages" in constants else ""
        return f"{'x'.join(map(str, self.kernel.tile))} w{self.kernel.compiled.metadata.num_warps}{stages}"

    @property
    def per_weight(self) -> float | None:
        """Instructions of a thread for each weight in 4 bits: of a product in the loop over k, of ``decode`` in all.

        None of other kernels, and beside an adapter, where another loop is the innermost one.
        """
        constants, own = self.kernel.constants, self.resources
        if constants.get("FORMAT") is None or constants.get("BLOCK_R"):
            return None
        metadata = self.kernel.compiled.metadata
        threads = metadata.num_warps * metadata.target.warp_size
        decodes = self.kernel.name == "decode"
        weights = prod(constants[size] for size in (("BLOCK_O", "BLOCK_I") if decodes else ("BLOCK_N", "BLOCK_K")))
        return (own.instructions if decodes else own.inner_instructions) * threads / weights

    def faults(self, shared: int) -> list[str]:
        """What is wrong with it, where a program may have so many bytes of shared memory."""
        own = self.resources
        spills = f"spills {own.spilled} bytes of a thread, {own.local} instructions move them"
        large = f"takes {own.shared} bytes of shared memory, of {shared}"
        uneven = f"has {own.uneven_sums} sums over lanes with a fused product: lanes may differ (C1)"
        wrong = ((spills, own.spills), (large, own.shared > shared), (uneven, own.uneven_sums))
        return [text for text, is_wrong in wrong if is_wrong]


@dataclass(frozen=True)
class KernelsOptions:
    """What can be asked of the compiled kernels."""

    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="sm75, sm80, sm86, sm90, sm100 or gfx942; repeatable. Default: the last three and sm80.",
        ),
    ] = None
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="bfloat16, float16, float32 or all; repeatable. Default: bfloat16 (sm75: float16) and float32.",
        ),
    ] = None
    largest: Annotated[
        bool, typer.Option("--largest", help="Only the products' largest tiles, the nearest to their limits.")
    ] = False
    execute: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER",
            help="Instead: execute the kernels of a layer on this CPU, as compiled for sm80, and count what they do: "
            "bundled or a model's, such as qwen3-30b-a3b.",
        ),
    ] = None
    tokens: Annotated[int | None, typer.Option(callback=cli.within(1), help="With --execute: T. Default: 128.")] = None
    packed: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --execute: weights in nf4, nf4-nested, fp4 or mxfp4.")
    ] = None
    direction: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --execute: forward or forward_backward. Default: forward."),
    ] = None
    card: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --execute: a100, h100, h200 or rtx4090. Default: a100.")
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=cli.in_a_folder, help="With --execute: write a picture there."),
    ] = None
    json: cli.JsonOption = None

    def check(self) -> None:
        """Refuses options that do not go together."""
        compiling: dict[str, Any] = {"--target": self.target, "--largest": self.largest}
        counting: dict[str, Any] = {"--tokens": self.tokens, "--packed": self.packed, "--direction": self.direction}
        counting |= {"--card": self.card, "--plot": self.plot}
        for name, value in (compiling if self.execute is not None else counting).items():
            if value:
                cli.refuse(f"{name}: must be left out {'with' if self.execute is not None else 'without'} --execute")
        if self.execute is not None and len(self.dtype or []) > 1:
            cli.refuse("--dtype: must be given once with --execute")

    def targets(self) -> dict[str, tuple[str, ...]]:
        """The dtypes to compile for, by target."""
        with cli.needing_triton("kernels need"):
            from executors._triton.inspect.compile import TARGETS
        targets = cli.checked("--target", self.target, list(TARGETS)) or DEFAULT_TARGETS
        dtypes = cli.checked("--dtype", self.dtype, (*DTYPES, ALL))
        if "sm75" in targets and dtypes and "bfloat16" in dtypes:
            cli.refuse("--dtype bfloat16: sm75 has none")
        return {target: _dtypes(target, dtypes) for target in targets}


@cli.with_options(KernelsOptions)
def kernels(options: KernelsOptions) -> None:
    """Compiles the Triton kernels, and shows what they take.

    Every shipped configuration is compiled on layers of real models, without a GPU. One table for each target:
    registers, shared memory, tensor-core instructions, how wide loads are, and what decoding 4 bits takes. Exit
    status: 0, or 1 if a kernel spills, takes more shared memory than there is or sums unevenly, 2 for bad arguments.

    With --execute: counts what each kernel of one call asks of a GPU's units, and says which of them bounds it on a
    card. Small slices of the layer are executed on this CPU, and the layer's counts follow from theirs.
    """
    options.check()
    if options.execute is not None:
        kernels_executed.execute(
            options.execute,
            options.tokens or kernels_executed.TOKENS,
            (options.dtype or ["bfloat16"])[0],
            options.packed,
            options.direction or "forward",
            options.card or "a100",
            options.json,
            options.plot,
        )
        return
    everything, failed = {}, False
    for target, dtypes in options.targets().items():
        rows = compile_rows(target, dtypes, options.largest)
        family, shared = _family(target)
        failed |= _print(target, rows, shared)
        everything[target] = {"family": family, "shared": shared, "kernels": [as_json(row) for row in rows]}
    if options.json is not None:
        write_json(options.json, {"schema": SCHEMA, "targets": everything})
        cli.print_lines([f"wrote {options.json}"])
    if failed:
        raise typer.Exit(1)


def _family(target: str) -> tuple[str, int]:
    """A target's family of configurations, and the bytes of shared memory of a program there."""
    from executors._triton import configs
    from executors._triton.inspect.cases import family_of

    family = family_of(target)
    return family, configs.FAMILIES[family].shared


def _print(target: str, rows: list[KernelRow], shared: int) -> bool:
    """Prints the table of a target, and whether anything is wrong there."""
    console, wrong = cli.new_console(), faults(target, rows, shared)
    console.print(f"\n{target}: {len(rows)} kernels")
    console.print(table(rows, shared))
    console.print(NOTES.format(shared=shared // KIB, target=target), style="dim")
    for line in wrong:
        console.print(escape(line), style="red", soft_wrap=True)
    return bool(wrong)


def _dtypes(target: str, chosen: tuple[str, ...] | None) -> tuple[str, ...]:
    from executors._triton.inspect.cases import default_dtypes

    if chosen and ALL not in chosen:
        return chosen
    return tuple(d for d in DTYPES if (target, d) != ("sm75", "bfloat16")) if chosen else default_dtypes(target)


def compile_rows(target: str, dtypes: tuple[str, ...], largest: bool) -> list[KernelRow]:
    """Compiles everything for a target."""
    from executors._triton.inspect.cases import compile_kernels
    from executors._triton.inspect.resources import resources_of

    with cli.progress_bar() as show:
        try:
            found = compile_kernels(
                target, dtypes, lambda done, total: show(f"compiling for {target}", done, total), largest
            )
            resources = resources_of([kernel.compiled for kernel in found])
        except executors.Unavailable as error:
            cli.refuse(str(error))
    return [KernelRow(*pair) for pair in zip(found, resources, strict=True)]


def table(rows: list[KernelRow], shared: int) -> Table:
    """A row for each kernel, in 80 columns."""
    out = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for name in ("kernel", "layer", "type", "tile"):
        out.add_column(name, no_wrap=True)
    for name in ("regs", "KiB", "tensor", "in k", "/w"):
        out.add_column(name, justify="right", no_wrap=True)
    last = ""
    for row in _most_registers(rows):
        kernel, own = row.kernel, row.resources
        if last not in ("", kernel.name):
            out.add_section()
        out.add_row(
            kernel.name if kernel.name != last else "",
            escape(kernel.layer),
            SHORT.get(kernel.dtype, kernel.dtype),
            row.tile,
            _red(str(own.registers), own.spills),
            _red(_kib(own.shared), own.shared > shared),
            _tensor(own),
            f"{own.inner_wide_loads}/{own.inner_loads}" if own.inner_loads else "",
            "" if row.per_weight is None else f"{row.per_weight:.1f}",
        )
        last = kernel.name
    return out


def _most_registers(rows: list[KernelRow]) -> list[KernelRow]:
    """Of kernels that differ only in which arguments are multiples of 16, the one with most registers."""
    found: dict[tuple[str, ...], KernelRow] = {}
    for row in rows:
        key = (row.kernel.name, row.kernel.layer, row.kernel.dtype, row.tile)
        if key not in found or found[key].resources.registers < row.resources.registers:
            found[key] = row
    return list(found.values())


def faults(target: str, rows: list[KernelRow], shared: int) -> list[str]:
    """A line for each thing that is wrong."""
    return [
        f"{target}: {row.kernel.name} {row.tile} ({row.kernel.layer}, {row.kernel.dtype}) {fault}"
        for row in rows
        for fault in row.faults(shared)
    ]


def as_json(row: KernelRow) -> dict[str, Any]:
    """All that is known of a kernel."""
    kernel = row.kernel
    form = kernel.constants.get("FORMAT")
    return {
        "kernel": kernel.name,
        "layer": kernel.layer,
        "dtype": kernel.dtype,
        "tile": list(kernel.tile),
        "warps": kernel.compiled.metadata.num_warps,
        "constants": kernel.constants | {"FORMAT": form and form._asdict()},
        **asdict(row.resources),
        "instructions_per_weight": row.per_weight,
    }


def _tensor(own: Resources) -> str:
    kind = TENSOR_CORES.get(own.tensor_core_kind, own.tensor_core_kind)
    return f"{own.tensor_core} {kind}" if kind else ""


def _kib(size: int) -> str:
    return f"{size / KIB:.1f}" if 0 < size < KIB else f"{size / KIB:.0f}"


def _red(text: str, wrong: bool) -> str:
    return f"[red]{text}[/red]" if wrong else text
