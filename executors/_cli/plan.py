"""The command that plans expert parallelism on many devices, without one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from executors._bench.layers import DENSE, LAYERS, Storage
from executors._bench.routing import KINDS
from executors._cli import options as cli
from executors._files.whole import write_json

if TYPE_CHECKING:
    from executors._bench.quantised import QuantType
    from executors._plan.run import PlanSettings

RANKS = "8,64,512"
MOST_RANKS = 1024
MOST_TOKENS = 2**15
WEIGHTS: dict[str, tuple[QuantType, bool] | None] = {
    "bf16": None,
    "nf4": ("nf4", False),
    "nf4-nested": ("nf4", True),
    "mxfp4": ("mxfp4", False),
}
INSIDE = {"a100": "nvlink3", "h100": "nvlink4", "h200": "nvlink4"}


@dataclass(frozen=True)
class PlanOptions:
    """What can be asked of a plan."""

    layer: Annotated[str, typer.Option(metavar="NAME", help=f"A model's layer: {', '.join(LAYERS)}.")] = "deepseek-v3"
    ranks: Annotated[str, typer.Option(metavar="W,W,...", help="Numbers of ranks.")] = RANKS
    routing: Annotated[str, typer.Option(help="real, uniform or skewed.")] = "real"
    tokens: Annotated[int, typer.Option(callback=cli.within(1, MOST_TOKENS), help="T of each rank.")] = 4096
    weights: Annotated[
        str, typer.Option(help=f"Of the projections: {', '.join(WEIGHTS)}; those in 4 bits are frozen.")
    ] = "bf16"
    card: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(INSIDE)}.")] = "h200"
    inside: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Links in a node: nvlink3, nvlink4 or nvlink5. Default: the card's."),
    ] = None
    across: Annotated[
        str,
        typer.Option(metavar="NAME", help="Links between nodes: infiniband-ndr, ethernet-400g or ethernet-100g."),
    ] = "infiniband-ndr"
    ranks_per_node: Annotated[int, typer.Option(callback=cli.within(1), help="GPUs of a node.")] = 8
    seed: cli.SeedOption = 0
    json: cli.JsonOption = None
    plot: cli.PlotOption = None

    def plan(self) -> PlanSettings:
        """The plan, checked."""
        from executors._counts.cards import CARDS
        from executors._plan import links
        from executors._plan.costs import Nodes
        from executors._plan.run import PlanSettings
        from executors._plan.world import layer_of

        cli.checked("--layer", [self.layer], list(LAYERS))
        cli.checked("--routing", [self.routing], KINDS)
        cli.checked("--weights", [self.weights], list(WEIGHTS))
        cli.checked("--card", [self.card], list(INSIDE))
        cli.checked("--inside", [self.inside] if self.inside else None, list(links.INSIDE))
        cli.checked("--across", [self.across], list(links.ACROSS))
        inside = links.INSIDE[self.inside or INSIDE[self.card]]
        return PlanSettings(
            layer_of(self.layer),
            self.tokens,
            self._ranks(),
            self.routing,
            self.weights,
            self._storage(),
            Nodes(CARDS[self.card], inside, links.ACROSS[self.across], self.ranks_per_node),
            self.seed,
        )

    def _ranks(self) -> tuple[int, ...]:
        """Each once, in increasing order."""
        found = set()
        for word in map(str.strip, self.ranks.split(",")):
            if not (word.isascii() and word.isdecimal() and 1 <= int(word) <= MOST_RANKS):
                cli.refuse(
                    f"--ranks {word or repr(word)}: must be a whole number from 1 to {MOST_RANKS}; commas part several"
                )
            found.add(int(word))
        return tuple(sorted(found))

    def _storage(self) -> Storage:
        from executors._bench.quantised import Quantisation

        how = WEIGHTS[self.weights]
        return DENSE if how is None else Storage(Quantisation(*how).weight_bytes, frozen=True)


@cli.with_options(PlanOptions)
def plan(options: PlanOptions) -> None:
    """Plans expert parallelism on many devices, without one.

    For a layer on so many ranks: the bytes that each sends and receives, forward and backward, how evenly work is
    spread, memory, and the least times of links and products; and where all_to_all beats all_reduce. Bytes are exact:
    experts are chosen for real tokens, executors.parallel itself plans what travels, and its collectives are counted
    under torch's fake process group. Times are bounds from data sheets. Prints tables. Exit status: 0, or 2 for bad
    arguments.
    """
    asked = options.plan()
    from executors._plan import report
    from executors._plan.run import make_plan

    with cli.progress_bar() as show:
        found = make_plan(asked, show)
    console = cli.new_console()
    cli.print_lines(report.heading(asked))
    for table in report.tables(asked, found):
        console.print(table)
    console.print(report.notes(), style="dim")
    for table in report.verdict(found):
        console.print(table)
    console.print(report.VERDICT, style="dim")
    cli.print_lines(report.crossings(found))
    written = []
    if options.json is not None:
        write_json(options.json, report.as_json(asked, found))
        written.append(options.json)
    if options.plot is not None:
        from executors._plan import plot as picture  # matplotlib takes a second to import: only where it is needed

        picture.plot(options.plot, asked, found)
        written.append(options.plot)
    cli.print_lines([f"wrote {path}" for path in written])
