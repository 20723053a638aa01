"""Where decoding in the products stops to pay: points, curves and the rule; the command, interpreted. Nothing timed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

pytest.importorskip("triton")

from executors._bench import run as bench
from executors._bench.contenders import Contender
from executors._bench.layers import LAYERS
from executors._bench.routing import Batch
from executors._cli import crossover as command
from executors._cli.app import app
from executors._cli.options import new_console
from executors._crossover import plot, report
from executors._crossover import run as crossover_run
from executors._crossover.points import CrossoverCurve, CrossoverPoint, Loss, best_bound, loss
from executors._triton.device import INTERPRETED

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not INTERPRETED, reason="its times would count on a GPU"),
]

TINY = ("--layer", "mixtral-8x7b", "--scale", 256, "--seconds", 0.0, "--rounds", 1, "--interpreted")
PNG = b"\x89PNG\r\n\x1a\n"


def run(out: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in ("crossover", "--out", out, *arguments)])


def point(rows: float, ratio: float, noise: float = 1.02, **fields: Any) -> CrossoverPoint:
    """Decoded takes ``ratio`` times as long as fused; a contender differs from itself by ``noise``."""
    fused = [1e-3 * rows * factor for factor in (1.0, 1.01, 0.99)]
    seconds = {"fused": fused, "decoded": [ratio * s for s in fused], "torch": [3 * s for s in fused]}
    again = [s * n for s, n in zip(fused, (1.0, noise, 1 / noise), strict=True)]
    seconds["bf16"] = [2 * s for s in fused]
    return CrossoverPoint(rows, int(4 * rows), seconds, "fused", again, {"fused": 1.5}, **fields)


def curve(ratios: dict[float, float], **fields: Any) -> CrossoverCurve:
    points = [point(rows, ratio) for rows, ratio in ratios.items()]
    values = {"shape": LAYERS["gpt-oss-20b"], "weights": "nf4", "direction": "forward", "bound": 6.0, "complete": True}
    return CrossoverCurve(points=points, **(values | fields))


def plan(**fields: Any) -> crossover_run.CrossoverPlan:
    values: dict[str, Any] = {
        "layers": ("gpt-oss-20b", "qwen3-30b-a3b"),
        "formats": crossover_run.DEFAULT_FORMATS,
        "directions": crossover_run.DIRECTIONS,
        "rows": command.ROWS,
        "routing": "real",
        "seconds": 0.0,
        "rounds": 1,
        "limit": None,
        "scale": 1,
        "device": "cpu",
        "seed": 0,
        "rank": 16,
        "interpreted": False,
    }
    return crossover_run.CrossoverPlan(**(values | fields))


def test_a_way_wins_only_outside_the_noise() -> None:
    assert point(4, 1.5).winner == "fused"
    assert point(4, 0.7).winner == "decoded"
    assert point(4, 1.5, noise=2.0).winner == ""
    assert point(4, 0.7, noise=2.0).winner == ""
    assert CrossoverPoint(4, 16, {"fused": [1.0]}).winner == ""


def test_crossover_is_where_fused_won_last_before_decoded_wins() -> None:
    assert curve({1: 3.0, 2: 2.0, 4: 1.0, 8: 0.5}).crossover() == (2, 8)
    assert curve({1: 1.0, 2: 2.0, 4: 1.0, 8: 1.5, 16: 1.0}).crossover() == (8, None)
    assert curve({1: 2.0, 2: 0.5, 4: 2.0}).crossover() == (1, 2)  # what it wins later does not count
    assert curve({1: 0.9, 2: 0.5}).crossover() == (None, 1)
    assert curve({}).crossover() == (None, None)


def test_the_rule_loses_least_over_all_curves() -> None:
    first = curve({1: 4.0, 2: 2.0, 4: 1.0, 8: 0.5})
    assert best_bound([first]) == 4  # of equal ones the largest
    assert loss([first], 4) == Loss(0.0, 0.0)
    assert loss([first], 1) == Loss(pytest.approx(2 ** (1 / 4) - 1), pytest.approx(1.0))
    assert loss([first], 8).worst == pytest.approx(1.0)
    assert best_bound([first, curve({4: 3.0, 8: 1.5})]) == 4
    assert best_bound([first, curve({4: 3.0, 8: 3.0})]) == 8
    assert best_bound([curve({1: 0.5, 2: 0.5})]) == 0
    assert best_bound([]) is best_bound([curve({})]) is None


def test_suggestion_is_a_line_of_the_table_of_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Some GPU")
    curves = [curve({1: 4.0, 2: 2.0, 8: 0.5, 16: 0.5}), curve({1: 0.1}, complete=False)]
    lines = report.suggestion(plan(), curves)
    assert lines[-1] == '    "interpreter": Rule(2, "measured: Some GPU"),'
    assert "over 1 of 2 curves" in lines[0]
    assert "up to 2 rows: 0.0% on average, 0.0% at most" in lines[1]
    assert "most rows that were measured" in report.suggestion(plan(), [curve({1: 4.0, 2: 2.0})])[-3]
    assert report.suggestion(plan(interpreted=True), curves) == ["no rule is suggested: the kernels were interpreted"]
    assert report.suggestion(plan(), curves[1:]) == ["no rule is suggested: no curve is complete"]
    found = report.as_json(plan(), curves, [], True, "abc", 1.0)
    assert (found["suggested"]["rows"], found["commit"], found["rule"]["rows"]) == (2, "abc", 6)
    assert (found["curves"][0]["fused_up_to"], found["curves"][0]["decoded_from"]) == (2, 8)
    assert found["curves"][0]["points"][0]["over_fused"]["decoded"]["median"] == pytest.approx(4.0)


def test_tables_fit_80_columns_and_the_picture_is_drawn(tmp_path: Path) -> None:
    ratios = {float(rows): (40 / rows) ** 0.4 for rows in command.ROWS}
    curves = [
        curve(ratios, shape=LAYERS[layer], weights=weights, direction=direction)
        for layer in ("gpt-oss-20b", "qwen3-30b-a3b")
        for weights in crossover_run.DEFAULT_FORMATS
        for direction in crossover_run.DIRECTIONS
    ]
    curves[0].points[3] = point(8.0, 12.3, noise=20.0, reasons={"torch": "waits"})
    curves[0].points[4] = point(16.0, 1.0, failure="fused and decoded differ in y")
    console = new_console()
    with console.capture() as captured:
        console.print(report.table(curves[0], False))
    text = captured.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for words in ("~12.3", "FAIL", "4096", "1024"):
        assert words in text
    assert max(map(len, report.heading(plan()))) <= 80
    assert report.found(curves[1], False) == "crossover: fused wins up to 32 rows, decoded wins from 64 on"
    assert report.remarks(curves) == [
        "torch not timed: waits (gpt-oss-20b in nf4, forward, rows 8)",
        "FAILED fused and decoded differ in y (gpt-oss-20b in nf4, forward, rows 16)",
    ]
    plot.plot(tmp_path / "crossover.png", curves, plan())
    assert (tmp_path / "crossover.png").read_bytes().startswith(PNG)


@pytest.mark.nightly
def test_command_goes_through_it_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executors._bench.timing.SLOWEST_S", {"cpu": math.inf})  # however busy this machine is
    result = run(tmp_path, *TINY, "--rows", 1, "--weights", "mxfp4", "--direction", "lora", "--commit", "abc")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert "no rule is suggested: the kernels were interpreted" in lines
    assert "Rule(" not in result.stdout
    assert (tmp_path / "crossover.png").read_bytes().startswith(PNG)
    found = json.loads((tmp_path / "crossover.json").read_text())
    assert found["complete"]
    assert (found["commit"], found["suggested"], found["interpreted"]) == ("abc", None, True)
    (own,) = found["curves"]
    (only,) = own["points"]
    assert (own["direction"], own["weights"], own["complete"]) == ("lora", "mxfp4", True)
    assert (only["T"], only["rows"], only["failure"], only["winner"]) == (4, 1.0, "", None)
    assert only["contenders"].keys() == only["max_z"].keys() == {"fused", "decoded", "torch", "bf16"}
    assert all(0 < z < 6 for z in only["max_z"].values())


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor, Batch], Tensor]) -> None:
    """The fused way gives something else."""
    true = crossover_run.our_contenders

    def ours(*arguments: Any) -> list[Contender]:
        return [_spoiled(own, spoil) if own.name == crossover_run.BOTH[0] else own for own in true(*arguments)]

    monkeypatch.setattr(crossover_run, "our_contenders", ours)


def _spoiled(own: Contender, spoil: Callable[[Tensor, Batch], Tensor]) -> Contender:
    assert own.call is not None
    call = own.call
    return Contender(own.name, True, lambda given: spoil(call(given), given), interpreted=True)


def _every_token(y: Tensor, given: Batch) -> Tensor:
    return y * 1.25


def _no_judged_token(y: Tensor, given: Batch) -> Tensor:
    factor = torch.full((len(y), 1), 1.25, dtype=y.dtype)
    factor[given.judged] = 1.0
    return y * factor


@pytest.mark.parametrize(
    ("spoil", "rows", "message"),
    [(_every_token, 1, "grouped_nf4[fused]: Y1: "), (_no_judged_token, 2, "fused and decoded differ in y")],
)
def test_a_wrong_way_is_told_and_not_timed(
    spoil: Any, rows: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, spoil)
    result = run(tmp_path, *TINY, "--rows", rows, "--weights", "mxfp4", "--direction", "forward")
    assert result.exit_code == 1, result.output
    assert f"FAILED {message.split(': ')[0]}" in result.stdout
    last = json.loads((tmp_path / "crossover.json").read_text())["curves"][0]["points"][-1]
    assert last["failure"].startswith(message.split(": ")[0])
    assert "fused" not in last["contenders"]


def test_limit_keeps_what_there_is(tmp_path: Path) -> None:
    result = run(tmp_path, *TINY, "--limit", 0)
    assert result.exit_code == 0, result.output
    assert "mixtral-8x7b in nf4: left out, the limit of 0 s had passed" in result.stdout
    found = json.loads((tmp_path / "crossover.json").read_text())
    assert (found["curves"], found["complete"]) == ([], True)
    assert not (tmp_path / "crossover.png").exists()


def test_a_layer_without_room_is_left_out_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room\nmore")

    monkeypatch.setattr(crossover_run, "random_layer", full)
    result = run(tmp_path, *TINY, "--weights", "nf4")
    assert result.exit_code == 0, result.output
    assert "mixtral-8x7b in nf4: left out, not enough memory: no room\n" in result.stdout


def test_bad_arguments_exit_with_2_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_case", None)  # nothing is measured
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        (("--layer", "odd"), "--layer odd: must be one of gpt-oss-20b, "),
        (("--weights", "dense"), "--weights dense: must be one of nf4, nf4-nested, fp4, mxfp4"),
        (("--direction", "forward_backward"), "--direction forward_backward: must be one of forward, lora"),
        (("--rows", "0"), "--rows 0: must be at least 1"),
        (("--routing", "odd"), "--routing odd: must be one of real, uniform, skewed"),
        (("--limit", "-1"), "--limit -1.0: must be at least 0"),
        ((), "TRITON_INTERPRET=1: must go with --interpreted, since times mean nothing then"),
        (("--interpreted", "--device", "quantum"), "--device quantum: must be a device that torch has here"),
        (("--interpreted", "--out", file), f"--out {file}: must be a folder that can be written"),
    ):
        result = run(tmp_path, *arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    monkeypatch.setattr("executors._triton.device.INTERPRETED", False)
    for arguments, message in (
        ((), "crossover needs a GPU; TRITON_INTERPRET=1 and --interpreted go through it without one"),
        (("--interpreted",), "--interpreted: must go with TRITON_INTERPRET=1"),
    ):
        result = run(tmp_path, *arguments)
        assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")
