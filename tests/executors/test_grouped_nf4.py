"""What grouped_nf4 promises beyond the numbers: what it decodes, what it keeps, and that it never waits."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import executors
from dense_cases import arguments, demand_one_graph, demand_registered_right, each, inputs_of, needs_all
from executors._base.arguments import TENSORS
from executors._decode import bitsandbytes as _decode_kernel
from executors._pipeline import packed_matrices
from moe_ref import MoEConfig
from moe_ref.conformance.judgement.call import Inputs, call
from moe_ref.conformance.judgement.checks import check_problem, check_repeatable
from moe_ref.conformance.problems.pinned import PACKED as PINNED
from moe_ref.conformance.problems.problem import Problem
from moe_ref.packed import decode
from packed_cases import MXFP4, PACKED, PACKED_EVERYTHING, SLICED, STRADDLING, WAYS, LivePeak, Sliced, large_inputs

both_ways = pytest.mark.parametrize("way", WAYS)
problems = pytest.mark.parametrize(
    "problem", [PACKED, PACKED_EVERYTHING, STRADDLING, MXFP4], ids=["plain", "everything", "straddling", "mxfp4"]
)


def on_decoded_weights(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    dense = {name: decode(value).to(dtype) for name, value in inputs.weights.packed().items()}
    return replace(inputs, weights=inputs.weights.with_parameters(dense))


@both_ways
@problems
def test_the_bits_are_those_of_decoded_weights(way: str, problem: Problem) -> None:
    """Decoding is exact, so the products see what a dense executor sees (Q2, Q3, Q5, M1)."""
    inputs, dense = inputs_of(problem), on_decoded_weights(inputs_of(problem), torch.float32)
    name = "native" if way == "loop" else "grouped_mm"
    expected, actual = call(executors.get(name), dense), call(WAYS[way](), inputs)
    assert torch.equal(expected, actual)
    expected.backward(dense.dy)
    actual.backward(inputs.dy)
    for leaf, value in inputs.tensors().items():
        assert torch.equal(value.grad, dense.tensors()[leaf].grad), leaf


@pytest.mark.parametrize("problem", PINNED, ids=lambda p: f"T{p.tokens}-E{p.experts}-{p.dtype}-{p.quant_type}")
def test_slices_hold_the_specification(problem: Problem) -> None:
    """The way of GPUs, on a CPU: pinned problems, few experts and many, straddling blocks (Q1, Q2, Q3, Q5, M1)."""
    check_problem(Sliced(), problem)
    check_repeatable(Sliced(), problem)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("experts", [1, 7, 33])
def test_slices_with_experts_left_out(experts: int, seed: int) -> None:
    """Empty experts lie between others, at either end, or everywhere; slots may be empty too (D2, R7)."""
    config = MoEConfig(1 + seed % 2 if experts > 1 else 1)
    problem = Problem(
        seed * 5, experts, 32, 16, config, entry="experts", cut_points=True, empty_slots=seed % 2 == 1, gate_up_rank=2,
        quant_type="nf4", blocksize=32, seed=seed,
    )  # fmt: skip
    check_problem(Sliced(), problem)
    check_problem(Sliced(recompute=False), problem)


@both_ways
@problems
def test_keeping_what_was_decoded_gives_the_same_bits(
    way: str, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D4: by default backward decodes again; recompute=False keeps, and decodes nothing."""
    decoded = count_decoded(monkeypatch)
    used, results = Counter(), {}
    for recompute in (True, False):
        inputs = inputs_of(problem)
        decoded.clear()
        y = call(WAYS[way](recompute=recompute), inputs)
        forward = Counter(decoded)
        y.backward(inputs.dy)
        used[recompute] = sum(decoded.values()) - sum(forward.values())
        results[recompute] = {"y": y} | {n: t.grad for n, t in inputs.tensors().items()}
        assert set(forward.values()) == {2}  # once for each projection
    assert used[True] == sum(forward.values())
    assert used[False] == 0
    for leaf, value in results[True].items():
        assert torch.equal(value, results[False][leaf]), leaf


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each expert is decoded."""
    decoded: Counter[int] = Counter()
    one, several = packed_matrices.decode_expert, packed_matrices.decode_experts

    def count_one(tensor, index):  # type: ignore[no-untyped-def]
        decoded[index] += 1
        return one(tensor, index)

    def count_several(tensor, numbers):  # type: ignore[no-untyped-def]
        decoded.update(numbers.tolist())
        return several(tensor, numbers)

    monkeypatch.setattr(packed_matrices, "decode_expert", count_one)
    monkeypatch.setattr(packed_matrices, "decode_experts", count_several)
    return decoded


@both_ways
def test_only_experts_with_tokens_are_decoded(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where the host does not know them, at most as many as there are slots."""
    decoded = count_decoded(monkeypatch)
    problem = replace(PACKED_EVERYTHING, entry="experts", tokens=2, experts=40)
    inputs = inputs_of(problem)
    with torch.no_grad():
        call(WAYS[way](), inputs)
    used = set(inputs.topk_ids.flatten().tolist())
    assert used <= set(decoded)
    assert set(decoded.values()) == {2}
    assert len(decoded) == len(used) if way == "loop" else len(decoded) <= 2 * problem.top_k


@pytest.mark.parametrize(("way", "limit"), [("loop", 0.07), ("slices", 0.25)])
def test_peak_memory_stays_below_a_quarter_of_the_decoded_stack(way: str, limit: float) -> None:
    """Even when all experts are active, forward and backward; a loop needs one expert's matrix, not two."""
    inputs = large_inputs()
    assert len(set(inputs.topk_ids.flatten().tolist())) == 32
    stack = 2 * sum(value.size for value in inputs.weights.packed().values())
    with LivePeak(inputs) as forward:
        y = call(WAYS[way](), inputs)
    with LivePeak(inputs) as backward:
        y.backward(inputs.dy)
    assert stack / 64 < max(forward.peak, backward.peak) < stack * limit  # one expert at least: the eye can see
    if way == "loop":
        assert forward.peak < 0.045 * stack
    with torch.no_grad(), LivePeak(inputs) as inference:
        call(WAYS[way](recompute=False), inputs)
    assert inference.peak <= forward.peak  # nothing is kept for a backward pass that cannot come


@both_ways
@pytest.mark.parametrize("problem", [PACKED, replace(PACKED, tokens=2, experts=40)], ids=["many slots", "few slots"])
def test_memory_kept_for_backward(way: str, problem: Problem) -> None:
    """Beside what was given, z, the order and the offsets; with recompute=False the decoded experts too."""
    for recompute in (True, False):
        inputs, saved = inputs_of(replace(problem, entry="experts")), []
        given = [*inputs.tensors().values(), inputs.topk_ids, *inputs.codes().values()]
        places = {t.untyped_storage().data_ptr() for t in given}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            call(WAYS[way](recompute=recompute), inputs)
        own = sorted(tuple(t.shape) for t in saved if t.numel() and t.untyped_storage().data_ptr() not in places)
        slots = problem.tokens * problem.top_k
        experts = min(problem.experts, slots)
        decoded = [] if recompute else [(experts, *value.shape[1:]) for value in inputs.weights.packed().values()]
        assert own == sorted([(slots, problem.gate_up_rows), (slots,), (problem.experts + 1,), *decoded])


@problems
@pytest.mark.parametrize("keep", [False, True])
def test_slices_never_look_at_a_value(problem: Problem, keep: bool) -> None:
    """Forward and backward on tensors without values: what a host would have to wait for raises here."""
    inputs = inputs_of(replace(problem, entry="experts", dtype="bfloat16", lora_dtype="bfloat16"))
    given = arguments(inputs)
    given = each(given, lambda t: t.detach().to("meta"))
    forward, backward, tangent = (kernel._init_fn.__wrapped__ for kernel in executors.get("grouped_nf4").operator)
    y, *kept = forward(*given, True, keep)
    assert (y.shape, y.device.type) == (inputs.x.shape, "meta")
    gradients = backward(y, *kept, needs_all(given), *given)
    for gradient, owner, needed in zip(gradients, [given[0], *given[2:TENSORS]], needs_all(given), strict=True):
        assert not needed or gradient.shape == owner.shape
    owners = [given[0], *given[2:TENSORS]]
    along = [owner if needed else None for owner, needed in zip(owners, needs_all(given), strict=True)]
    assert tangent(*along, *given).shape == y.shape


@problems
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("way", ["loop", "slices"])
def test_operators_are_registered_right(way: str, keep: bool, problem: Problem) -> None:
    """torch.library.opcheck: schema, autograd, fake kernels, dynamic shapes."""
    operator = SLICED if way == "slices" else executors.get("grouped_nf4").operator
    demand_registered_right(operator, problem, keep_decoded=keep)


@problems
def test_compiles_whole_with_dynamic_tokens(problem: Problem) -> None:
    demand_one_graph(executors.get("grouped_nf4"), problem)


@both_ways
def test_checkpoints_keep_nothing_decoded(way: str) -> None:
    """D5: under the policy the replay decodes again, for the same experts, and gives the same bits."""
    executor = WAYS[way](recompute=False)
    inputs, expected = large_inputs(), large_inputs()
    call(executor, expected).backward(expected.dy)
    context = partial(create_selective_checkpoint_contexts, executors.checkpoint_policy)
    with LivePeak(inputs) as live:
        given = inputs.x, inputs.router_logits, inputs.weights
        y = checkpoint(executor, *given, use_reentrant=False, context_fn=context)
    stack = 2 * sum(value.size for value in inputs.weights.packed().values())
    assert live.peak > stack / 2  # while it ran, it kept what it decoded
    assert sum(size for storage, size in live.alive.values() if not storage.expired()) < stack / 64
    y.backward(inputs.dy)
    for leaf, value in expected.tensors().items():
        assert torch.equal(value.grad, inputs.tensors()[leaf].grad), leaf


def test_without_bitsandbytes_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table decodes instead, and explain says so."""
    inputs = inputs_of(PACKED_EVERYTHING)
    expected = call(executors.get("grouped_nf4"), inputs)
    _decode_kernel.operator.cache_clear()
    _decode_kernel.is_right.cache_clear()
    monkeypatch.setattr(_decode_kernel, "import_module", missing)
    try:
        assert torch.equal(call(executors.get("grouped_nf4"), inputs), expected)
        note = next(row.note for row in executors.explain(inputs.x, inputs.weights) if row.name == "grouped_nf4")
    finally:
        monkeypatch.undo()
        _decode_kernel.operator.cache_clear()
        _decode_kernel.is_right.cache_clear()
    assert note == 'decodes several times as fast with bitsandbytes: pip install "moe-ref[nf4]"'


def missing(name: str) -> None:
    raise ImportError(name)


@both_ways
def test_scales_take_no_part_in_gradients(way: str) -> None:
    """Though a module may have made parameters of them."""
    inputs = inputs_of(replace(PACKED, frozen=frozenset({"x", "router_logits", "gate_up_proj_bias", "down_proj_bias"})))
    packed = {name: replace(t, absmax=torch.nn.Parameter(t.absmax)) for name, t in inputs.weights.packed().items()}
    y = WAYS[way]()(inputs.x, inputs.router_logits, inputs.weights.with_parameters(packed))
    assert not y.requires_grad


@both_ways
def test_nested_blocks_of_other_lengths(way: str) -> None:
    """Q3: 256 is bitsandbytes' choice."""
    inputs = inputs_of(replace(PACKED, nested="one"))
    packed = {
        name: replace(t, nested_blocksize=3, nested_absmax=torch.rand(-(-len(t.absmax) // 3)))
        for name, t in inputs.weights.packed().items()
    }
    inputs = replace(inputs, weights=inputs.weights.with_parameters(packed))
    dense = on_decoded_weights(inputs, torch.float32)
    name = "native" if way == "loop" else "grouped_mm"
    assert torch.equal(call(WAYS[way](), inputs), call(executors.get(name), dense))


def test_other_devices_are_refused() -> None:
    inputs = inputs_of(PACKED)
    weights = inputs.weights.map(lambda t: t.to("meta"))
    packed = {name: t.map(lambda array: array.to("meta")) for name, t in weights.packed().items()}
    with pytest.raises(executors.Unsupported, match=r"^x.device=meta: must be one of cpu, cuda for grouped_nf4$"):
        executors.get("grouped_nf4").check(inputs.x.to("meta"), weights.with_parameters(packed))


def test_nested_blocksize_is_checked_where_it_is_not_used() -> None:
    """It goes to the operator all the same, whose own message would not be one line."""
    inputs = inputs_of(PACKED)
    wrong = replace(inputs.weights.gate_up_proj, nested_blocksize=None)
    with pytest.raises(TypeError, match=r"^gate_up_proj.nested_blocksize=None: must be an integer$"):
        executors.get("grouped_nf4")(inputs.x, inputs.router_logits, replace(inputs.weights, gate_up_proj=wrong))


def test_dense_weights_are_refused() -> None:
    inputs = on_decoded_weights(inputs_of(PACKED), torch.float32)
    with pytest.raises(
        executors.Unsupported, match=r"^gate_up_proj is dense: must be fp4 or mxfp4 or nf4 for grouped_nf4; see"
    ):
        call(executors.get("grouped_nf4"), inputs)


@pytest.mark.parametrize("name", ["native", "grouped_mm"])
def test_dense_executors_refuse_4_bits(name: str) -> None:
    inputs = inputs_of(PACKED)
    with pytest.raises(
        executors.Unsupported, match=rf"^gate_up_proj is nf4: must be dense for {name}; see grouped_nf4"
    ):
        call(executors.get(name), inputs)


def test_auto_takes_4_bits_to_grouped_nf4() -> None:
    inputs = inputs_of(PACKED)
    assert executors.get("auto").choose(inputs.x, inputs.weights)[0] == "grouped_nf4"


def test_recompute_is_checked() -> None:
    with pytest.raises(TypeError, match=r"^recompute=1: must be True or False$"):
        executors.get("grouped_nf4", recompute=1)
    assert executors.get("grouped_nf4").recompute
