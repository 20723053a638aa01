"""The command that searches for faster tiles of the Triton kernels on this machine, and stores its choice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.markup import escape

from executors._bench.layers import LAYERS, BenchLayer, Shape, random_layer, with_adapters
from executors._bench.routing import KINDS, batch
from executors._cli.options import LARGEST_SEED, check_device, new_console, progress_bar, refuse, within
from executors._compare import report
from moe_ref.types import GATED, MoEConfig

if TYPE_CHECKING:
    from executors._tune.choice import Choice
    from executors._tune.workload import Workload

SCHEMA = 1
DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("concatenated", "interleaved")
FORWARD, WITH_BACKWARD = "forward", "forward_backward"
DEFAULT_TOKENS = (4096,)
DEFAULT_SECONDS = 120.0
SIZES = ("experts", "top_k", "hidden", "intermediate")


def tune(
    layer: Annotated[str | None, typer.Option(metavar="NAME", help=f"A model's layer: {', '.join(LAYERS)}.")] = None,
    experts: Annotated[int | None, typer.Option(callback=within(1), help="E, of a layer without a name.")] = None,
    top_k: Annotated[int | None, typer.Option(callback=within(1), help="K.")] = None,
    hidden: Annotated[int | None, typer.Option(callback=within(1), help="H.")] = None,
    intermediate: Annotated[int | None, typer.Option(callback=within(1), help="I.")] = None,
    activation: Annotated[str, typer.Option(help=f"{', '.join(GATED)}.")] = "swiglu",
    layout: Annotated[str, typer.Option(help="Of gate and up: concatenated or interleaved.")] = "concatenated",
    transposed: Annotated[bool, typer.Option("--transposed", help="Stored as (E, H, 2I) and (E, I, H).")] = False,
    rank: Annotated[int, typer.Option(callback=within(0), help="Of adapters beside frozen weights; 0: none.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    direction: Annotated[str, typer.Option(help="forward or forward_backward.")] = WITH_BACKWARD,
    tokens: Annotated[list[int] | None, typer.Option(callback=within(1), help="T; repeatable. Default: 4096.")] = None,
    routing: Annotated[str, typer.Option(help="real, uniform or skewed.")] = "real",
    seconds: Annotated[
        float, typer.Option(callback=within(0), help="How long to search, for all T together.")
    ] = DEFAULT_SECONDS,
    file: Annotated[Path | None, typer.Option(help="Store the choice there; default: where tuned=True looks.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Store nothing.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all figures there too.")] = None,
    device: Annotated[str | None, typer.Option(help="Which GPU, such as cuda:1.")] = None,
    seed: Annotated[int, typer.Option(callback=within(0, LARGEST_SEED), help="Seed of weights and inputs.")] = 0,
) -> None:
    """Searches for faster tiles of the Triton kernels, on this GPU, for a layer and numbers of tokens.

    Each product starts from the tile that ships with this package. Every tile tried must give the same results but for
    rounding, and win by more than noise; in the end so must all of them on the whole layer. The choice is stored, and
    used by executors.get("triton", tuned=True) alone. Ctrl-C ends the search and keeps what it has found. Exit status:
    0, 1 if the choice cannot be stored, 2 for bad arguments.
    """
    found_device = _check_machine(device)
    sizes = {"experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate}
    shape = _shape(layer, sizes, activation, layout, transposed)
    for option, value, allowed in (
        ("--dtype", dtype, DTYPES),
        ("--direction", direction, (FORWARD, WITH_BACKWARD)),
        ("--routing", routing, KINDS),
    ):
        _check(option, value, allowed)
    if json is not None and not json.parent.is_dir():
        refuse(f"--json {json}: must be in a folder that exists")
    every = _check_tokens(tuple(dict.fromkeys(tokens or DEFAULT_TOKENS)), shape)
    from executors._triton import tuned as _tuned
    from executors._tune import choice as tune_choice

    target = file or _tuned.default_path()
    console, choices, stored = new_console(), [], True
    console.print(escape(f"{_sizes(shape)}, {dtype}, {direction}, {_tuned.device_name(torch.device(found_device))}"))
    owner = _drawn(shape, found_device, seed, rank)
    for count in every:
        problem = _problem(owner, count, routing, found_device, seed, dtype, direction)
        choice = _chosen(problem, count, seconds / len(every))
        choices.append(choice)
        console.print(f"\n{escape(tune_choice.heading(choice))}")
        console.print(tune_choice.table(choice))
        if not choice.changed:
            console.print("no tiles are faster on the whole layer than those that ship: nothing to store")
        elif not dry_run:
            stored = _store(target, choice) and stored
        if choice.interrupted:
            break
    if json is not None:
        arguments = {
            "layer": shape.name,
            "dtype": dtype,
            "direction": direction,
            "routing": routing,
            "seconds": seconds,
        }
        content = {"schema": SCHEMA, "machine": report.machine(), "arguments": arguments | {"seed": seed, "rank": rank}}
        report.write_json(json, content | {"choices": [tune_choice.as_json(choice) for choice in choices]})
        console.print(escape(f"wrote {json}"), soft_wrap=True)
    if not stored:
        raise typer.Exit(1)


def _check_machine(device: str | None) -> str:
    """The device to tune on."""
    try:
        from executors._triton import interpreter
        from executors._triton.device import INTERPRETED
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        refuse('tune needs triton: pip install "moe-ref[triton]"')
    if INTERPRETED:
        interpreter.mend()
    elif not torch.cuda.is_available():
        refuse("tune needs a GPU; TRITON_INTERPRET=1 goes through it without one, and its choice means nothing")
    found = device or ("cpu" if INTERPRETED else "cuda")
    check_device(found)
    if not INTERPRETED and torch.device(found).type != "cuda":
        refuse(f"--device {found}: must be a GPU")
    return found


def _shape(name: str | None, sizes: dict[str, int | None], activation: str, layout: str, transposed: bool) -> Shape:
    given = {f"--{size.replace('_', '-')}": value for size, value in sizes.items()}
    if name is not None:
        named = [f"{option} {value}" for option, value in given.items() if value is not None]
        if named:
            refuse(f"{named[0]}: must be left out with --layer {name}")
        _check("--layer", name, tuple(LAYERS))
        return LAYERS[name]
    missing = [option for option, value in given.items() if value is None]
    if missing:
        refuse(f"{missing[0]}: must be given, as {', '.join(given)}, or --layer NAME instead of them")
    _check("--activation", activation, GATED)
    _check("--layout", layout, LAYOUTS)
    experts, top_k, hidden, intermediate = (value or 0 for value in sizes.values())
    if top_k > experts:
        refuse(f"--top-k {top_k}: must be at most --experts {experts}")
    config = MoEConfig(top_k, activation=activation, gate_up_layout=layout)  # type: ignore[arg-type]
    return Shape("unnamed", experts, hidden, intermediate, config, transposed=transposed)


def _sizes(shape: Shape) -> str:
    named = {"E": shape.experts, "K": shape.top_k, "H": shape.hidden, "I": shape.intermediate}
    return f"{shape.name}: {', '.join(f'{letter}={size}' for letter, size in named.items())}"


def _check(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        refuse(f"{option} {value}: must be one of {', '.join(allowed)}")


def _check_tokens(tokens: tuple[int, ...], shape: Shape) -> tuple[int, ...]:
    """Refuses two T of which one choice would replace the other."""
    from executors._triton.tuned import bucket_of

    seen: dict[int, int] = {}
    for count in tokens:
        bucket = bucket_of(count * shape.top_k, shape.experts)
        if bucket in seen:
            refuse(f"--tokens {count}: must be left out, as one choice serves it and --tokens {seen[bucket]}")
        seen[bucket] = count
    return tokens


def _drawn(shape: Shape, device: str, seed: int, rank: int) -> BenchLayer:
    with progress_bar() as show:
        owner = random_layer(shape, device, seed, lambda done, total: show("drawing weights", done, total))
        return with_adapters(owner, rank, seed) if rank else owner


def _problem(
    owner: BenchLayer, tokens: int, routing: str, device: str, seed: int, dtype: str, direction: str
) -> Workload:
    from executors._tune.workload import Workload

    drawn = batch(routing, tokens, tokens, owner.shape, device, seed)
    return Workload(owner, drawn, getattr(torch, dtype), direction == WITH_BACKWARD)


def _chosen(problem: Workload, tokens: int, seconds: float) -> Choice:
    """Searches under a bar that shows the time left."""
    from executors._tune.choice import choose

    started, told = time.monotonic(), ["the shipped tiles"]

    def tell(text: str) -> None:
        told.append(text)
        taken = min(time.monotonic() - started, seconds)
        show(f"T={tokens}: {text}, {seconds - taken:.0f} s left", taken, seconds)

    with progress_bar() as show, problem.guard(), torch.no_grad():
        try:
            return choose(problem, tokens, seconds, tell)
        except torch.OutOfMemoryError:
            refuse(f"--tokens {tokens}: must be fewer, or the layer smaller: the GPU's memory does not hold it")
        except torch.AcceleratorError as error:  # after which this process can do nothing more on it
            refuse(f"the GPU failed at {told[-1]}: {str(error).splitlines()[0]}")


def _store(path: Path, choice: Choice) -> bool:
    """Stores a choice and says where; or says why not, and prints it instead."""
    from json import dumps

    from executors._triton import tuned as _tuned
    from executors._triton import tuned_file
    from executors._tune.choice import told

    console = new_console()
    try:
        aside = tuned_file.save(path, choice.key, choice.chosen, told(choice))
    except OSError as error:
        entry = tuned_file.as_entry(choice.key, choice.chosen, told(choice))
        console.print(escape(dumps(entry)), soft_wrap=True)
        typer.echo(f"error: {path}: cannot be written: {error.strerror}; the choice is printed above", err=True)
        return False
    if aside is not None:
        console.print(escape(f"what was in {path} could not be understood: it is in {aside} now"), soft_wrap=True)
    use = 'used by executors.get("triton", tuned=True)'
    if path != _tuned.default_path():
        use += f" from {_tuned.default_path()} only"
    console.print(escape(f"stored in {path}; {use}"), soft_wrap=True)
    return True
