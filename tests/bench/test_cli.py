"""The command line: what it prints, writes, and exits with."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import executors
from executors import __main__ as program
from executors._cli.app import app
from executors._cli.options import new_console
from executors._compare import plot, report
from executors._compare.measure import peak_memory
from executors._compare.run import CompareRow
from executors._files.whole import write_json
from executors.layer_file import bundled_layer, save_layer
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.judgement.faults import Judgement
from moe_ref.conformance.judgement.gates import Verdict
from moe_ref.conformance.mutants import mutants

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A small layer file."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    weights = MoEWeights(normal(4, 16, 16), normal(4, 16, 8), down_proj_bias=normal(4, 16), config=MoEConfig(2))
    path = tmp_path / "small.safetensors"
    save_layer(path, normal(32, 16), torch.randn(32, 4, generator=generator), weights)
    return path


@pytest.fixture
def unavailable() -> Iterator[str]:
    """An executor that this machine cannot run."""

    def needs_a_gpu() -> executors.Executor:
        raise executors.Unavailable("needs a GPU of compute capability 9.0 or more, and there is none on this machine")

    executors.register("needs_a_gpu", needs_a_gpu)
    yield "needs_a_gpu"
    executors.unregister("needs_a_gpu")


class Odd:
    """``native``, but for its forward pass."""

    name = "odd"
    capabilities = executors.Capabilities()

    def __init__(self, forward: Callable[..., torch.Tensor]) -> None:
        self.forward = forward

    def __call__(self, *arguments: object) -> torch.Tensor:
        return self.forward(executors.get("native"), *arguments)

    def check(self, _x: torch.Tensor, _weights: MoEWeights) -> None: ...


def raises(*_: object) -> torch.Tensor:
    raise RuntimeError("illegal\nmemory access")


def refuses(*_: object) -> torch.Tensor:
    raise executors.Unsupported("H=16: must be a multiple of 64")


def changes_x(native: executors.Executor, x: torch.Tensor, *rest: object) -> torch.Tensor:
    x.data.mul_(1.5)
    return native(x, *rest)  # type: ignore[arg-type]


@pytest.fixture
def odd(request: pytest.FixtureRequest) -> Iterator[str]:
    executors.register("aaa", lambda: Odd(request.param))  # sorted before native, so it runs first
    yield "aaa"
    executors.unregister("aaa")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def compare(layer: Path, *arguments: object) -> Result:
    """Memory, which takes a process for each executor, is not measured."""
    with mock.patch("executors._compare.run.peak_memory", return_value=1.5):
        return run("compare", layer, "--out", layer.parent / "out", "--repeats", 1, *arguments)


def test_right_executor_passes(layer: Path) -> None:
    result = compare(layer)
    assert result.exit_code == 0, result.output
    assert "T=32, E=4, K=2, H=16, I=8, bfloat16" in result.output
    assert [line for line in result.output.splitlines() if "native" in line and "pass" in line]


def test_wrong_executor_fails_and_the_clause_is_named(layer: Path, one_percent_more: str) -> None:
    result = compare(layer)
    assert result.exit_code == 1
    assert "FAIL" in result.output
    assert "C1, E1, E2" in result.output
    rows = {r["executor"]: r for r in json.loads((layer.parent / "out" / "compare.json").read_text())["executors"]}
    assert rows["native"]["passed"]
    assert not rows[one_percent_more]["passed"]


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (raises, "raised RuntimeError: illegal memory access"),
        (changes_x, "E4: x was changed in place"),
        (lambda native, *a: native(*a).float(), "T2: y is float32, but must be bfloat16"),
    ],
    indirect=["odd"],
)
def test_one_faulty_executor_spoils_no_other(layer: Path, odd: str, message: str) -> None:
    result = compare(layer)
    assert result.exit_code == 1, result.exception
    assert f"{odd}: {message}" in result.output
    rows = {r["executor"]: r for r in json.loads((layer.parent / "out" / "compare.json").read_text())["executors"]}
    assert rows["native"]["passed"]
    assert rows[odd]["failure"] == message


@pytest.mark.parametrize("odd", [refuses], indirect=True)
def test_executor_that_refuses_the_call_is_a_row_with_its_reason(layer: Path, odd: str) -> None:
    result = compare(layer)
    assert result.exit_code == 0, result.exception
    assert "not run: H=16" in " ".join(result.output.split())
    assert compare(layer, "--executor", odd).exit_code == 1


def test_long_name_leaves_room_for_the_verdict(layer: Path) -> None:
    name = "an_executor_of_a_plug_in_with_a_long_name_v2"
    executors.register(name, lambda: executors.get("native"))
    try:
        result = compare(layer, "--executor", name)
    finally:
        executors.unregister(name)
    assert "pass" in result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 80


def test_executor_without_routing_is_judged_in_float64(tmp_path: Path) -> None:
    class NoRouting(Odd):
        capabilities = executors.Capabilities(routing=False)

        def experts(self, x: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
            return executors.get("native").experts(x, **rest)  # type: ignore[arg-type]

    weights = MoEWeights(torch.randn(4, 16, 16).double(), torch.randn(4, 16, 8).double(), config=MoEConfig(2))
    save_layer(tmp_path / "layer", torch.randn(32, 16).double(), torch.randn(32, 4), weights)
    executors.register("without_routing", lambda: NoRouting(raises))
    try:
        result = compare(tmp_path / "layer", "--executor", "without_routing")
    finally:
        executors.unregister("without_routing")
    assert result.exit_code == 0, result.output
    assert "judged from ids on: it has no routing of its own" in result.output


def test_json_holds_no_infinity(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"z": [float("inf"), 1.0]})
    assert path.read_text() == '{\n "z": [\n  null,\n  1.0\n ]\n}\n'


def test_peak_memory_follows_the_tokens() -> None:
    """It counts the call's own memory: not code loaded, nor caches filled, by the first call."""
    peaks = [peak_memory("native", bundled_layer(), 0, "cpu", tokens) for tokens in (64, 1024)]
    assert peaks[0] is not None
    assert peaks[1] is not None
    assert peaks[0] < peaks[1] < 40


def clamped_layer(path: Path, limit: float, scale: float) -> Path:
    """In bf16, with many pre-activations at the clamp's limit, where the derivative jumps."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, by: float) -> torch.Tensor:
        return (by * torch.randn(shape, generator=generator)).bfloat16()

    config = MoEConfig(2, scoring="topk_softmax", alpha=1.702, limit=limit, up_offset=1.0)
    weights = MoEWeights(normal(4, 128, 64, by=1 / 8), normal(4, 64, 64, by=1 / 8), config=config)
    save_layer(path, normal(256, 64, by=scale), torch.randn(256, 4, generator=generator), weights)
    return path


@pytest.mark.parametrize(("limit", "scale"), [(1.0, 1.0), pytest.param(7.0, 3.0, marks=pytest.mark.nightly)])
def test_tokens_at_the_clamp_s_limit_reject_nobody(tmp_path: Path, limit: float, scale: float) -> None:
    result = compare(clamped_layer(tmp_path / "clamped.safetensors", limit, scale))
    assert result.exit_code == 0, result.output
    assert "left out of the gradients, within rounding of the clamp's limit: " in result.output


def test_unrepeatable_executor_fails(layer: Path) -> None:
    executors.register("not_repeatable", lambda: mutants(executors.get("native"))["not_repeatable"])
    try:
        result = compare(layer, "--executor", "not_repeatable")
    finally:
        executors.unregister("not_repeatable")
    assert result.exit_code == 1
    assert "C1" in result.output


def test_unavailable_executor_is_a_row_with_its_reason(layer: Path, unavailable: str) -> None:
    result = compare(layer)
    assert result.exit_code == 0
    assert "needs a GPU" in result.output
    assert compare(layer, "--executor", unavailable).exit_code == 1


def test_table_fits_80_columns(layer: Path, one_percent_more: str, unavailable: str) -> None:
    for result in (compare(layer), run("list"), run("explain", layer)):
        assert max(map(len, result.output.splitlines()[:-1])) <= 80
        assert "\x1b" not in result.output


def test_reasons_stand_below_the_table_in_full(layer: Path, unavailable: str) -> None:
    """Also beside a name that is longer than its column."""
    name, why = (
        f"{unavailable}_{'x' * 40}",
        "needs a GPU of compute capability 9.0 or more, and there is none on this machine",
    )

    def refused() -> executors.Executor:
        raise executors.Unavailable(why)

    executors.register(name, refused)
    try:
        for result in (run("list"), run("explain", layer)):
            assert max(map(len, result.output.splitlines()[:-1])) <= 80
            assert "…" not in result.output
            assert "not usable:" in result.output
            joined = " ".join(result.output.split())
            assert f"{unavailable}: {why} {name}: {why}" in joined
        assert f"{name}: not run: {why}" in " ".join(compare(layer).output.split())
    finally:
        executors.unregister(name)


def test_the_version_is_told() -> None:
    result = run("--version")
    assert (result.exit_code, result.output.split()[0]) == (0, "moe-ref")
    assert "torch" in result.output


def odd_row(name: str, **failures: str) -> CompareRow:
    z = {tensor: np.linspace(-7, 7, 99) for tensor in ("y", "x", "down_proj", "topk_weights")}
    verdicts = [Verdict(tensor, 7.0, failure=failures.get(tensor, "")) for tensor in z]
    judgement = Judgement((*verdicts, Verdict("y", 3.0)), z=z)
    return CompareRow(name, judgement=judgement, seconds={"forward": [0.1], "forward_backward": [0.2]}, peak_mib=1.0)


RMS, GAIN = "x: rms z=1.001, but must be at most 1", "down_proj: gain=+1e-2, but must be 0 +- 1e-3: gain z 7.5, limit 6"


def test_the_worst_tensor_is_told_in_full_and_the_others_by_name() -> None:
    rows = [odd_row("one", x=RMS, down_proj=GAIN), odd_row("two", y="y(0,)=1, but must be 2 +- 0: max z 7.0, limit 6")]
    one, two = report.below(rows)
    assert one == f"one: D1: d{RMS}; also d down_proj (gain z 7.5)"
    assert two.startswith("two: C1, E1, E2: y(0,)=1")
    assert "also" not in two
    told = new_console()
    with told.capture() as captured:
        told.print(report.table(rows))
    assert "FAIL D1" in captured.get()
    assert captured.get().count("in gradients") == 1
    assert captured.get().count("in y") == 1


@pytest.mark.parametrize("count", [1, 5])
def test_the_picture_cuts_no_label_and_names_its_lines(count: int) -> None:
    rows = [odd_row(f"{'m' * 20}_{n}", x=RMS, down_proj=GAIN) for n in range(count)]
    figure = plot.drawn(rows, "title")
    figure.draw_without_rendering()
    left, right = figure.subfigs
    (legend,) = left.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"{row.name}: FAIL" for row in rows]
    for axes in (*left.axes, *right.axes):
        box = axes.xaxis.label.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
    said = [text.get_text() for axes in left.axes for text in axes.texts]
    assert said == ["FAIL rms z 1.001"] * count + ["FAIL gain z 7.5"] * count


def test_json_has_all_figures(layer: Path) -> None:
    run("compare", layer, "--out", layer.parent / "out", "--repeats", 1, "--seed", 3, "--executor", "native")
    found = json.loads((layer.parent / "out" / "compare.json").read_text())
    assert found["schema"] == 1
    assert {"processor", "cores", "threads", "python", "torch", "numpy"} <= found["machine"].keys()
    assert (found["layer"]["T"], found["layer"]["K"], len(found["layer"]["sha256"])) == (32, 2, 64)
    assert sum(found["layer"]["group_sizes"]) == 64
    assert found["arguments"]["seed"] == 3
    (row,) = found["executors"]
    assert {t["name"] for t in row["tensors"]} == {
        "y",
        "x",
        "router_logits",
        "gate_up_proj",
        "down_proj",
        "down_proj_bias",
    }
    assert all(0 < t["max_z"] < 6 for t in row["tensors"])
    assert len(row["seconds"]["forward"]) == len(row["seconds"]["forward_backward"]) == 1
    assert row["peak_mib"] is not None  # 0 if so small a layer finds room in what the process has already


def test_picture_is_written(layer: Path, one_percent_more: str, unavailable: str) -> None:
    compare(layer)
    assert (layer.parent / "out" / "compare.png").read_bytes().startswith(PNG)


def test_only_some_tokens(layer: Path) -> None:
    assert "T=5," in compare(layer, "--tokens", 5).output


def test_bad_arguments_exit_with_2_and_one_line(layer: Path, tmp_path: Path) -> None:
    cases = [
        (("compare", tmp_path / "none"), "must be a file that exists"),
        (("explain", __file__), "must be a safetensors file"),
        (("compare", layer, "--executor", "nativ"), "--executor nativ: must be one of grouped_mm, grouped_nf4, native"),
        (("compare", layer, "--out", layer), f"--out {layer}: must be a folder that can be written"),
        (("compare", layer, "--device", "meta"), "--device meta: must be a device that torch has here"),
        (("compare", layer, "--device", "quantum"), "--device quantum: must be a device that torch has here"),
    ]
    for arguments, message in cases:
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_list_and_explain_say_why_not(layer: Path, unavailable: str) -> None:
    for result in (run("list"), run("explain", layer)):
        assert result.exit_code == 0
        assert "needs a GPU" in result.output
    assert "auto chooses native" in run("explain", layer).output


COMMANDS = ["list", "explain", "compare", "extract", "bench", "crossover", "kernels", "plan", "tune", "report"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_all_commands_with_whole_sentences(arguments: list[str]) -> None:
    lines = run(*arguments).output.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)
    assert program.__doc__ is not None
    assert " | ".join(COMMANDS) in program.__doc__


def test_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "executors", "list"], capture_output=True, text=True, check=True)
    assert "native" in done.stdout


def test_missing_extra_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from executors.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == 'the command line needs typer: pip install "moe-ref[all]"\n'
