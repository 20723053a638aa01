"""The findings: each script that this environment can run still reproduces its defect, and the page has them all."""

import re
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples" / "peers" / "findings").glob("*.py"))
PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
HERE = ("bitsandbytes", "jax", "peft", "torch", "transformers")  # packages of the development environment
OF_ONE_PROCESSOR = "bitsandbytes_partial_blocks", "bitsandbytes_strided_bytes"
STARTS_PROCESSES = ("transformers_empty_tp_plan",)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A script may seed torch; libraries may warn."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(own, id=own.stem, marks=[pytest.mark.nightly] if own.stem in STARTS_PROCESSES else [])
        for own in SCRIPTS
        if own.stem.split("_")[0] in HERE
    ],
)
def test_a_finding_is_still_there(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is gone, with a newer version, is taken off the page, or told with the versions that have it."""
    if script.stem in OF_ONE_PROCESSOR and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("seen with AVX-512 alone")
    argv = sys.argv
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert sys.argv is argv
    said = capsys.readouterr().out
    assert "observed" in said
    assert "right" in said
    assert ended.value.code == 0, f"gone: {said}"


def test_the_page_has_every_script_and_no_other() -> None:
    told = re.findall(r"^\[(\w+\.py)\]\(\.\./examples/peers/findings/(\w+\.py)\)$", PAGE, flags=re.MULTILINE)
    assert all(text == target for text, target in told)
    assert sorted(target for _, target in told) == [own.name for own in SCRIPTS]


def test_the_table_leads_to_every_finding() -> None:
    """By the anchors that a heading gets: lower case, spaces to hyphens, and no other signs."""
    headings = [
        re.sub(r"[^\w -]", "", own.lower()).replace(" ", "-")
        for own in re.findall(r"^### (.*)$", PAGE, flags=re.MULTILINE)
    ]
    assert re.findall(r"^\| \[\d+\]\(#([\w-]+)\)", PAGE, flags=re.MULTILINE) == headings


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda own: own.stem)
def test_a_script_names_versions_and_both_answers(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert "version" in text
    assert re.search(r"print\(\s*f?\"observed", text)
    assert re.search(r"print\(f?\"right", text)
    assert "moe_ref" not in text
    assert "executors import" not in text
