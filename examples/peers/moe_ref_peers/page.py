"""The table of peers and clauses, as Markdown and as a picture."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from moe_ref.conformance.reporting.ledger import CLAUSES

MARKS = {"holds": "+", "fails": "**x**", "not promised": "·", "not judged": " "}
COLOURS = {"holds": "#4c9f70", "fails": "#c8553d", "not promised": "#e4e4e4", "not judged": "#ffffff"}


def shown(results: dict[str, Any]) -> list[str]:
    """The clauses that some peer promises, in the specification's order."""
    judged = [own["clauses"] for own in results["peers"].values()]
    return [c for c in CLAUSES if any(own.get(c) in ("holds", "fails") for own in judged)]


def table(results: dict[str, Any]) -> str:
    """A row for each peer; a column for each clause that some peer promises."""
    clauses = shown(results)
    head = ["peer", *clauses, "also"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, own in results["peers"].items():
        if own["unavailable"]:
            lines.append(f"| `{name}` | " + " | ".join([" "] * len(clauses)) + f" | {own['unavailable']} |")
            continue
        marks = [MARKS[own["clauses"][clause]] for clause in clauses]
        lines.append(f"| `{name}` | " + " | ".join(marks) + f" | {', '.join(others(own)) or ' '} |")
    return "\n".join(lines) + "\n"


def others(own: dict[str, Any]) -> list[str]:
    """What a peer breaks that is no clause: errors that it raises, and behaviours."""
    keys = [part for key in own["failures"] for part in key.split(", ")]
    return sorted({key.removeprefix("the behaviour ") for key in keys if key not in CLAUSES})


def versions(results: dict[str, Any]) -> str:
    """All versions, in one line."""
    found: dict[str, str] = {}
    for own in results["peers"].values():
        found |= own["versions"]
    return ", ".join(f"{name} {value}" for name, value in sorted(found.items()))


def picture(results: dict[str, Any]) -> Figure:
    """The table, drawn."""
    clauses = shown(results)
    peers = {name: own for name, own in results["peers"].items() if not own["unavailable"]}
    figure = Figure(figsize=(2.8 + 0.33 * len(clauses), 2.0 + 0.33 * len(peers)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for row, own in enumerate(peers.values()):
        for column, clause in enumerate(clauses):
            state = own["clauses"][clause]
            axes.add_patch(_square(column, row, COLOURS[state]))
            if state == "fails":
                axes.text(column, row, "x", ha="center", va="center", color="white", fontsize=9)
    axes.set(xlim=(-0.5, len(clauses) - 0.5), ylim=(len(peers) - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(len(clauses)), clauses, fontsize=8)
    axes.set_yticks(range(len(peers)), [name.replace("_", " ") for name in peers], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles = [Patch(facecolor=c, edgecolor="#bbbbbb", label=name) for name, c in COLOURS.items()]
    told = f"moe-ref's suite, profile {results['profile']}; {results['machine']}; {results['date']}"
    axes.set_xlabel(f"{told}\n{versions(results)}", fontsize=6, color="#555555")
    figure.legend(handles=handles, ncols=4, loc="outside lower center", frameon=False, fontsize=8)
    return figure


def _square(column: float, row: float, colour: str) -> Rectangle:
    return Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, facecolor=colour, edgecolor="#cccccc", linewidth=0.5)
