"""The executor ``triton``: what it refuses, what it tells, and paths that drawn problems do not reach."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import executors
from executors.triton import _configs, _grouping, _operator, _products, _routing
from executors.triton._configs import FAMILIES, Regime, regime_of
from executors.triton._device import INTERPRETED, Device
from executors.triton._interpreter import mend
from executors.triton.kernels import products
from executors.triton.kernels.products import offset
from moe_ref import ExpertLoRA, MoEConfig, MoEWeights
from moe_ref.conformance.build import build
from moe_ref.conformance.call import Inputs, call, to_torch
from moe_ref.conformance.checks import check_problem, same_bits
from moe_ref.conformance.problem import Problem
from moe_ref.routing import route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPT_OSS = MoEConfig(2, scoring="topk_softmax", alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved")
ALIGNED = Problem(40, 5, 80, 48, GPT_OSS, "bfloat16", gate_up_bias=True, down_bias=True)

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


def inputs_of(problem: Problem) -> Inputs:
    return to_torch(problem, build(problem), DEVICE)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, in which kernels are interpreted only if the environment says so."""
    return subprocess.run([sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture
def new_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that a test makes are interpreted too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    mend()


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
        (replace(ALIGNED, quant_type="nf4"), "gate_up_proj is nf4: must be dense for triton; see grouped_nf4"),
        (replace(ALIGNED, gate_up_rank=2), "lora=ExpertLoRA: must be None for triton"),
    ],
    ids=["float64", "nf4", "lora"],
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
    monkeypatch.setattr(_grouping, "MOST_SLOTS", 79)
    with pytest.raises(executors.Unsupported, match=r"T\*K=80 slots: must be at most 79 for triton"):
        call(executors.get("triton"), inputs_of(ALIGNED))


def test_option_must_be_a_truth_value() -> None:
    with pytest.raises(TypeError, match="batch_invariant='yes': must be True or False"):
        executors.get("triton", batch_invariant="yes")


@pytest.mark.parametrize("entry", ["layer", "experts"])
def test_differentiating_is_refused_aloud(entry: str) -> None:
    """Not a silent zero: neither y's inputs nor the logits get a gradient that misses a part."""
    inputs = inputs_of(replace(ALIGNED, entry=entry))
    y = call(executors.get("triton"), inputs)
    assert y.requires_grad
    with pytest.raises(executors.Unsupported, match="triton has no backward pass: must be called under"):
        (y.sum() + inputs.x.sum()).backward()


def test_weights_of_routing_cannot_be_differentiated_either() -> None:
    inputs = inputs_of(ALIGNED)
    routing = executors.get("triton").route(inputs.router_logits, inputs.weights)
    with pytest.raises(executors.Unsupported, match="no backward pass"):
        routing.topk_weights.sum().backward()


def test_note_says_that_it_is_interpreted() -> None:
    inputs = inputs_of(ALIGNED)
    note = executors.get("triton").note(inputs.x, inputs.weights)
    assert bool(note) == INTERPRETED == executors.get("triton").capabilities.interpreted


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["gpt-oss", "concatenated", "plain"])
def test_tensor_descriptors(activation: str, dtype: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs with TMA run, on sizes with tails: the same bits as with pointers."""
    configs = {"gpt-oss": GPT_OSS, "concatenated": MoEConfig(2), "plain": MoEConfig(2, activation="gelu")}
    problem = replace(ALIGNED, config=configs[activation], dtype=dtype, weights_layout=layout)
    inputs = inputs_of(problem)
    pointers = call(executors.get("triton"), inputs)
    monkeypatch.setitem(FAMILIES, "interpreter", FAMILIES["interpreter"]._replace(descriptors=True))
    used = []
    plain = _products._operand
    monkeypatch.setattr(_products, "_operand", lambda *given: used.append(plain(*given)) or used[-1])
    check_problem(executors.get("triton"), problem, DEVICE)
    assert {kind for _, kind in used} == {"columns" if layout == "transposed" else "rows"}
    assert same_bits(call(executors.get("triton"), inputs), pointers)


def test_alignment_of_weights() -> None:
    """Sizes and strides of whole 16 elements, one of the inner strides 1: else they are not aligned."""
    room = torch.zeros(2**14)
    assert _products.are_aligned(torch.zeros(2, 48, 32), torch.zeros(2, 32, 48).transpose(1, 2))
    assert _products.are_aligned(room.as_strided((1, 48, 32), (7, 32, 1)))
    odd = {
        "k is odd": torch.zeros(2, 48, 33),
        "m is odd": torch.zeros(2, 47, 32),
        "rows are odd": torch.zeros(2, 48, 33)[:, :, :32],
        "experts are odd": room.as_strided((2, 48, 32), (48 * 32 + 1, 32, 1)),
        "neither stride is 1": torch.zeros(2, 48, 64)[:, :, ::2],
        "begins in between": room[1:].as_strided((2, 48, 32), (48 * 32, 32, 1), 1),
    }
    assert [name for name, matrices in odd.items() if _products.are_aligned(matrices)] == []
    assert not _products.are_aligned(torch.zeros(2, 48, 32), odd["k is odd"])


def test_alignment_of_rows() -> None:
    """Rows that cannot be loaded widely are copied, other layouts are not."""
    x = torch.randn(5, 64)
    for same in (x, x[1:], x[:, :32], x[:1].expand(5, 64)):
        assert _products.with_aligned_rows(same) is same
    for odd in (x[:, ::2], x[:, 1:33], torch.randn(5, 33)[:, :32], torch.randn(64, 5).t()):
        copy = _products.with_aligned_rows(odd)
        assert copy.is_contiguous()
        assert copy.data_ptr() != odd.data_ptr()
        assert torch.equal(copy, odd)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_layout_of_x_does_not_change_bits(layout: str) -> None:
    contiguous, other = (
        call(executors.get("triton"), inputs_of(replace(ALIGNED, x_layout=x))) for x in ("contiguous", layout)
    )
    assert same_bits(contiguous, other)


def test_operators_keep_torch_s_rules() -> None:
    """Schema, fake kernels, dispatch; and torch.compile makes one graph for all T."""
    inputs = inputs_of(
        replace(ALIGNED, frozen=frozenset({"x", "router_logits", *inputs_of(ALIGNED).weights.parameters()}))
    )
    weights, graphs = inputs.weights, []
    routing = executors.get("triton").route(inputs.router_logits, weights)
    experts = (inputs.x, routing.topk_ids, routing.topk_weights, *weights.parameters().values())
    torch.library.opcheck(_operator.operator, (*experts, False, "swiglu", 1.0, None, 0.0, "interleaved", False))
    torch.library.opcheck(
        _routing.operator, (inputs.router_logits, None, False, 2, "softmax", False, 0.0, 1.0, 1, 1, "max")
    )

    def backend(graph: torch.fx.GraphModule, _example: object) -> object:
        graphs.append(graph)
        return graph.forward

    executor = executors.get("triton")
    torch._dynamo.reset()
    compiled = torch.compile(executor, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (12, 7, 33):
        given = inputs_of(replace(ALIGNED, tokens=tokens, seed=tokens))
        with torch.no_grad():
            y = compiled(given.x, given.router_logits, given.weights)
            assert same_bits(y, executor(given.x, given.router_logits, given.weights))
    assert len(graphs) == 1


def test_descriptors_are_for_nested_strides() -> None:
    """Each dimension outside of the next, in whole steps of it; the stride of a single expert does not count."""
    device, tile = Device("sm90", 132), FAMILIES["sm90"].narrow[0].up
    room = torch.zeros(2**16, dtype=torch.bfloat16)

    def kind(shape: tuple[int, ...], strides: tuple[int, ...]) -> str:
        return _products._operand(room.as_strided(shape, strides), 64, tile, device, aligned=True)[1]

    assert kind((2, 48, 32), (48 * 32, 32, 1)) == "rows"
    assert kind((2, 48, 32), (64 * 64, 64, 1)) == "rows"
    assert kind((2, 48, 32), (48 * 32, 1, 48)) == "columns"
    assert kind((1, 48, 32), (7, 32, 1)) == "rows"
    assert kind((2, 48, 32), (0, 32, 1)) == kind((2, 48, 32), (32, 64, 1)) == kind((2, 48, 32), (48 * 32, 16, 1)) == ""
    assert kind((2, 48, 32), (48 * 32 + 16, 32, 1)) == ""
    assert _products._operand(room.float().view(4, 128, 128), 64, tile, device, aligned=True)[1] == ""


def test_configurations_are_well_formed() -> None:
    for name, family in FAMILIES.items():
        for regimes in (family.narrow, family.wide, family.odd):
            assert regimes[-1].rows == float("inf"), name
            assert [r.rows for r in regimes] == sorted({r.rows for r in regimes}), name
            for regime in regimes:
                assert regime.up.block_m == regime.down.block_m, name
                for size in (*regime.up[:3], *regime.down[:3]):
                    assert size >= 16, name
                    assert size & (size - 1) == 0, name


def test_configuration_follows_rows_per_expert() -> None:
    few, some, many = FAMILIES["sm90"].narrow

    def chosen(rows: float, **changed: bool) -> Regime:
        given = {"narrow": True, "aligned": True, "batch_invariant": False} | changed
        return regime_of("sm90", rows=rows, **given)

    assert [chosen(rows) for rows in (0.1, 16, 16.5, 64, 65, 1e6)] == [few, few, some, some, many, many]
    assert chosen(1, narrow=False) == FAMILIES["sm90"].wide[0]
    assert chosen(1, aligned=False) == FAMILIES["sm90"].odd[0]
    assert {chosen(rows, batch_invariant=True) for rows in (0.1, 20, 1e6)} == {many}


@pytest.mark.parametrize(
    ("backend", "arch", "family"),
    [
        ("cuda", 75, "sm75"),
        ("cuda", 80, "sm80"),
        ("cuda", 89, "sm86"),
        ("cuda", 90, "sm90"),
        ("cuda", 100, "sm100"),
        ("cuda", 103, "sm100"),
        ("cuda", 120, "sm86"),
        ("hip", "gfx950", "gfx942"),
    ],
)
def test_every_device_has_configurations(backend: str, arch: int | str, family: str) -> None:
    assert _configs.family_of(backend, arch) == family


def test_tf32_only_where_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(_operator, "forward", lambda x, *given: seen.append(given[6]) or torch.zeros_like(x))
    inputs = {dtype: inputs_of(replace(ALIGNED, dtype=dtype)) for dtype in ("float32", "float16")}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            for given in inputs.values():
                call(executors.get("triton"), given)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [False, False, True, False]  # never for fp16


@interpreted
@pytest.mark.usefixtures("new_kernels")
def test_offsets_are_64_bit() -> None:
    """index * stride of two int32, past 2^31."""

    @triton.jit
    def kernel(out, index, stride):
        tl.store(out + tl.arange(0, 4), offset(index + tl.arange(0, 4), stride))

    out = torch.zeros(4, dtype=torch.int64)
    kernel[(1,)](out, 2**16, 2**16 + 8)
    assert out.tolist() == [(2**16 + i) * (2**16 + 8) for i in range(4)]
    kernel[(1,)](out, 3, 2**31 - 1)
    assert out.tolist() == [(3 + i) * (2**31 - 1) for i in range(4)]


def test_addresses_are_made_by_offset_only() -> None:
    """No kernel of products multiplies with a stride or a size by itself: rows of h and of the slots, too (E5)."""
    source = Path(str(products.__file__)).read_text()
    assert re.findall(r".*\*\s*(?:stride\w*|strides\[|width\b|N\b|K\b).*", source.partition('(E5)."""')[2]) == [
        "    return index.to(tl.int64) * stride"
    ]


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
def test_strides_past_32_bits(transposed: bool, tmp_path: Path) -> None:
    """x, projections and biases lie spread over 2^32 numbers of a file that is all holes: nothing is allocated (E5)."""
    problem = replace(ALIGNED, tokens=5, experts=3, hidden=32, intermediate=16, bias_dtype="bfloat16")
    inputs = inputs_of(problem)
    path = tmp_path / "holes"
    size = 2**32
    with path.open("wb") as file:
        file.truncate(2 * size)
    room = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)

    def spread(value: torch.Tensor, start: int) -> torch.Tensor:
        """The same numbers; the first dimension far apart, so that the last entry lies past 2^31."""
        turned = transposed and value.ndim == 3
        inner = value.transpose(-1, -2).contiguous().transpose(-1, -2) if turned else value.contiguous()
        step = (2**32 - 2**20) // max(1, value.shape[0] - 1) // 16 * 16
        placed = room.as_strided(value.shape, (step, *inner.stride()[1:]), start)
        placed.copy_(value)
        return placed

    x = room.as_strided(inputs.x.shape, ((2**32 - 2**20) // 4 // 16 * 16, 1), 2**19)
    with torch.no_grad():
        x.copy_(inputs.x)
        parameters = inputs.weights.parameters().items()
        far = inputs.weights.with_parameters(
            {name: spread(v, place * 2**16) for place, (name, v) in enumerate(parameters)}
        )
        near = call(executors.get("triton"), inputs)
        assert same_bits(call(executors.get("triton"), replace(inputs, x=x, weights=far)), near)


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
@pytest.mark.usefixtures("new_kernels")
def test_interpreter_rounds_bfloat16_to_nearest_even() -> None:
    @triton.jit
    def kernel(values, out, n: tl.constexpr):
        tl.store(out + tl.arange(0, n), tl.load(values + tl.arange(0, n)).to(tl.bfloat16))

    rng = np.random.default_rng(0)
    random = torch.from_numpy(rng.integers(0, 2**32, 4080, dtype=np.uint32).view(np.float32))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38] * 2)
    values = torch.cat([random, special])
    out = torch.zeros(4096, dtype=torch.bfloat16)
    kernel[(1,)](values, out, 4096)
    expected = values.to(torch.bfloat16)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[~out.isnan()].view(torch.int16), expected[~out.isnan()].view(torch.int16))


@interpreted
@pytest.mark.usefixtures("new_kernels")
def test_interpreter_refuses_arithmetic_in_bfloat16() -> None:
    """It would add the bits as integers, without a word."""

    @triton.jit
    def kernel(values):
        tl.store(values, tl.load(values) + tl.load(values))

    with pytest.raises(Exception, match="arithmetic in bfloat16: must be in float32"):
        kernel[(1,)](torch.ones(1, dtype=torch.bfloat16))


@interpreted
def test_compare_shows_it_as_interpreted(tmp_path: Path) -> None:
    """The bundled layer passes; times are not measured."""
    command = ["-m", "executors", "compare", "--executor", "triton", "--tokens", "64", "--out", str(tmp_path)]
    done = python(*command, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpreted, not timed" in " ".join(done.stdout.replace("│", " ").split())
    (row,) = json.loads((tmp_path / "compare.json").read_text())["executors"]
    assert row["executor"] == "triton"
    assert row["seconds"] == {}


@interpreted
def test_bench_leaves_it_out_aloud(tmp_path: Path) -> None:
    command = ["-m", "executors", "bench", "--layer", "mixtral-8x7b", "--scale", "64", "--tokens", "1"]
    command += ["--direction", "forward", "--routing", "uniform", "--seconds", "0", "--executor", "triton"]
    done = python(*command, "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert "interpreted: its times mean nothing" in " ".join(done.stdout.replace("│", " ").split()), done.stderr
