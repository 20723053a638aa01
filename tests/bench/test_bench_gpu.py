"""`make bench-gpu`: all of it, shortened, without a GPU; and what becomes of stages that fail or take too long."""

import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "benchmarks" / "gpu.py"
PNG = b"\x89PNG\r\n\x1a\n"
SLEEPS = "import time; time.sleep(60)"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DRIVER.parent))


def drive(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, str(DRIVER), *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def python(program: str, **options: Any) -> Any:
    from gpu_run import Stage

    return Stage("stage", (sys.executable, "-c", program), 60, **options)


CHECKS = {"machine", "small", "capture", "suite-triton", "suite"}
BENCHMARKS = {"bench", "four-bit", "crossover"}
WITHOUT_A_GPU = {"memcheck", "racecheck", "initcheck", "peers", "bench-large", "bench-routing"}


def shortened(out: Path, run: set[str], skipped: set[str]) -> None:
    """Stages that a CPU allows run and pass; the others are skipped aloud."""
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    done = drive("--short", "--out", out, "--limit", 10_000, "--stages", ",".join(run | skipped))
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary(out)
    assert found["complete"]
    assert found["short"]
    assert {stage["name"]: stage["status"] for stage in found["stages"]} == {
        **dict.fromkeys(run, "passed"),
        **dict.fromkeys(skipped, "skipped"),
    }
    assert all(stage["said"] == "needs a GPU" for stage in found["stages"] if stage["status"] == "skipped")
    assert max(map(len, done.stdout.splitlines()[-len(run | skipped) - 2 : -1])) <= 80


def test_all_stages_are_shortened_below() -> None:
    from gpu_stages import StagePlan, stages

    plan = StagePlan("py", ROOT, ROOT, ROOT, short=True)
    assert {stage.name for stage in stages(plan)} == CHECKS | BENCHMARKS | WITHOUT_A_GPU


@pytest.mark.nightly
def test_checks_shortened(tmp_path: Path) -> None:
    shortened(tmp_path, CHECKS, WITHOUT_A_GPU)
    assert json.loads((tmp_path / "machine.json").read_text())["packages"]["torch"]
    assert "skipped" in (tmp_path / "capture.log").read_text()
    assert "triton: its kernels were interpreted" in (tmp_path / "suite-triton.log").read_text()


@pytest.mark.nightly
def test_benchmarks_shortened(tmp_path: Path) -> None:
    shortened(tmp_path, BENCHMARKS, set())
    check_bench(tmp_path / "bench")
    check_four_bit(tmp_path / "four-bit" / "mxfp4-training")
    (curve,) = json.loads((tmp_path / "crossover" / "crossover.json").read_text())["curves"]
    assert [point["failure"] for point in curve["points"]] == [""]
    assert (tmp_path / "crossover" / "crossover.png").read_bytes().startswith(PNG)


def check_bench(folder: Path) -> None:
    """The interpreted executor was judged and run, and has no figures."""
    import executors

    found = json.loads((folder / "bench.json").read_text())
    assert found["complete"]
    directions = [case["direction"] for case in found["cases"]]
    assert directions == ["forward", "forward_backward"]
    for case in found["cases"]:
        rows = {row["name"]: row for row in case["contenders"]}
        triton = rows["triton"]
        assert triton["interpreted"]
        assert "tflops" not in triton
        backward = executors.get("triton").capabilities.backward
        assert triton["passed"] == (case["direction"] == "forward" or backward)
        assert rows["native"]["tflops"] > 0
        assert rows["hf:grouped_mm"]["passed"]
    for picture in ("bench.png", "roofline.png"):
        assert (folder / picture).read_bytes().startswith(PNG)


def check_four_bit(folder: Path) -> None:
    """Each path is a contender that is right, and so is the layer that was decoded before."""
    found = json.loads((folder / "bench.json").read_text())
    assert found["complete"]
    (case,) = found["cases"]
    assert case["direction"] == "lora"
    rows = {row["name"]: row for row in case["contenders"]}
    for name in ("grouped_nf4[fused]", "grouped_nf4[decoded]", "grouped_nf4[torch]", "triton[bf16]", "torch:loop"):
        assert rows[name]["passed"], name
    assert rows["bnb:loop"]["reason"] == "bitsandbytes has no MXFP4"


def test_bad_arguments_exit_with_2_and_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        (("--stages", "bench,odd"), "--stages odd: must be some of machine,small,"),
        (("--limit", "0"), "--limit 0: must be more than 0 seconds, and finite"),
        (("--limit", "nan"), "--limit nan: must be more than 0 seconds, and finite"),
        (("--limit", "inf"), "--limit inf: must be more than 0 seconds, and finite"),
        (("--profile", "odd"), "--profile odd: must be dev, ci or nightly"),
        (("--wheels", empty), f"--wheels {empty}: must be a folder with wheels"),
        (("--out", file), f"--out {file}: must be a folder that can be written"),
        (("--limit", "soon"), "argument --limit: invalid float value: 'soon'"),
    ):
        done = drive(*arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.startswith(f"error: {message}")
        assert len(done.stderr.splitlines()) == 1


def test_wheels_come_before_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel is installed into a folder of its own, is seen by the stages, and is gone afterwards."""
    folder, out, temporary = (tmp_path / name for name in ("wheels", "out", "temporary"))
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with zipfile.ZipFile(folder / "brought_along-1.5-py3-none-any.whl", "w") as wheel:
        info = "brought_along-1.5.dist-info"
        wheel.writestr("brought_along.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: brought-along\nVersion: 1.5\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    done = drive("--short", "--stages", "machine", "--wheels", folder, "--out", out, "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "machine.json").read_text())["packages"]["brought-along"] == "1.5"
    found = summary(out)
    assert [stage["name"] for stage in found["stages"]] == ["wheels", "machine"]
    assert found["commit"] == "abc"
    assert found["stages"][0]["command"].startswith("python -m pip install ")
    assert "--target SITE" in found["stages"][0]["command"]
    assert str(ROOT) not in (out / "summary.json").read_text()
    assert list(temporary.iterdir()) == []


def test_failing_stage_stops_nobody_and_gives_exit_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu
    from gpu_run import Stage

    stages = [
        Stage("bad", (sys.executable, "-c", "print('seen'); raise SystemExit(3)"), 60),
        Stage("missing", ("no-such-program",), 60),
        Stage("needing", ("x",), 60, needs=("no-such-program",)),
        Stage("good", (sys.executable, "-c", "print('=== fine ===')"), 60, {"A": "b"}),
    ]
    monkeypatch.setattr(gpu, "stages", lambda plan: stages)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    found = {stage["name"]: stage for stage in summary(tmp_path)["stages"]}
    assert {name: stage["status"] for name, stage in found.items()} == {
        "bad": "failed",
        "missing": "failed",
        "needing": "skipped",
        "good": "passed",
    }
    assert (found["bad"]["exit_status"], found["bad"]["said"]) == (3, "seen")
    assert found["needing"]["said"] == "no-such-program is not on the PATH"
    assert found["good"]["said"] == "fine"


def test_ended_from_outside_it_keeps_what_there_is(tmp_path: Path) -> None:
    """SIGTERM during the second stage: that stage is ended too, and the summary tells of the first."""
    command = [sys.executable, str(DRIVER), "--short", "--stages", "machine,small", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        while driver.stdout.readline() != "small ...\n":
            assert driver.poll() is None
        driver.terminate()
        driver.stdout.read()
    assert driver.returncode == 130
    found = summary(tmp_path)
    assert not found["complete"]
    assert [stage["name"] for stage in found["stages"]] == ["machine"]


def test_late_stage_is_ended_with_its_children(tmp_path: Path) -> None:
    from gpu_run import LATE, run

    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]); print(p.pid, flush=True)"
    )
    started = time.monotonic()
    outcome = run(python(f"{parent}; {SLEEPS}"), tmp_path / "log", 3.0)
    assert time.monotonic() - started < 30
    assert outcome.status == LATE
    assert outcome.failed
    status = Path(f"/proc/{(tmp_path / 'log').read_text().split()[0]}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.1)


def test_no_stage_is_ended_on_a_slow_cpu() -> None:
    """Shortened stages check that all still works; how fast is no question there."""
    from gpu_stages import StagePlan, stages

    plans = (StagePlan("py", ROOT, ROOT, ROOT, short=short) for short in (True, False))
    short, full = ([stage.cap for stage in stages(plan)] for plan in plans)
    assert set(short) == {math.inf}
    assert all(map(math.isfinite, full))


def test_stages_after_the_limit_are_skipped_aloud(tmp_path: Path) -> None:
    from gpu_run import run_all

    (outcome,) = run_all([python("raise AssertionError")], tmp_path, 5.0, lambda _: None)
    assert (outcome.status, outcome.said) == ("skipped", "the limit of 5 s was reached")


def test_a_stage_s_own_work_ends_before_the_stage(tmp_path: Path) -> None:
    from gpu_run import SECONDS, Stage, run

    for timeout, seconds in ((260.0, "220"), (30.0, "15")):
        outcome = run(
            Stage("stage", (sys.executable, "-c", "import sys; print(sys.argv[1])", SECONDS), 1),
            tmp_path / "l",
            timeout,
        )
        assert outcome.said == seconds


def test_on_a_gpu_everything_is_asked_for(tmp_path: Path) -> None:
    """The commands of a run that has no GPU here: options that the programs they call know."""
    import gpu_four_bit
    from gpu_stages import NAMES, ONLY_IF_ASKED, StagePlan, stages
    from typer.testing import CliRunner

    from executors._cli.app import app

    found = {stage.name: stage for stage in stages(StagePlan(sys.executable, ROOT, tmp_path, tmp_path / "site"))}
    assert list(found) == [name for name in NAMES if name not in ONLY_IF_ASKED]
    assert not any(stage.skip for stage in found.values())
    benches = [stage for name, stage in found.items() if name.startswith("bench")]
    assert len(benches) == 3
    for stage in benches:
        arguments = [part.replace("{seconds}", "0") for part in stage.command[3:]]
        arguments[arguments.index("cuda")] = "quantum"  # refused, after all other arguments were read
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "--device quantum: must be a device that torch has here" in result.stderr
    for arguments in gpu_four_bit.runs(short=False).values():
        result = CliRunner().invoke(app, ["bench", *arguments, "--device", "quantum"])
        assert "--device quantum: must be a device that torch has here" in result.stderr
    assert found["four-bit"].command[1:3] == ("benchmarks/gpu_four_bit.py", "cuda")
    crossing = [part.replace("{seconds}", "0") for part in found["crossover"].command[3:]]
    result = CliRunner().invoke(app, [*crossing, "--layer", "odd"])
    assert "--layer odd: must be one of" in result.stderr
    for name in ("memcheck", "racecheck", "initcheck"):
        assert found[name].command[:3] == ("compute-sanitizer", "--tool", name)
        assert found[name].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    every = [part for name in ("suite", "suite-triton") for part in found[name].command]
    assert {"triton", "native", "grouped_mm", "grouped_nf4", "cuda"} <= set(every)
    for stage in stages(StagePlan(sys.executable, ROOT, tmp_path, tmp_path / "site", chosen=NAMES)):
        for part in stage.command:
            if part.endswith(".py"):
                assert (ROOT / part).exists()


def test_runs_in_4_bits_share_the_time_and_one_that_fails_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_four_bit

    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=int("mxfp4-decoding" in command[-1]))

    monkeypatch.setattr(gpu_four_bit.subprocess, "run", run)
    assert gpu_four_bit.main("cuda", str(tmp_path), "600") == 1
    assert [command[command.index("--limit") + 1] for command in commands] == ["100", "120", "150", "200", "300", "600"]
    assert len({command[-1] for command in commands}) == 6
    assert "5 of 6 runs done; failed or left out: mxfp4-decoding" in capsys.readouterr().out
    assert gpu_four_bit.main("cuda", str(tmp_path), "0") == 1
    assert len(commands) == 6
    assert "nf4-decoding: left out, the limit of 0 s had passed" in capsys.readouterr().out


def test_the_call_that_is_profiled(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    import gpu_profile

    gpu_profile.main("cpu", "mixtral-8x7b", "3", "forward", "256")
    assert capsys.readouterr().out == "called triton on mixtral-8x7b, T=3, forward\n"


def test_processes_share_what_liger_chooses_among() -> None:
    from gpu_peers import with_share

    def autotune(configs: list[int], key: list[str]) -> tuple[list[int], list[str]]:
        return configs, key

    shares = [with_share(autotune, number, 3)([0, 1, 2, 3], key=["H"]) for number in range(3)]
    assert shares == [([0, 3], ["H"]), ([1], ["H"]), ([2], ["H"])]
    assert with_share(autotune, 2, 3)([7], key=[]) == ([7], [])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (["SHORT=1"], [".venv/bin/python", "--short", "bench-results/gpu-short"]),
        (["STAGES=bench", "LIMIT=60", "PYTHON=py", "WHEELS=none"], ["py ", "--stages 'bench'", "--limit 60"]),
    ],
)
def test_make_calls_it(variables: list[str], expected: list[str]) -> None:
    command = ["make", "--dry-run", "--old-file=.venv/.ready", "bench-gpu", *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "benchmarks/gpu.py --out" in done.stdout
    for part in expected:
        assert part in done.stdout
    assert "--wheels" not in done.stdout
