"""The kernels of 4 bits beyond their numbers: ways, rules, memory, offsets, tracing, refusals."""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import executors
from dense_cases import WATCHED, arguments, demand_one_graph, each, needs_all
from executors import mxfp4
from executors._triton import configs, decode_rule
from executors._triton import operator as _operator
from executors._triton.configs import FAMILIES
from executors._triton.decode_rule import RULES
from executors._triton.device import INTERPRETED, Device, device_of
from executors._triton.launch import decode as _decode
from executors._triton.launch import grouping
from executors._triton.launch import products as _products
from executors._triton.launch.grouping import Groups
from executors._triton.launch.narrow import Narrow
from executors._triton.launch.operands import LaunchPlan
from executors._triton.launch.packed import codes_of, is_aligned
from moe_ref import MoEConfig, MXFP4Tensor, NF4Tensor
from moe_ref.conformance.judgement.call import Inputs, call, run
from moe_ref.conformance.judgement.checks import result_arrays, verdicts_of
from moe_ref.conformance.judgement.faults import same_bits
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.problems.poison import poisoned
from moe_ref.conformance.problems.problem import Problem
from moe_ref.packed import decode
from packed_cases import LivePeak
from triton_cases import ALIGNED, DEVICE, inputs_of, interpreted, python

NF4 = replace(ALIGNED, quant_type="nf4", blocksize=32)
EVEN = replace(NF4, hidden=96, intermediate=64)
MXFP4 = replace(ALIGNED, quant_type="mxfp4", hidden=96, intermediate=64)
SMALL = replace(NF4, tokens=5, experts=2, hidden=32, intermediate=32)
WAYS = ("fused", "decoded")
WATCHED.update({f"triton_{path}": _operator.BY_PATH[path] for path in WAYS})


def by(path: str, **options: Any) -> executors.Executor:
    return executors.get("grouped_nf4", path=path, **options)


def on_decoded_weights(inputs: Inputs) -> Inputs:
    dense = {name: decode(value).to(inputs.x.dtype) for name, value in inputs.weights.packed().items()}
    return replace(inputs, weights=inputs.weights.with_parameters(dense))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("problem", [EVEN, MXFP4, replace(NF4, hidden=50, nested="one")], ids=["nf4", "mxfp4", "odd"])
def test_decoded_before_is_the_dense_executor(problem: Problem, layout: str) -> None:
    """Decoding is exact, and the products are the same: to the last bit, gradients too (Q2, M1)."""
    problem = replace(problem, entry="experts", weights_layout=layout, gate_up_rank=2, down_rank=3)
    found = run(by("decoded"), inputs_of(problem)).tensors
    expected = run(executors.get("triton"), on_decoded_weights(inputs_of(problem))).tensors
    for leaf, value in found.items():
        assert same_bits(value, expected[leaf]), leaf


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_decoded_parts_by_tensor_descriptors(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs with TMA run: the same bits as with pointers."""
    problem = replace(EVEN, weights_layout=layout)
    expected, used = run(by("decoded"), inputs_of(problem)).tensors, []
    monkeypatch.setitem(FAMILIES, "interpreter", FAMILIES["interpreter"]._replace(descriptors=True))
    plain = _products.operand
    monkeypatch.setattr(_products, "operand", lambda *given: used.append(plain(*given)) or used[-1])
    found = run(by("decoded"), inputs_of(problem)).tensors
    assert {own.tma for own in used} == {"rows", "columns"}
    for leaf, value in found.items():
        assert same_bits(value, expected[leaf]), leaf


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_parts_do_not_change_bits(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(by("decoded"), inputs_of(NF4)).tensors
    monkeypatch.setattr(_decode, "PARTS", parts)
    for leaf, value in run(by("decoded"), inputs_of(NF4)).tensors.items():
        assert same_bits(value, expected[leaf]), leaf


def ways_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    taken = []
    plain = _operator.plan_of

    def noted(*given: Any, decoded: bool = False) -> LaunchPlan:
        taken.append("decoded" if decoded else "fused")
        return plain(*given, decoded=decoded)

    monkeypatch.setattr(_operator, "plan_of", noted)
    return taken


def test_the_rule_decides_by_rows_per_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never by timing; both ways of a step are the same, and with batch_invariant there is one (C2)."""
    taken = ways_taken(monkeypatch)
    family = device_of(torch.device(DEVICE)).family
    monkeypatch.setitem(RULES, family, decode_rule.Rule(16, "for this test"))
    executor = executors.get("triton")
    for tokens, way in ((40, "fused"), (41, "decoded")):  # 16 rows of each of five experts, and a bit more
        inputs = inputs_of(replace(NF4, tokens=tokens))
        call(executor, inputs).backward(inputs.dy)
        assert taken == [way, way]
        taken.clear()
    call(executors.get("triton", batch_invariant=True), inputs)
    assert taken == ["fused"]


@interpreted
def test_grouped_nf4_takes_torch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels only where they are asked for."""
    taken = ways_taken(monkeypatch)
    for path, way in (("auto", []), ("torch", []), ("fused", ["fused"]), ("decoded", ["decoded"])):
        call(by(path), inputs_of(NF4))
        assert taken == way
        taken.clear()


@interpreted
def test_no_way_of_the_kernels_leaves_a_norm_out() -> None:
    """They have none (E8): where they were asked for the layer is refused, and elsewhere torch takes it."""
    inputs = inputs_of(replace(NF4, post_expert_norm=True))
    for path in ("fused", "decoded"):
        with pytest.raises(
            executors.Unsupported, match=r"^post_expert_norm\.shape=\(\d+,\): must be None for grouped_nf4"
        ):
            call(by(path), inputs)
    assert torch.equal(call(by("auto"), inputs), call(by("torch"), inputs))
    on_a_gpu, own = by("auto"), object()
    object.__setattr__(on_a_gpu, "_kernels", own)
    there = SimpleNamespace(is_cuda=True)
    assert on_a_gpu._kernels_for(there, inputs.weights) is None
    assert on_a_gpu._kernels_for(there, replace(inputs.weights, post_expert_norm=None)) is own


def test_explain_tells_the_way_and_what_the_rule_stands_on() -> None:
    inputs = inputs_of(NF4)
    rule = RULES[device_of(inputs.x.device).family]
    notes = {row.name: row.note for row in executors.explain(inputs.x, inputs.weights)}
    assert f"{rule.rows:g} rows per expert ({rule.basis}); here 16" in notes["triton"]
    assert ("interpreted" in notes["triton"]) == INTERPRETED
    assert by("fused").note(inputs.x, inputs.weights).endswith("4 bits: fused, as asked")
    unknown = replace(inputs.weights, config=replace(NF4.config, top_k=None))
    assert "here" not in executors.get("triton").note(inputs.x, unknown)
    invariant = executors.get("triton", batch_invariant=True)
    assert invariant.note(inputs.x, inputs.weights).endswith("4 bits: fused, as asked")
    dense = inputs_of(ALIGNED)
    assert "4 bits" not in executors.get("triton").note(dense.x, dense.weights)


def test_every_family_has_a_rule_with_its_basis() -> None:
    assert set(RULES) == set(FAMILIES)
    for family, rule in RULES.items():
        assert rule.rows > 0, family
        assert rule.basis, family


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "fast"}, ValueError, "path='fast': must be one of 'auto', 'fused', 'decoded', 'torch'"),
        ({"path": None}, ValueError, "path=None: must be one of 'auto', 'fused', 'decoded', 'torch'"),
        ({"recompute": 1}, TypeError, "recompute=1: must be True or False"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refusal:
        executors.get("grouped_nf4", **options)
    assert str(refusal.value) == message


@pytest.mark.parametrize("path", ["auto", "fused", "torch"])
def test_executors_can_be_copied_and_pickled(path: str) -> None:
    executor = by(path, recompute=False)
    for other in (copy.deepcopy(executor), pickle.loads(pickle.dumps(executor))):
        assert other == executor
        assert call(other, inputs_of(SMALL)).isfinite().all()


@pytest.mark.parametrize(
    ("executor", "expected"),
    [
        (executors.get("grouped_nf4", path="fused"), {"packed": True, "aligned": False, "batch_invariant": False}),
        (executors.get("grouped_nf4", path="decoded"), {"packed": False, "aligned": True, "batch_invariant": False}),
        (executors.get("triton", batch_invariant=True), {"packed": True, "aligned": False, "batch_invariant": True}),
    ],
    ids=["fused", "decoded", "batch_invariant"],
)
def test_configuration_that_is_asked_for(
    executor: executors.Executor, expected: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 48: codes are not aligned, what they decode to is; then the dense executor's configuration (C2)."""
    asked = []
    plain = configs.config_of
    monkeypatch.setattr(configs, "config_of", lambda *a, **given: asked.append(given) or plain(*a, **given))
    call(executor, inputs_of(replace(NF4, hidden=48, intermediate=48)))
    assert [{name: given[name] for name in expected} for given in asked] == [expected]


def test_batch_invariant_takes_one_configuration_for_4_bits() -> None:
    last = FAMILIES["sm90"].packed.narrow[-1]
    given = {"narrow": True, "aligned": True, "packed": True, "batch_invariant": True}
    assert {configs.config_of("sm90", rows=rows, **given) for rows in (0.1, 20, 1e6)} == {last}


def test_experts_without_rows_are_not_decoded() -> None:
    inputs = inputs_of(replace(SMALL, experts=4))
    packed = inputs.weights.packed()["gate_up_proj"]
    offsets = torch.tensor([0, 3, 3, 5, 5], dtype=torch.int32, device=DEVICE)
    groups = Groups(torch.empty(0), offsets, torch.empty(0), 0)
    plan = LaunchPlan(groups, 1, FAMILIES["interpreter"].narrow[0], Device("interpreter", 3), "ieee", True)
    out = torch.full(packed.stored_shape, -7.0, device=DEVICE)
    _decode.decode(packed, 0, out, plan)
    assert [bool((own == -7.0).all()) for own in out] == [False, True, False, True]


def test_too_many_slots_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "MOST_SLOTS", 79)
    with pytest.raises(executors.Unsupported, match=r"T\*K=80 slots: must be at most 79 for grouped_nf4"):
        call(by("fused"), inputs_of(NF4))
    inputs = inputs_of(NF4)
    with pytest.raises(executors.Unsupported, match=r"T\*K=80 slots"):  # so that explain and auto know it
        by("fused").check(inputs.x, inputs.weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_are_unavailable_without_gpu_and_interpreter() -> None:
    done = python("-c", "import executors; executors.get('grouped_nf4', path='fused')", TRITON_INTERPRET="0")
    assert done.stderr.strip().splitlines()[-1] == (
        "executors._protocol.Unavailable: executor 'grouped_nf4' with path='fused' needs a GPU; "
        "TRITON_INTERPRET=1 checks its numbers without one, slowly"
    )


def test_kernels_are_unavailable_without_triton() -> None:
    """And the executor itself does without it."""
    code = "import sys\nsys.modules['triton'] = None\nimport executors\nexecutors.get('grouped_nf4')\n"
    done = python("-c", code + "executors.get('grouped_nf4', path='decoded')")
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("""executor 'grouped_nf4' with path='decoded' needs triton: pip install "moe-ref[triton]\"""")
    )


def test_grouped_nf4_imports_no_triton_before_it_is_asked_for() -> None:
    code = "import sys, executors; executors.get('grouped_nf4'); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("path", "problem"),
    [("fused", replace(SMALL, nested="one")), ("decoded", replace(SMALL, quant_type="mxfp4"))],
    ids=WAYS,
)
def test_operators_keep_torch_s_rules(path: str, problem: Problem) -> None:
    """Schema, autograd, fake kernels, dispatch, both ways."""
    inputs = inputs_of(replace(problem, gate_up_rank=2, entry="experts"))
    operator = _operator.BY_PATH[path]
    given = arguments(inputs)
    torch.library.opcheck(operator.forward, (*given, True, False))
    _, *kept = (t.detach() for t in operator.forward(*given, True, False))
    detached = each(given, torch.Tensor.detach)
    torch.library.opcheck(operator.backward, (inputs.dy, *kept, needs_all(given), *detached))


@pytest.mark.parametrize("path", WAYS)
def test_one_graph_for_any_number_of_tokens(path: str) -> None:
    demand_one_graph(by(path), replace(SMALL, down_bias=False))


def peak_of(path: str) -> tuple[int, int]:
    """The most bytes alive in a call and its backward pass, all experts active, and of the decoded stack."""
    problem = replace(NF4, tokens=32, experts=16, hidden=64, intermediate=64, config=MoEConfig(4), entry="experts")
    inputs = inputs_of(problem)
    assert len(set(inputs.topk_ids.flatten().tolist())) == 16
    with LivePeak(inputs) as forward:
        y = call(by(path), inputs)
    with LivePeak(inputs) as backward:
        y.backward(inputs.dy)
    return max(forward.peak, backward.peak), 2 * sum(value.size for value in inputs.weights.packed().values())


def test_memory() -> None:
    """Decoded in the products, no matrix is written; decoded before them, an eighth of a projection at a time."""
    (fused, stack), (decoded, _) = peak_of("fused"), peak_of("decoded")
    eighth = stack * 2 // 3 // 8  # of gate_up_proj, the larger one
    assert eighth * 0.9 < decoded - fused < eighth * 1.1


def test_memory_kept_for_backward() -> None:
    """z, the choice and its weights; nothing that was decoded."""
    for path in WAYS:
        inputs, saved = inputs_of(replace(NF4, entry="experts")), []
        given = [*inputs.tensors().values(), inputs.topk_ids, *inputs.codes().values()]
        places = {t.untyped_storage().data_ptr() for t in given}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            call(by(path), inputs)
        own = [tuple(t.shape) for t in saved if t.numel() and t.untyped_storage().data_ptr() not in places]
        assert own == [(NF4.tokens * NF4.top_k, NF4.gate_up_rows)]


@interpreted
@pytest.mark.parametrize("path", WAYS)
@pytest.mark.parametrize("transposed", [False, True])
def test_codes_past_32_bits(path: str, transposed: bool, tmp_path: Any) -> None:
    """2^33 codes in a file that is all holes, the last expert's written: its numbers, and nobody else's (E5)."""
    experts, m, k = 2**21, 64, 64
    small = executors.nf4.quantize_tensor(torch.randn(1, m, k, generator=torch.Generator().manual_seed(0)))

    def sparse(name: str, count: int, dtype: torch.dtype, last: torch.Tensor) -> torch.Tensor:
        file = tmp_path / name
        with file.open("wb") as opened:
            opened.truncate(count * dtype.itemsize)
        room = torch.from_file(str(file), shared=True, size=count, dtype=dtype)
        room[-len(last) :] = last
        return room

    codes = sparse("codes", experts * m * k // 2, torch.uint8, small.packed)
    absmax = sparse("absmax", experts * m * k // 64, torch.float32, small.absmax)
    large = NF4Tensor(codes, absmax, shape=(experts, m, k), dtype="float32", transposed=transposed)
    h = torch.eye(k)
    last, rows = experts - 1, len(h)
    tiles = torch.tensor([[2, 0, 0], [last, 0, 32], [last, 32, 64]], dtype=torch.int32)
    offsets = torch.zeros(experts + 1, dtype=torch.int32)
    offsets[-1] = rows
    groups = Groups(torch.arange(rows, dtype=torch.int32), offsets, tiles, 2)
    config = FAMILIES["interpreter"].wide[-1]
    plan = LaunchPlan(groups, 1, config, Device("interpreter", 3), "ieee", True)
    expected = decode(small)[0]
    expected = expected.mT if transposed else expected
    if path == "fused":
        found = _products.down(Narrow(h), large, None, None, None, config.down, plan)
        assert torch.equal(found, expected.mT)  # row j of the identity takes column j of W^T
    else:
        out = torch.empty(1, m, k)
        _decode.decode(large, last, out, plan)
        assert same_bits(out[0], decode(small)[0])


def test_grains_divide_all_that_tiles_and_rows_begin_at() -> None:
    """A grain is the largest power of two of neighbours that surely share a block."""

    def grain(shape: tuple[int, int, int], blocksize: int = 64, transposed: bool = False, halves: int = 1) -> int:
        size = shape[0] * shape[1] * shape[2]
        codes, absmax = torch.zeros(-(-size // 2), dtype=torch.uint8), torch.zeros(-(-size // blocksize))
        tensor = NF4Tensor(codes, absmax, shape=shape, dtype="float32", blocksize=blocksize, transposed=transposed)
        return codes_of(tensor, (128, 32), halves).format.grain

    assert grain((2, 64, 2880)) == 32  # of a tile's k
    assert grain((2, 64, 2880), transposed=True) == 64  # m is last: the block
    assert grain((2, 96, 2880), transposed=True, halves=2) == 16  # ups begin at 48
    assert grain((2, 64, 50)) == 1  # rows begin within words
    assert grain((2, 64, 17)) == 1
    assert grain((2, 34, 8), transposed=True, halves=2) == 1  # ups begin at 17
    blocks, scales = torch.zeros(2, 64, 3, 16, dtype=torch.uint8), torch.zeros(2, 64, 3, dtype=torch.uint8)
    assert codes_of(MXFP4Tensor(blocks, scales), (128, 64), 1).format.grain == 32


def test_alignment() -> None:
    """Rows of whole 16 bytes of codes, from the beginning on."""

    def tensor(shape: tuple[int, int, int], start: int = 0, transposed: bool = False) -> NF4Tensor:
        room = torch.zeros(2**16, dtype=torch.uint8)
        return NF4Tensor(room[start:], torch.zeros(1), shape=shape, dtype="float32", transposed=transposed)

    assert is_aligned(tensor((2, 48, 96)))
    assert is_aligned(tensor((2, 96, 48), transposed=True))
    assert not is_aligned(tensor((2, 48, 80)))
    assert not is_aligned(tensor((2, 40, 96)))
    assert not is_aligned(tensor((2, 96, 48)))
    assert not is_aligned(tensor((2, 48, 96), start=8))


@pytest.mark.parametrize("path", WAYS)
def test_inputs_may_have_any_strides(path: str) -> None:
    """Codes and scales that are slices of something are read as they stand (E4)."""
    for problem in (replace(SMALL, nested="one"), replace(SMALL, quant_type="mxfp4")):
        expected = run(by(path), inputs_of(problem)).tensors
        inputs = inputs_of(problem)

        def spread(value: torch.Tensor) -> torch.Tensor:
            return torch.stack([value, value], -1)[..., 0] if value.ndim else value

        packed = {name: value.map(spread) for name, value in inputs.weights.packed().items()}
        inputs = replace(inputs, weights=inputs.weights.with_parameters(packed))
        for leaf, value in run(by(path), inputs).tensors.items():
            assert same_bits(value, expected[leaf]), leaf


def test_mixed_projections() -> None:
    """One in 4 bits and one dense, in few rows and in many: judged on the numbers that they stand for."""
    for tokens, name in product((12, 40), ("gate_up_proj", "down_proj")):
        problem = replace(NF4, tokens=tokens, config=MoEConfig(2), frozen=frozenset({"gate_up_proj", "down_proj"}))
        inputs = inputs_of(problem)
        dense = {name: decode(inputs.weights.packed()[name]).to(inputs.x.dtype)}
        mixed = replace(inputs, weights=inputs.weights.with_parameters(dense))
        with poisoned():
            result = run(executors.get("triton"), mixed)
        for verdict in verdicts_of(result_arrays(result), problem, reference(problem)):
            assert not verdict.failure


@interpreted
@pytest.mark.parametrize(("blocks", "span"), [(24, 8), (12, 4), (6, 2), (3, 0)])
@pytest.mark.parametrize("kind", ["mxfp4", "one", "per expert"])
def test_scales_held_over_steps(kind: str, blocks: int, span: int) -> None:
    """Scales of a row are loaded several at once, where rows allow it: each number still gets its own."""
    generator, blocksize = torch.Generator().manual_seed(blocks), 32 if kind == "mxfp4" else 64
    size = blocks * blocksize
    stored = torch.randn(2, 20, size, generator=generator)
    stored *= torch.randn(2, 20, blocks, generator=generator).exp2().repeat_interleave(blocksize, 2)
    stored = stored.half()
    packed = mxfp4.quantize_tensor(stored) if kind == "mxfp4" else nested_by_expert(stored, kind)
    config = FAMILIES["interpreter"].packed.narrow[0]
    tile = config.down
    assert codes_of(packed, (tile.block_n, tile.block_k), 1).format.span == span
    ks = torch.arange(2 * blocks) // 2 * blocksize + torch.randint(blocksize, (2 * blocks,), generator=generator)
    ids = (torch.arange(2 * blocks, dtype=torch.int32) % 2)[:, None]
    groups = grouping.group(ids, 2, tile.block_m)
    plan = LaunchPlan(groups, 1, config, Device("interpreter", 3), "ieee", True)
    h = torch.eye(size, dtype=torch.float16)[ks[plan.groups.order.long()]]
    found = _products.down(Narrow(h), packed, None, None, None, tile, plan)
    assert torch.equal(found, decode(packed).half().float()[ids[:, 0].long(), :, ks])  # row k of I takes column k


def nested_by_expert(stored: torch.Tensor, kind: str) -> NF4Tensor:
    """With nested scales, of all experts or of each."""
    if kind == "one":
        return executors.nf4.quantize_tensor(stored, nested=True)
    own = [executors.nf4.quantize_tensor(expert[None], nested=True) for expert in stored]
    codes, absmax, nested = (torch.cat([getattr(o, n) for o in own]) for n in ("codes", "absmax", "nested_absmax"))
    offsets = torch.stack([o.nested_offset for o in own])
    return NF4Tensor(codes, absmax, nested, own[0].nested_code, offsets, shape=tuple(stored.shape), dtype="float16")
