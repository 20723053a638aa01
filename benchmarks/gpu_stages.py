"""The stages: what is run on a GPU host, and what of it, shortened, without a GPU. Standard library only."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_run import SECONDS, Stage

NAMES = (
    *("machine", "small", "capture", "peers", "bench", "suite-triton", "four-bit", "crossover", "memcheck"),
    *("suite", "bench-large", "bench-routing", "racecheck", "initcheck", "profile"),
)  # in their order: what matters most comes first, since the limit ends the last
ONLY_IF_ASKED = ("profile",)
MAIN_LAYERS = ("gpt-oss-20b", "qwen3-30b-a3b")
LARGE_LAYERS = ("mixtral-8x7b", "deepseek-v3")
OTHERS = ("native", "grouped_mm", "grouped_nf4")
SUITE = "moe_ref.conformance.suite"
MOST_WORKERS = 12
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
CUDA_TESTS = (
    "tests/triton/test_triton_cuda.py",
    "tests/executors/test_grouped_cuda.py",
    "tests/bench/test_bench_cuda.py",
)
QUICK = "test_exact_cases and not long_sums and not many_rows"  # of the suite, where kernels are interpreted
NO_GPU = "needs a GPU"


@dataclass(frozen=True)
class StagePlan:
    """What is to be run, with what.

    Attributes:
        python: the interpreter.
        root: the checkout.
        out: folder for results and logs.
        site: folder into which the wheels are installed.
        wheels: to install first.
        short: tiny, on the CPU, with interpreted kernels.
        profile: Hypothesis profile of the suite.
        chosen: names of the stages; none is all but those `ONLY_IF_ASKED`.
    """

    python: str
    root: Path
    out: Path
    site: Path
    wheels: tuple[Path, ...] = ()
    short: bool = False
    profile: str = "dev"
    chosen: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """Where the executors run."""
        return "cpu" if self.short else "cuda"


def stages(plan: StagePlan) -> list[Stage]:
    """The stages of a plan, the wheels first; shortened ones may take as long as a slow CPU needs."""
    known = {stage.name: stage for stage in (*_checks(plan), *_sanitizers(plan), *_benchmarks(plan), _profile(plan))}
    assert set(known) == set(NAMES)
    wanted = plan.chosen or [name for name in NAMES if name not in ONLY_IF_ASKED]
    found = [known[name] for name in NAMES if name in wanted]
    if plan.wheels:
        found.insert(0, _wheels(plan))
    if plan.short:
        found = [replace(stage, cap=math.inf) for stage in found]
    variables = environment(plan)
    return [replace(s, environment={**variables, **s.environment}, folder=plan.root) for s in found]


def environment(plan: StagePlan) -> dict[str, str]:
    """What every stage has: the wheels and the checkout, which need not be installed."""
    path = [str(plan.site), str(plan.root), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    return found | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if plan.short else found


def _wheels(plan: StagePlan) -> Stage:
    options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check")
    target = ("--target", str(plan.site), *map(str, plan.wheels))
    return Stage("wheels", (plan.python, "-m", "pip", "install", *options, *target), 120)


def _checks(plan: StagePlan) -> list[Stage]:
    machine = (plan.python, "benchmarks/gpu_machine.py", str(plan.out / "machine.json"))
    quick = ("-k", QUICK) if plan.short else ()
    names = OTHERS[:1] if plan.short else OTHERS
    return [
        Stage("machine", machine if plan.short else (*machine, "--need-cuda"), 60),
        Stage("small", (plan.python, "benchmarks/gpu_small.py", plan.device, "triton"), 60),
        _pytest(plan, "capture", CUDA_TESTS, 90),
        _pytest(plan, "suite-triton", _suite(plan, ("triton",), quick), 150),
        _pytest(plan, "suite", _suite(plan, names, quick), 100),
    ]


def _suite(plan: StagePlan, names: Sequence[str], quick: Sequence[str]) -> list[str]:
    chosen = [part for name in names for part in ("--executor", name)]
    device = ["--executor-device", plan.device, "--hypothesis-profile", "ci" if plan.short else plan.profile]
    return ["--pyargs", SUITE, *chosen, *device, *quick]


def _pytest(plan: StagePlan, name: str, arguments: Sequence[str], cap: float) -> Stage:
    """pytest with the plug-ins it needs and no others; warnings of other versions are shown and no failures."""
    workers = min(MOST_WORKERS, max(1, (os.cpu_count() or 1) - 2))
    plugins = ("-p", "hypothesispytest", "-p", "moe_ref.conformance.plugin", "-p", "no:cacheprovider")
    spread = () if plan.short else ("-p", "xdist", "-n", str(workers), "--dist", "worksteal")
    command = (plan.python, "-m", "pytest", "-q", "-W", "default", *plugins, *spread, *arguments)
    return Stage(name, command, cap, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"})


def _sanitizers(plan: StagePlan) -> list[Stage]:
    """Each tool on the small problems, every block of memory torch's own, so that none hides in a larger one."""
    program = (plan.python, "benchmarks/gpu_small.py", plan.device, "triton")
    return [
        Stage(
            tool,
            ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *program),
            90,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            needs=("compute-sanitizer",),
            skip=NO_GPU if plan.short else "",
        )
        for tool in ("memcheck", "racecheck", "initcheck")
    ]


def _benchmarks(plan: StagePlan) -> list[Stage]:
    compiled = (plan.python, "benchmarks/gpu_peers.py", *MAIN_LAYERS, *LARGE_LAYERS)
    skip = NO_GPU if plan.short else ""
    peers = Stage("peers", compiled, 120, skip=skip)
    many = ("--tokens", "512", "--tokens", "4096", "--tokens", "32768")
    forward = ("--direction", "forward", "--routing", "uniform", "--routing", "skewed", *many)
    return [
        peers,
        _bench(plan, "bench", MAIN_LAYERS, ("--routing", "real"), 260),
        _four_bit(plan),
        _crossover(plan),
        replace(_bench(plan, "bench-large", LARGE_LAYERS, ("--routing", "real"), 200), skip=skip),
        replace(_bench(plan, "bench-routing", MAIN_LAYERS, forward, 120), skip=skip),
    ]


def _bench(plan: StagePlan, name: str, layers: Sequence[str], options: Sequence[str], cap: float) -> Stage:
    if plan.short:
        layers = LARGE_LAYERS[:1]  # of few experts: quickest to interpret
        tiny = ("--scale", "256", "--tokens", "3", "--seconds", "0", "--rounds", "1", "--interpreted")
        options = (*options, *tiny)
    chosen = [part for layer in layers for part in ("--layer", layer)]
    where = ("--device", plan.device, "--limit", SECONDS, "--out", str(plan.out / name))
    return Stage(name, (plan.python, "-m", "executors", "bench", *chosen, *options, *where), cap)


def _four_bit(plan: StagePlan) -> Stage:
    short = ("--short",) if plan.short else ()
    program = (plan.python, "benchmarks/gpu_four_bit.py", plan.device, str(plan.out / "four-bit"), SECONDS, *short)
    return Stage("four-bit", program, 300)


def _crossover(plan: StagePlan) -> Stage:
    """Where decoding in the products stops to pay."""
    short = ("--layer", LARGE_LAYERS[0], "--weights", "mxfp4", "--rows", "1", "--direction", "forward")
    tiny = ("--scale", "256", "--seconds", "0", "--rounds", "1", "--interpreted")
    where = ("--limit", SECONDS, "--out", str(plan.out / "crossover"), "--device", plan.device)
    command = (plan.python, "-m", "executors", "crossover", *((*short, *tiny) if plan.short else ()), *where)
    return Stage("crossover", command, 300)


def _profile(plan: StagePlan) -> Stage:
    """Nsight Compute on the kernels of one call, clocks left as they are."""
    sections = [part for section in SECTIONS for part in ("--section", section)]
    watched = ("benchmarks/gpu_profile.py", plan.device, MAIN_LAYERS[1], "4096", "forward")
    command = ("ncu", "--clock-control", "none", "--profile-from-start", "off", *sections, plan.python, *watched)
    return Stage("profile", command, 120, needs=("ncu",), skip=NO_GPU if plan.short else "")
