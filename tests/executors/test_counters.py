"""What torch's counters and profiler see of an executor: the operations of its products, and names to recognise."""

import importlib.util
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import executors
from dense_cases import EVERYTHING, PROBLEM, inputs_of
from executors import _after_import
from executors._after_import import after_import
from executors._base import operator as _operator
from executors._pipeline.loop import LoopProducts
from executors._pipeline.operator import PipelineOperator
from forward_cases import CASES, directions, layer_of, leaves_of
from moe_ref.conformance.judgement.call import Inputs, call
from moe_ref.conformance.problems.problem import Problem

K = 2
UP, DOWN = 2 * 12 * K * 16 * 16, 2 * 12 * K * 16 * 8  # of PROBLEM: 2 T K 2I H, 2 T K H I


def counted(function) -> int:  # type: ignore[no-untyped-def]
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as mode:
        function()
    return mode.get_total_flops()


def counts(name: str, problem: Problem, **options: object) -> tuple[int, int]:
    """Of a forward and a backward pass."""
    executor = CASES[name].executor() if not options else executors.get(name, **options)
    inputs, made = inputs_of(problem), []
    return counted(lambda: made.append(call(executor, inputs))), counted(lambda: made[0].backward(inputs.dy))


def loop(inputs: Inputs) -> Tensor:
    """The layer as a loop over experts that autograd differentiates; the weight multiplies what experts are given."""
    x, weights = inputs.x, inputs.weights
    assert inputs.router_logits is not None
    y = torch.zeros_like(x)
    for expert in range(weights.num_experts):
        rows, _ = (inputs.topk_ids == expert).nonzero(as_tuple=True)
        scaled = x[rows] * inputs.router_logits[rows, expert, None]
        gate, up = (scaled @ weights.gate_up_proj[expert].t()).chunk(2, dim=-1)
        y = y.index_add(0, rows, (gate.sigmoid() * up) @ weights.down_proj[expert].t())
    return y


def test_as_torch_counts_a_loop() -> None:
    """Every slot names an expert. Both passes: forward, and gradients of rows and matrices."""
    inputs, made = inputs_of(PROBLEM), []
    forward = counted(lambda: made.append(loop(inputs)))
    backward = counted(lambda: made[0].backward(inputs.dy))
    assert counts("native", PROBLEM) == (forward, backward) == (UP + DOWN, 2 * (UP + DOWN))


@pytest.mark.parametrize("name", CASES)
def test_every_executor_counts_the_same(name: str) -> None:
    """By hand, with adapters of ranks 2 and 3; what is in 4 bits has no gradient."""
    packed = CASES[name].problem.quant_type
    own = {"quant_type": packed, "blocksize": 32, "hidden": 32, "intermediate": 32} if packed else {}
    problem = replace(EVERYTHING, **own) if "triton" not in name else replace(EVERYTHING, **own, tokens=3)  # type: ignore[arg-type]
    slots, hidden, width = problem.tokens * K, problem.hidden, problem.intermediate
    up, down = 2 * slots * 2 * width * hidden, 2 * slots * hidden * width
    up_a, up_b, down_a, down_b = (2 * slots * n for n in (2 * hidden, 2 * 2 * width, 3 * width, 3 * hidden))
    layer = up + down + up_a + up_b + down_a + down_b
    matrices = 0 if packed else up + down
    factors = up_a + up_b + down_a + down_b + up_a + down_a  # rows A^T is computed anew for the gradient of B
    assert counts(name, problem) == (layer, layer + matrices + factors)


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ({"gate_up_proj", "down_proj"}, UP + DOWN),
        ({"x", "router_logits", "gate_up_proj", "gate_up_proj_bias"}, DOWN),
        ({"x", "gate_up_proj", "down_proj", "gate_up_proj_bias"}, DOWN),  # the weights' gradient
        ({"x", "router_logits", "gate_up_proj", "down_proj", "gate_up_proj_bias"}, 0),
        ({"x", "router_logits"}, UP + 2 * DOWN),
    ],
)
def test_only_what_is_needed_is_counted(frozen: set[str], expected: int) -> None:
    assert counts("native", replace(PROBLEM, frozen=frozenset(frozen)))[1] == expected


def test_the_first_factor_alone_needs_what_the_second_gives_back() -> None:
    """Of rank 2, on gate_up_proj: dh, and of the factor B^T dz and its gradient."""
    given = replace(PROBLEM, gate_up_rank=2)
    only = frozenset(leaves_of(inputs_of(given))) - {"gate_up_lora_a"}
    assert counts("native", replace(given, frozen=only))[1] == DOWN + 2 * (2 * 12 * K * 2 * 16)


def test_what_is_computed_anew_is_counted() -> None:
    assert counts("native", PROBLEM, recompute=True) == (UP + DOWN, UP + 2 * (UP + DOWN))
    assert counts("native", replace(PROBLEM, post_expert_norm=True)) == (UP + DOWN, DOWN + 2 * (UP + DOWN))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, at the first jvp
def test_tangents_are_counted() -> None:
    inputs = inputs_of(PROBLEM)
    leaves, layer = leaves_of(inputs), layer_of(executors.get("native"), inputs)
    along = directions(leaves)
    for names, expected in (
        (["x"], 2 * (UP + DOWN)),
        (["down_proj"], UP + 2 * DOWN),
        (["gate_up_proj"], 2 * (UP + DOWN)),
    ):
        some = {own: leaves[own] for own in names}

        def of_some(some: dict[str, Tensor]) -> Tensor:
            return layer(leaves | some)

        found = counted(lambda: torch.func.jvp(of_some, (some,), ({own: along[own] for own in some},)))  # noqa: B023
        assert found == UP + DOWN + expected


@pytest.mark.parametrize("name", CASES)
def test_the_profiler_names_the_operators(name: str) -> None:
    inputs = inputs_of(CASES[name].problem)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call(CASES[name].executor(), inputs).backward(inputs.dy)
    names = {event.key for event in seen.key_averages() if event.key.startswith("moe_ref::")}
    own = {"auto": "native", "auto, 4 bits": "grouped_nf4", "slices": "sliced_probe"}.get(name, name.partition(",")[0])
    routing = {"moe_ref::triton_route", "moe_ref::triton_route_backward"} if own == "triton" else {"moe_ref::choose"}
    assert names == {f"moe_ref::{own}", f"moe_ref::{own}_backward"} | routing


def test_the_counter_may_be_imported_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing imports it for nobody's sake: it takes Triton along."""
    monkeypatch.delitem(sys.modules, "torch.utils.flop_counter", raising=False)
    monkeypatch.delattr(torch.utils, "flop_counter", raising=False)
    _operator.define(PipelineOperator("counted_probe", LoopProducts, on_host=True))
    assert "torch.utils.flop_counter" not in sys.modules
    counter = import_module("torch.utils.flop_counter")
    assert {torch.ops.moe_ref.counted_probe_backward, torch.ops.aten.mm} <= counter.flop_registry.keys()


def test_after_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waited_for.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen, before = [], list(sys.meta_path)
    after_import("waited_for", lambda: seen.append(sys.modules["waited_for"].VALUE))
    after_import("waited_for", lambda: seen.append(2))
    assert importlib.util.find_spec("waited_for") is not None  # looked for, and not imported: it waits on
    assert seen == []
    assert not seen
    import waited_for

    after_import("waited_for", lambda: seen.append(3))
    assert seen == [1, 2, 3]
    assert "_Loader" not in type(waited_for.__spec__.loader).__name__
    assert _after_import._waiting or sys.meta_path == before
