"""The executor ``triton``: what it refuses, what it tells, and routing that drawn problems do not reach."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import executors
from executors._triton import layer as _layer
from executors._triton.device import INTERPRETED
from executors._triton.kernels.products import dot_exact
from executors._triton.launch import grouping
from executors._triton.launch import routing as _routing
from moe_ref import ExpertLoRA, MoEConfig, MoEWeights
from moe_ref.conformance.judgement.call import call
from moe_ref.conformance.problems.problem import Problem
from moe_ref.routing import route
from triton_cases import ALIGNED, DEVICE, inputs_of, interpreted, python


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unavailable_without_gpu_and_interpreter() -> None:
    done = python("-c", "import executors; executors.get('triton')")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "executors._protocol.Unavailable: executor 'triton' needs a GPU; "
        "TRITON_INTERPRET=1 checks its numbers without one, slowly"
    )


def test_unavailable_without_triton() -> None:
    """The other executors, auto among them, do without it."""
    code = "import sys; sys.modules['triton'] = None\nimport executors\nprint(executors.available())\n"
    done = python("-c", code + "executors.get('triton')")
    assert "'auto', 'grouped_mm', 'grouped_nf4', 'native'" in done.stdout
    message = done.stderr.strip().splitlines()[-1]
    assert message.endswith("""executor 'triton' needs triton: pip install "moe-ref[triton]\"""")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (
            replace(ALIGNED, dtype="float64"),
            "x.dtype=float64: must be one of bfloat16, float16, float32 for triton",
        ),
        (replace(ALIGNED, post_expert_norm=True), "post_expert_norm.shape=(80,): must be None for triton"),
        (
            replace(ALIGNED, post_expert_norm=True, entry="experts"),
            "post_expert_norm.shape=(80,): must be None for triton",
        ),
    ],
    ids=["float64", "norm", "norm of experts"],
)
def test_what_is_unsupported_is_named(problem: Problem, message: str) -> None:
    with pytest.raises(executors.Unsupported) as refusal:
        call(executors.get("triton"), inputs_of(problem))
    assert str(refusal.value) == message


def test_adapters_without_factors_are_none() -> None:
    inputs = inputs_of(ALIGNED)
    y = call(executors.get("triton"), inputs)
    empty = replace(inputs, weights=replace(inputs.weights, lora=ExpertLoRA()))
    assert torch.equal(call(executors.get("triton"), empty), y)


def test_too_many_slots_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "MOST_SLOTS", 79)
    with pytest.raises(executors.Unsupported, match=r"T\*K=80 slots: must be at most 79 for triton"):
        call(executors.get("triton"), inputs_of(ALIGNED))
    with pytest.raises(executors.Unsupported, match=r"T\*K=80 slots: must be at most 79 for triton"):
        call(executors.get("triton"), inputs_of(replace(ALIGNED, entry="experts", top_k_given=False)))


@pytest.mark.parametrize("option", ["recompute", "batch_invariant"])
def test_options_must_be_truth_values(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option}='yes': must be True or False"):
        executors.get("triton", **{option: "yes"})


def test_note_says_that_it_is_interpreted() -> None:
    inputs = inputs_of(ALIGNED)
    note = executors.get("triton").note(inputs.x, inputs.weights)
    assert bool(note) == INTERPRETED == executors.get("triton").capabilities.interpreted


@pytest.mark.parametrize("tokens", [0, 12])
def test_routing_keeps_torch_s_rules(tokens: int) -> None:
    """Schema, autograd, fake kernels, dispatch."""
    inputs = inputs_of(replace(ALIGNED, tokens=tokens))
    assert inputs.router_logits is not None
    logits, kind = inputs.router_logits, (2, "softmax", False, 0.0, 1.0, "add")
    torch.library.opcheck(_routing.operator, (logits, None, False, *kind, 1, 1, "max", "score"))
    weights, ids = _routing.operator(logits.detach(), None, False, *kind, 1, 1, "max", "score")
    torch.library.opcheck(_routing.backward_operator, (weights, ids, logits.detach(), *kind[1:]))


def test_double_backward_through_the_weights_is_refused() -> None:
    inputs = inputs_of(ALIGNED)
    assert inputs.router_logits is not None
    weights = executors.get("triton").route(inputs.router_logits, inputs.weights).topk_weights
    (once,) = torch.autograd.grad(weights.square().sum(), inputs.router_logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^triton: double backward is not supported"):
        once.sum().backward()


def test_tf32_only_where_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = _layer.forward
    monkeypatch.setattr(_layer, "forward", lambda layer, plan, z: seen.append(plan.precision) or plain(layer, plan, z))
    inputs = {dtype: inputs_of(replace(ALIGNED, dtype=dtype)) for dtype in ("float32", "float16")}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            for given in inputs.values():
                call(executors.get("triton"), given)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee", "ieee", "tf32", "ieee"]  # never for fp16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_ids_of_rows_full_of_nan_are_in_range_and_distinct(dtype: str) -> None:
    """A NaN may have any bits: all of them set reads as the smallest integer, which stands for no expert (R4)."""
    integer = {"float32": torch.int32, "bfloat16": torch.int16, "float64": torch.int64}[dtype]
    logits = torch.full((3, 5), -1, dtype=integer).view(getattr(torch, dtype))
    logits[1, ::2] = torch.nan
    logits[2, 1:] = -torch.inf
    weights = MoEWeights(torch.zeros(5, 4, 4), torch.zeros(5, 4, 2), config=MoEConfig(5))
    routing = executors.get("triton").route(logits.to(DEVICE), weights)
    assert [sorted(ids) for ids in routing.topk_ids.tolist()] == [[0, 1, 2, 3, 4]] * 3
    assert routing.topk_weights.isnan().all()


@pytest.mark.parametrize(("experts", "top_k"), [(512, 10), (300, 300), (96, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_many_experts(experts: int, top_k: int, dtype: str) -> None:
    """Ties in nearly every row of bf16 logits: ids are those of the specification, lower ids first (R2)."""
    config = MoEConfig(top_k, renormalize=True)
    logits = torch.from_numpy(np.random.default_rng(experts).normal(size=(9, experts))).to(getattr(torch, dtype))
    weights = MoEWeights(torch.zeros(experts, 4, 4), torch.zeros(experts, 4, 2), config=config)
    found = executors.get("triton").route(logits.to(DEVICE), weights)
    expected = route(logits.double().numpy(), config)
    assert found.topk_ids.tolist() == expected.topk_ids.tolist()
    assert found.topk_weights.dtype == torch.promote_types(logits.dtype, torch.float32)
    np.testing.assert_allclose(found.topk_weights.cpu(), expected.topk_weights, rtol=2e-6)


@interpreted
def test_compare_shows_it_as_interpreted(tmp_path: Path) -> None:
    """The bundled layer passes; times are not measured."""
    command = ["-m", "executors", "compare", "--executor", "triton", "--tokens", "16", "--out", str(tmp_path)]
    done = python(*command, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpreted, not timed" in " ".join(done.stdout.replace("│", " ").split())
    (row,) = json.loads((tmp_path / "compare.json").read_text())["executors"]
    assert row["executor"] == "triton"
    assert row["seconds"] == {}


@interpreted
@pytest.mark.nightly
def test_bench_leaves_it_out_aloud(tmp_path: Path) -> None:
    command = ["-m", "executors", "bench", "--layer", "mixtral-8x7b", "--scale", "64", "--tokens", "1"]
    command += ["--direction", "forward", "--routing", "uniform", "--seconds", "0", "--executor", "triton"]
    done = python(*command, "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert "interpreted: its times mean nothing" in " ".join(done.stdout.replace("│", " ").split()), done.stderr


@interpreted
@pytest.mark.usefixtures("new_kernels")
@pytest.mark.parametrize(("rows", "factor"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")])
def test_factors_of_another_dtype_are_read_exactly(rows: str, factor: str) -> None:
    """Rounded to bf16, a factor in fp32 would be off by up to 2^-9: E2 has no such rounding."""

    @triton.jit
    def kernel(a, b, out):
        place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        total = dot_exact(tl.load(a + place), tl.load(b + place), tl.zeros((16, 16), tl.float32), "ieee")
        tl.store(out + place, total)

    generator = torch.Generator().manual_seed(0)
    a = torch.eye(16, dtype=getattr(torch, rows)) * 3
    b = torch.randn(16, 16, generator=generator).to(getattr(torch, factor))
    out = torch.empty(16, 16)
    kernel[(1,)](a, b, out)
    assert torch.equal(out, 3 * b.float())


def test_memory_kept_for_backward() -> None:
    """Inputs, parameters, the choice and its weights, z: nothing of S*H, and no permutation."""
    problem = replace(ALIGNED, gate_up_rank=4, down_rank=3)
    inputs, saved = inputs_of(problem), []
    given = {t.untyped_storage().data_ptr() for t in inputs.tensors().values()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(executors.get("triton"), inputs)
    own = {tuple(t.shape) for t in saved if t.numel() and t.untyped_storage().data_ptr() not in given}
    slots = problem.tokens * problem.top_k
    assert own == {(slots, problem.gate_up_rows), (problem.tokens, problem.top_k)}


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_gradients_have_the_strides_of_parameters(layout: str) -> None:
    """A model that stores (E, H, 2I) gets its gradient without a copy."""
    inputs = inputs_of(replace(ALIGNED, weights_layout=layout, gate_up_rank=4))
    parameters = inputs.weights.parameters()
    gradients = torch.autograd.grad(call(executors.get("triton"), inputs), list(parameters.values()), inputs.dy)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert gradient.stride() == parameter.stride(), name


@pytest.mark.parametrize(("policy", "times"), [(True, 1), (False, 2)])
def test_checkpointing_never_chooses_again(policy: bool, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """D5: under the policy, the replay uses the ids of the forward pass; without it, it chooses once more."""
    launched = []
    plain = _routing.route_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launched.append(grid)
            return plain[grid]

    executor, inputs, expected = executors.get("triton"), inputs_of(ALIGNED), inputs_of(ALIGNED)
    call(executor, expected).backward(expected.dy)
    monkeypatch.setattr(_routing, "route_kernel", Counted())
    contexts = partial(create_selective_checkpoint_contexts, executors.checkpoint_policy)
    options = {"context_fn": contexts} if policy else {}
    y = checkpoint(executor, inputs.x, inputs.router_logits, inputs.weights, use_reentrant=False, **options)
    y.backward(inputs.dy)
    assert len(launched) == times
    for leaf, value in expected.tensors().items():
        assert torch.equal(value.grad, inputs.tensors()[leaf].grad), leaf


def test_at_equality_with_epsilon_the_divisor_is_the_sum() -> None:
    """R5: a weight of s / s has no gradient; that of s / eps would have one."""
    config = MoEConfig(1, renormalize=True, renormalize_eps=0.5, renormalize_form="max")
    weights = MoEWeights(torch.zeros(2, 2, 1, device=DEVICE), torch.zeros(2, 1, 1, device=DEVICE), config=config)
    logits = torch.zeros(1, 2, device=DEVICE, requires_grad=True)
    routing = executors.get("triton").route(logits, weights)
    routing.topk_weights.sum().backward()
    assert routing.topk_weights.tolist() == [[1.0]]
    assert not logits.grad.any()
