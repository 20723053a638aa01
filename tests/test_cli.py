"""The command line: what it prints, writes, and exits with."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import executors
from executors._cli.app import app
from executors._cli.layer_file import save_layer
from moe_ref import MoEConfig, MoEWeights
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
def one_percent_more() -> Iterator[str]:
    """A wrong executor, for as long as the test runs."""
    name = "one_percent_more"
    executors.register(name, lambda: mutants(executors.get("native"))[name])
    yield name
    executors.unregister(name)


@pytest.fixture
def unavailable() -> Iterator[str]:
    """An executor that this machine cannot run."""

    def needs_a_gpu() -> executors.Executor:
        raise executors.Unavailable("needs a GPU of compute capability 9.0 or more, and there is none on this machine")

    executors.register("needs_a_gpu", needs_a_gpu)
    yield "needs_a_gpu"
    executors.unregister("needs_a_gpu")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def compare(layer: Path, *arguments: object) -> Result:
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


def test_unavailable_executor_is_a_row_with_its_reason(layer: Path, unavailable: str) -> None:
    result = compare(layer)
    assert result.exit_code == 0
    assert "needs a GPU" in result.output
    assert compare(layer, "--executor", unavailable).exit_code == 1


def test_table_fits_80_columns(layer: Path, one_percent_more: str, unavailable: str) -> None:
    for result in (compare(layer), run("list"), run("explain", layer)):
        assert max(map(len, result.output.splitlines()[:-1])) <= 80
        assert "\x1b" not in result.output


def test_json_has_all_figures(layer: Path) -> None:
    compare(layer, "--seed", 3)
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
    assert row["peak_mib"] > 0


def test_picture_is_written(layer: Path, one_percent_more: str, unavailable: str) -> None:
    compare(layer)
    assert (layer.parent / "out" / "compare.png").read_bytes().startswith(PNG)


def test_only_some_tokens(layer: Path) -> None:
    assert "T=5," in compare(layer, "--tokens", 5).output


def test_bad_arguments_exit_with_2_and_one_line(layer: Path, tmp_path: Path) -> None:
    cases = [
        (("compare", tmp_path / "none"), "must be a file that exists"),
        (("explain", __file__), "must be a safetensors file"),
        (("compare", layer, "--executor", "nativ"), "--executor nativ: must be one of native"),
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


@pytest.mark.parametrize("command", [[], ["compare"], ["list"], ["explain"]])
def test_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "executors", "list"], capture_output=True, text=True, check=True)
    assert "native" in done.stdout


def test_missing_extra_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from executors.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == 'the command line needs typer: pip install "moe-ref[cli,conformance]"\n'
