"""A report on executors of which some are wrong, and its picture: ``python tests/support/report_page.py`` takes it.

The suite's results were recorded with profile quick (``record``); the layer is judged and timed anew. `my_loop` adds a
token's slots in x's dtype, as docs/porting.md has it, and `one_percent_more` says what it does.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from typer.testing import CliRunner, Result

import executors
from browser import Browser, browsing
from executors._cli.app import app
from executors.layer_file import save_layer
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.mutants import mutants
from plugin_runs import install, run_pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "bench" / "report_results.json"
PICTURE = ROOT / "docs" / "images" / "report.png"
WRONG = {"my_loop": "combine_in_x_dtype", "one_percent_more": "one_percent_more"}
RIGHT = ("native", "grouped_mm", "numba")
MODULE = """
import executors
from executors.layer_file import save_layer
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.mutants import mutants

my_loop, one_percent_more = (lambda name=name: mutants(executors.get("native"))[name] for name in {names})
"""


def save_small_layer(path: Path) -> None:
    """A layer that is judged in no time."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = MoEWeights(normal(4, 16, 16), normal(4, 16, 8), config=MoEConfig(2))
    save_layer(path, normal(32, 16), normal(32, 4), weights)


@contextmanager
def registered() -> Iterator[None]:
    """The wrong executors, in this process."""
    for name, mutant in WRONG.items():
        executors.register(name, lambda mutant=mutant: mutants(executors.get("native"))[mutant])
    try:
        yield
    finally:
        for name in WRONG:
            executors.unregister(name)


def make(path: Path, *arguments: str) -> Result:
    """Writes the page by the command."""
    with registered():
        return CliRunner().invoke(app, ["report", "--results", str(RESULTS), "--out", str(path), *arguments])


def opened_cell(browser: Browser, page: Path, width: int, *, dark: bool = False) -> None:
    """Opens the page and clicks the cell of C1 and my_loop."""
    browser.open(page, width, dark=dark)
    browser.click("a[href='#e3-C1']")


def take(browser: Browser, page: Path, path: Path) -> None:
    """The picture of docs/report.md: from the top to a little below the example."""
    opened_cell(browser, page, 1400)
    end = browser.value("document.querySelector('#e3-C1').getBoundingClientRect().bottom + scrollY")
    browser.picture(path, int(end) + 64)


def record() -> None:
    """Runs the suite on all of these executors, and keeps the results."""
    with tempfile.TemporaryDirectory() as folder:
        outside = Path(folder) / "outside"
        outside.mkdir()
        source = MODULE.format(names=(*WRONG.values(),))
        for name in WRONG:
            install(outside, name, f"planted:{name}", source)
        chosen = [option for name in (*RIGHT, *WRONG) for option in ("--executor", name)]
        suite = ("--pyargs", "moe_ref.conformance.suite", "--hypothesis-profile", "quick", "-c", "/dev/null")
        print(run_pytest(outside, *suite, *chosen, "-q", "--results", str(RESULTS)).stdout)


if __name__ == "__main__":
    if "--record" in sys.argv:
        record()
    with tempfile.TemporaryDirectory() as folder, browsing() as browser:
        page = Path(folder) / "report.html"
        print(make(page).output)
        take(browser, page, PICTURE)
