"""docs/reliability.md: what is promised of files, and figures of the faults.

``PYTHONPATH=examples python tests/support/reliability.py`` injects every fault at many points (minutes), and writes the
figures and the page. With the argument ``page`` it writes the page from the figures that are there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import fault_readers
import fault_writers
from executors._compare.report import machine
from executors._files.whole import write_json, write_text
from fault_readers import READERS, Readings
from fault_writers import WRITERS, Tally

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
FIGURES = ROOT / "benchmarks" / "results" / "reliability.json"
BEGIN, END = "<!-- figures: PYTHONPATH=examples python tests/support/reliability.py -->", "<!-- end of figures -->"
POINTS = {"writer": 40, "slow writer": 25, "reader": 4000, "slow reader": 150}


def measure() -> dict[str, Any]:
    """Every fault of the lists, at many points."""
    writers, readers, losses = {}, {}, []
    for writer in WRITERS:
        tally = Tally()
        for fault in fault_writers.FAULTS:
            fault_writers.inject(writer, fault, POINTS["slow writer" if writer.slow else "writer"], tally)
        writers[writer.name], losses = dict(tally.injected), losses + tally.losses
        print(writer.name, tally.injected.total(), flush=True)
    for reader in READERS:
        found = Readings()
        for fault in fault_readers.FAULTS:
            fault_readers.inject(reader, fault, POINTS["slow reader" if reader.slow else "reader"], found)
        counts: tuple[Counter[str], ...] = (found.injected, found.refused, found.unseen)
        readers[reader.name] = {fault: [each[fault] for each in counts] for fault in fault_readers.FAULTS}
        losses += found.losses
        print(reader.name, found.injected.total(), flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {
        "commit": commit.stdout.strip(),
        "machine": machine(),
        "writers": writers,
        "readers": readers,
        "losses": losses,
    }


def figures(found: dict[str, Any]) -> str:
    """Tables and sums, as they stand on the page."""
    lines = ["| writer | " + " | ".join(fault_writers.FAULTS) + " |", "|---|" + "---:|" * len(fault_writers.FAULTS)]
    for name, counts in found["writers"].items():
        lines.append(f"| {name} | " + " | ".join(str(counts.get(fault, 0)) for fault in fault_writers.FAULTS) + " |")
    faults = fault_readers.FAULTS
    lines += ["", "| reader | " + " | ".join(faults) + " | refused | the same | other numbers |"]
    lines.append("|---|" + "---:|" * (len(faults) + 3))
    for name, counts in found["readers"].items():
        injected, refused, unseen = (sum(counts[fault][place] for fault in faults) for place in range(3))
        cells = [str(counts[fault][0]) for fault in faults] + [
            str(refused),
            str(injected - refused - unseen),
            str(unseen),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    total = injections(found)
    where = f"{found['machine']['processor']}, Python {found['machine']['python']}, torch {found['machine']['torch']}"
    lines += ["", f"**{total:,} faults, {len(found['losses'])} losses.** Commit {found['commit']}, {where}."]
    return "\n".join(lines)


def injections(found: dict[str, Any]) -> int:
    """All of them."""
    writers = sum(sum(counts.values()) for counts in found["writers"].values())
    return writers + sum(count[0] for counts in found["readers"].values() for count in counts.values())


def page(text: str, found: dict[str, Any]) -> str:
    """The page with the figures between its marks."""
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n\n{figures(found)}\n\n{END}{after}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:] != ["page"]:
        write_json(FIGURES, measure())
    write_text(PAGE, page(PAGE.read_text(), json.loads(FIGURES.read_text())))
