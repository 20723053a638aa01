"""The command that takes one layer out of a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from executors._cli.options import WIDTH, check_seed, checked, new_console, progress_bar, refuse, within
from executors.checkpoint import BadCheckpoint, Checkpoint, families
from executors.checkpoint import open as open_checkpoint
from executors.checkpoint.extraction import DTYPES, Extracted
from executors.checkpoint.extraction import extract as extracted


def extract(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A checkpoint: safetensors files and config.json (docs/checkpoints.md)."),
    ],
    layer: Annotated[
        str | None, typer.Option(metavar="LAYER", help="Its number, or what its keys begin with, as --list shows them.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The layer file to write.")] = Path("layer.safetensors"),
    show_list: Annotated[bool, typer.Option("--list", help="Only list the layers.")] = False,
    family: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="How to read it, where config.json's model_type is unknown.")
    ] = None,
    tokens: Annotated[int, typer.Option(callback=within(1), help="Hidden states to draw.")] = 64,
    seed: Annotated[int, typer.Option(callback=check_seed, help="Seed of the draw.")] = 0,
    hidden: Annotated[
        Path | None, typer.Option(metavar="FILE", help='Hidden states instead: a safetensors file with "x" [T, H].')
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="Round weights and hidden states; default: the checkpoint's own.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode weights in 4 bits, which no layer file holds.")
    ] = False,
) -> None:
    """Writes one layer of a checkpoint as a layer file.

    Reads that layer alone. Hidden states are normal numbers, each token divided by its root mean square, or those of
    --hidden; router logits are the router's own product of them. Then ``compare`` judges every executor on the file.
    """
    checked("--dtype", [dtype] if dtype else None, DTYPES)
    checked("--family", [family] if family else None, families())
    try:
        checkpoint = open_checkpoint(folder, family)
        if show_list:
            _print_layers(checkpoint)
            return
        if layer is None:
            numbers = ", ".join(str(each.index) for each in checkpoint.layers)
            refuse(f"--layer is missing: must be one of {numbers:.200}, or a prefix that --list shows")
        if not out.parent.is_dir():  # before the work, not after it
            refuse(f"--out {out}: must be a file in a folder that exists")
        started = time.monotonic()
        with progress_bar() as show:
            found = extracted(
                checkpoint,
                int(layer) if layer.isdecimal() else layer,
                tokens=tokens,
                seed=seed,
                hidden=hidden,
                dtype=dtype,
                decode=decode,
                progress=lambda done, total: show("reading tensors", done, total),
            )
            show("writing", 0, 0)
            _save(found, out)
    except BadCheckpoint as error:
        refuse(str(error))
    _print_written(found, out, time.monotonic() - started)


def _save(found: Extracted, out: Path) -> None:
    try:
        found.save(out)
    except OSError as error:
        refuse(f"--out {out}: must be a file that can be written: {error.strerror or error}")


def _print_layers(checkpoint: Checkpoint) -> None:
    table = Table(width=WIDTH)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("keys begin with", ratio=1, overflow="fold")
    table.add_column("experts", no_wrap=True)
    table.add_column("family", max_width=26, overflow="fold")
    for layer in checkpoint.layers:
        try:
            name = checkpoint.section(layer).name
        except BadCheckpoint:
            name = "unknown: needs --family"
        table.add_row(str(layer.index), escape(layer.prefix), layer.form, escape(name))
    new_console().print(table)


def _print_written(found: Extracted, out: Path, seconds: float) -> None:
    weights = found.weights
    sizes = f"{weights.num_experts} experts, H={weights.hidden_size}, I={weights.intermediate_size}"
    dtype = str(found.x.dtype).removeprefix("torch.")
    megabytes = out.stat().st_size / 1e6
    console = new_console()
    console.print(escape(f"{found.source}"))
    console.print(escape(f"{sizes}, {dtype}, {len(found.x)} tokens; {weights.config}"))
    console.print(escape(f"wrote {out} ({megabytes:.1f} MB, {seconds:.0f} s)"))
    console.print(escape(f"next: python -m executors compare {out}"))
