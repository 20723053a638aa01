"""``bench --ranks``: expert parallelism on processes of this machine."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import rank_programs as programs
from executors._bench.case import BenchCase
from executors._bench.layers import sized
from executors._bench.ranks.measure import RankRow
from executors._bench.ranks.parts import rows_of, token_counts
from executors._bench.ranks.processes import RankFailed, run_ranks
from executors._bench.ranks.table import heading, tables, to_one, to_peer
from executors._bench.routing import Load, batch
from executors._bench.settings import Settings
from executors._cli.app import app

WAYS = ["all_to_all slot", "all_to_all rank", "all_reduce slot", "all_reduce rank"]
SMALL = ("--layer", "gpt-oss-20b", "--scale", "64", "--tokens", "3", "--seconds", "0", "--rounds", "2")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_a_small_run(tmp_path: Path) -> None:
    """Both of transformers' ways, all of ours, and one process; every one judged."""
    result = run("--ranks", "2", *SMALL, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if not line.startswith("wrote"))
    found = json.loads((tmp_path / "bench-ranks.json").read_text())
    assert (tmp_path / "bench-ranks.png").stat().st_size > 10_000
    assert (found["ranks"], found["complete"], found["backend"]) == (2, True, "gloo")
    for case, overlap in zip(found["cases"], (["with overlap"], []), strict=True):
        by_name = {(row["name"], row["how"]): row for row in case["contenders"]}
        theirs = [("hf:grouped_mm", how) for how in ("all_to_all", "all_reduce")]
        ours = [("native", how) for how in [*WAYS[:2], *overlap, *WAYS[2:], "one, 1 thread", "one, 2 threads"]]
        assert list(by_name) == theirs + ours
        for (_, how), row in by_name.items():
            assert row["passed"], row
            assert len(row["seconds"]) == 2
            assert row["ranks"] == (1 if how.startswith("one") else 2)
            tensors = {"y"} if overlap else {"y", "x", "topk_weights", "gate_up_proj", "down_proj"}
            assert tensors <= set(row["max_z"])
        slot, one = by_name["native", WAYS[0]], by_name["native", "one, 1 thread"]
        ratio = slot["times_one_process"]["1"]
        low, high = sorted(a / b for a, b in zip(one["seconds"], slot["seconds"], strict=True))
        assert low <= ratio["low"] <= ratio["median"] <= ratio["high"] <= high


@pytest.mark.nightly
def test_what_cannot_run_has_one_row_that_says_why(tmp_path: Path) -> None:
    """An executor by name is an exit status of 1. transformers spreads experts only if ranks divide their number."""
    result = run("--ranks", "3", *SMALL, "--executor", "grouped_nf4", "--direction", "forward", "--out", str(tmp_path))
    assert result.exit_code == 1
    (case,) = json.loads((tmp_path / "bench-ranks.json").read_text())["cases"]
    rows = {row["name"]: (row["how"], row["reason"]) for row in case["contenders"]}
    assert rows["hf:grouped_mm"] == ("all ways", "E=32: must be a multiple of 3 ranks")
    assert rows["grouped_nf4"][0] == "all ways"
    assert "gate_up_proj is dense: must be" in rows["grouped_nf4"][1]


@pytest.mark.nightly
def test_four_bits_have_no_peers(tmp_path: Path) -> None:
    chosen = "--weights", "nf4", "--nested", "--direction", "forward_backward"
    result = run("--ranks", "2", *SMALL, *chosen, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    (case,) = json.loads((tmp_path / "bench-ranks.json").read_text())["cases"]
    assert [row["how"] for row in case["contenders"]] == [*WAYS, "one, 1 thread", "one, 2 threads"]
    assert {row["name"] for row in case["contenders"]} == {"grouped_nf4"}
    assert all(row["passed"] and set(row["max_z"]) == {"y", "x", "topk_weights"} for row in case["contenders"])
    assert "x hf" not in result.output.split("real routing")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "--ranks 0: must be from 1 to 64"),
        (["--ranks", "65"], "--ranks 65: must be from 1 to 64"),
        (["--ranks", "2", "--device", "cuda"], "--device cuda: must be left out with --ranks"),
        (["--ranks", "2", "--model", "MixtralForCausalLM"], "--ranks 2: must be left out with --model"),
        (["--ranks", "2", "--memory"], "--memory: must be left out with --ranks"),
        (["--ranks", "2", "--set", "hidden_size=8"], "--set hidden_size=8: must be left out with --ranks"),
        (["--ranks", "2", "--lora-rank", "0"], "--lora-rank 0: must be left out with --ranks"),
        (
            ["--ranks", "2", "--weights", "nf4", "--direction", "lora"],
            "--direction lora: must be left out with --ranks",
        ),
        (["--ranks", "2", "--executor", "grouped_nf4[fused]"], "--executor grouped_nf4[fused]: must be one of "),
        (["--ranks", "2", "--layer", "mine"], "--layer mine: must be one of "),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = run(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1


def test_a_rank_that_raises_is_named() -> None:
    with pytest.raises(RankFailed, match=r"^rank 1: MemoryError: out of memory$"):
        run_ranks(programs.raising, 2, 0, hear=print)


@pytest.mark.nightly
def test_a_rank_that_ends_is_named() -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 ended with exit status 3$"):
        run_ranks(programs.raising, 2, 3, hear=print)


@pytest.mark.nightly
def test_no_process_is_left_after_an_interrupt() -> None:
    told: list[int] = []

    def hear(process: int) -> None:
        told.append(process)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ranks(programs.sleeping, 2, hear=hear)
    with pytest.raises(ProcessLookupError):
        os.kill(told[0], 0)


def test_a_failed_rank_ends_the_command_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_given: Any, **_named: Any) -> None:
        raise RankFailed("rank 1: MemoryError: out of memory")

    monkeypatch.setattr("executors._bench.ranks.run.run_ranks", failing)
    result = run("--ranks", "2", *SMALL, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == "error: rank 1: MemoryError: out of memory\n"


@pytest.mark.nightly
@pytest.mark.parametrize("mutant", ["weight_gradient_lacks_one_row", "one_percent_more"])
def test_a_rank_that_is_wrong_is_seen(mutant: str) -> None:
    """And nothing that is wrong is timed. One process has the first rank's executor, which is right."""
    settings = Settings(
        ("mutant",), ("mixtral-8x7b",), (4,), ("real",), ("forward_backward",), scale=64, seconds=0.0, rounds=1
    )
    cases: list[BenchCase] = []

    def hear(said: Any) -> None:
        if isinstance(said, BenchCase):
            cases.append(said)

    run_ranks(programs.spoiled, 2, settings, mutant, hear=hear)
    (case,) = cases
    for row in case.rows:
        assert isinstance(row, RankRow)
        if row.function == "mutant":
            assert row.failed == row.spread
            assert bool(row.seconds) != row.failed


@pytest.mark.parametrize(("tokens", "ranks"), [(1, 3), (7, 2), (8, 4), (0, 2)])
def test_tokens_are_split_evenly(tokens: int, ranks: int) -> None:
    counts = token_counts(tokens, ranks)
    assert sum(counts) == tokens
    assert all(0 <= first - second <= 1 for first, second in pairwise(counts))


def test_parts_of_a_batch_are_the_batch() -> None:
    shape = sized("mixtral-8x7b", 64, "cpu")
    whole = batch("real", 7, 4, shape, "cpu", 0)
    parts = [rows_of(whole, rank, 3) for rank in range(3)]
    for name in ("x", "dy", "topk_ids", "topk_weights"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    starts = [0, 3, 5]
    judged = torch.cat([part.judged + start for part, start in zip(parts, starts, strict=True)])
    assert torch.equal(judged, whole.judged)
    assert all(leaf.is_leaf and leaf.requires_grad for part in parts for leaf in part.leaves().values())


def row_of(function: str, how: str, *seconds: float) -> RankRow:
    ours = not function.startswith("hf:")
    return RankRow(f"{function} {how}", ours, seconds=list(seconds), function=function, how=how)


def test_ratios_are_of_rounds_and_told_from_noise() -> None:
    """Over the same executor in one process; of peers over the first executor."""
    rows = [
        row_of("hf:grouped_mm", "all_to_all", 2.0, 2.0),
        row_of("native", "all_to_all slot", 1.0, 1.0),
        row_of("native", "one, 1 thread", 4.0, 4.0),
        row_of("numba", "all_to_all slot", 1.9, 1.9),
        row_of("numba", "one, 1 thread", 8.0, 8.0),
    ]
    case = BenchCase(
        sized("mixtral-8x7b", 64, "cpu"),
        8,
        "real",
        "forward",
        Load(1.0, 0, 0.5),
        8,
        list(rows),
        rows[0].name,
        [2.2, 2.2],
    )
    found = [to_one(case, row, 1) for row in rows]
    assert [None if ratio is None else ratio[0].median for ratio in found] == [
        2.0,
        4.0,
        None,
        pytest.approx(8 / 1.9),
        None,
    ]
    peers = [to_peer(case, row) for row in rows]
    assert [ratio and ratio[1] for ratio in peers] == [None, False, False, True, False]
    ((title, table),) = tables([case], 2)
    assert title.endswith("forward, real routing")
    assert all(len(line) <= 80 for line in heading(Settings(("native",), load=9.5), 64)[2:])
    assert [str(column.header) for column in table.columns][-3:] == ["x hf", "x 1", "x 2"]
