"""Bugs planted in the text of the kernels: each must be seen by the checks that every executor passes."""

import importlib.util
import sys
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import pytest
import torch

import executors
from executors._decode import decode_experts
from executors._triton import interpreter as _interpreter
from executors._triton.configs import FAMILIES
from executors._triton.device import Device
from executors._triton.launch import decode
from executors._triton.launch import gradients as _gradients
from executors._triton.launch import grouping as _grouping
from executors._triton.launch import narrow as _narrow
from executors._triton.launch import products as _products
from executors._triton.launch import routing as _routing
from executors._triton.launch.grouping import CHUNK
from executors._triton.launch.operands import LaunchPlan
from guarded import guarded
from moe_ref import MoEConfig, MoEWeights, MXFP4Tensor, NF4Tensor
from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.judgement.checks import check_problem
from moe_ref.conformance.judgement.choices import admissible
from moe_ref.conformance.judgement.exact import check_exact
from moe_ref.conformance.judgement.faults import same_bits
from moe_ref.conformance.judgement.ranges import RANGES, check_range
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.pinned import PAST_RANGE
from moe_ref.conformance.problems.problem import Problem
from moe_ref.grouping import group
from moe_ref.routing import route, route_vjp
from moe_ref.types import Scoring
from triton_gradient_mutants import GRADIENT_MUTANTS
from triton_mutants import MUTANTS
from triton_packed_mutants import PACKED_MUTANTS
from triton_range_mutants import RANGE_MUTANTS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are planted in the interpreter")

KERNELS = Path(executors.__file__).parent / "_triton" / "kernels"
LAUNCHERS = (decode, _gradients, _grouping, _narrow, _products, _routing)
IMPORTERS = {
    "activation": ("products", "gradients"),
    "narrow": ("products",),
    "packed": ("products",),
    "scales": ("packed", "products"),
    "tiles": ("products",),
}  # kernels that call those of another file, in the order of their own imports

ALL_MUTANTS = MUTANTS | GRADIENT_MUTANTS | PACKED_MUTANTS | RANGE_MUTANTS
SUMMED = 2  # chunks

GPT_OSS = MoEConfig(2, scoring="topk_softmax", alpha=1.702, limit=1.0, up_offset=1.0, gate_up_layout="interleaved")
DEEPSEEK = MoEConfig(
    3,
    scoring="sigmoid",
    renormalize=True,
    routed_scaling_factor=2.5,
    num_groups=4,
    topk_groups=2,
    group_score="top2_sum",
    activation="geglu",
)
BASE = Problem(40, 5, 50, 70, GPT_OSS, gate_up_bias=True, down_bias=True)
BY_EXPERTS = replace(BASE, entry="experts")
NESTED = replace(
    BASE, tokens=12, hidden=64, intermediate=48, config=MoEConfig(2), quant_type="nf4", blocksize=64, nested="one"
)
# Each feature in which a kernel can go wrong is in one of them. Five experts of about 16 rows, tails everywhere.
PANEL = {
    "interleaved": BASE,
    "scaled": replace(BY_EXPERTS, config=MoEConfig(2, scale_input=True)),
    "late": replace(BASE, tokens=12, config=replace(GPT_OSS, limit=0.5, clamp="after")),
    "capped": replace(BASE, tokens=12, config=replace(GPT_OSS, limit=None, gate_softcap=2.0, up_softcap=25.0)),
    "concatenated": replace(BY_EXPERTS, config=MoEConfig(2, activation="geglu_tanh"), weights_layout="transposed"),
    "by columns": replace(BY_EXPERTS, tokens=12, weights_layout="transposed", dtype="bfloat16"),
    "plain": replace(BY_EXPERTS, config=MoEConfig(2, activation="relu2", scale_input=True), weights_layout="sliced"),
    "groups": Problem(17, 8, 16, 8, DEEPSEEK, selection_bias="small", broken_logits=3),
    "softmax": Problem(17, 9, 16, 8, MoEConfig(3), logits="masked"),
    "ties": Problem(17, 9, 16, 8, MoEConfig(4, scoring="sigmoid"), logits="ties", broken_logits=2),
    "erf": replace(BASE, tokens=12, config=MoEConfig(2, activation="geglu")),
    "sliced": replace(BASE, tokens=12, dy_layout="sliced", x_layout="sliced"),
    "frozen": replace(BASE, tokens=12, frozen=frozenset({"gate_up_proj", "down_proj"})),
    "adapters": replace(BASE, gate_up_rank=5, down_rank=18),
    "adapters, concatenated": replace(
        BY_EXPERTS, config=MoEConfig(2, scale_input=True), gate_up_rank=17, down_rank=3, dtype="bfloat16"
    ),
    "empty slots": replace(BY_EXPERTS, empty_slots=True, cut_points=True),
    "empty slots, scaled": replace(BY_EXPERTS, config=MoEConfig(2, scale_input=True), empty_slots=True),
    "first expert empty": replace(BY_EXPERTS, tokens=3, experts=12),
    # in 4 bits: few rows, decoded in the products; tiles have tails
    "nf4": replace(BASE, tokens=12, hidden=64, intermediate=80, quant_type="nf4", blocksize=32),
    "columns": replace(NESTED, quant_type="fp4", weights_layout="transposed", nested=""),
    "nested": NESTED,
    "per expert": replace(NESTED, nested="per expert", weights_layout="transposed"),
    "held": replace(
        BASE, tokens=8, hidden=384, quant_type="mxfp4", intermediate=64, dtype="bfloat16"
    ),  # runs of four scales
    "held per expert": replace(NESTED, hidden=384, blocksize=32, nested="per expert", dtype="bfloat16"),
    "odd rows": replace(BASE, tokens=12, hidden=17, intermediate=33, quant_type="nf4", blocksize=32),
    "mxfp4": replace(BASE, tokens=12, hidden=64, intermediate=96, quant_type="mxfp4", gate_up_rank=2),
    # many, decoded before them
    "decoded": replace(BASE, hidden=50, intermediate=70, quant_type="nf4", nested="one", weights_layout="transposed"),
    # dz past fp16's range, and what lies between the factors of adapters
    "past the range": PAST_RANGE[5],
    # weights so small that dz times them is subnormal in fp16 (C3)
    "small weights": Problem(
        16,
        3,
        16,
        8,
        MoEConfig(2, scale_input=True),
        "float16",
        entry="experts",
        powers=(("topk_weights", -13), ("x", 13)),
    ),
    "many slots": Problem(300, 5, 8, 8, MoEConfig(4, activation="silu"), entry="experts", cut_points=True),
}


@cache
def source(name: str) -> str:
    return (KERNELS / f"{name}.py").read_text()


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def check(name: str) -> None:
    """What every kernel must pass, in memory that has bands around it."""
    if name in ALONE:
        ALONE[name]()
        return
    if name in RANGES:
        check_range_in_small_steps(name)
        return
    with guarded(), patch.object(decode, "PARTS", 2):
        check_problem(executors.get("triton"), PANEL[name])


def check_range_in_small_steps(case: str) -> None:
    """Rows and columns are narrowed in several steps, with tails."""
    small = {"ROWS": 2, "ROW_COLUMNS": 8, "COLUMN_ROWS": 2, "COLUMNS": 16}
    with guarded(), patch.multiple(_narrow, **small):
        check_range(executors.get("triton"), case, "dense")


def check_grouping() -> None:
    """Slots of one chunk, of a few, and of more than the sum over chunks takes at a time, against a stable sort."""
    for tokens, experts, block_m in ((5, 3, 16), (130, 33, 32), (600, 70, 64), (2 * SUMMED * CHUNK // 4 + 7, 5, 16)):
        ids = torch.from_numpy(np.random.default_rng(tokens).integers(-2, experts + 2, (tokens, 4)))
        with guarded(), patch.object(_grouping, "BLOCK_C", SUMMED):
            found = _grouping.group(ids, experts, block_m)
        expected = group(ids.numpy(), experts)
        slots = int(expected.group_offsets[-1])
        assert found.order[:slots].tolist() == expected.order[:slots].tolist()
        assert found.group_offsets.tolist() == expected.group_offsets.tolist()
        tiles = [
            [expert, row, min(row + block_m, int(end))]
            for expert, (start, end) in enumerate(pairwise(expected.group_offsets))
            for row in range(start, end, block_m)
        ]
        assert found.tiles[0, 0] == len(tiles) <= found.most_tiles
        assert found.tiles[1 : len(tiles) + 1].tolist() == tiles


def special_logits() -> np.ndarray:
    """[T, 12]: large and small, infinite, undefined, and equal ones."""
    rng = np.random.default_rng(0)
    rows = np.round(rng.normal(size=(14, 12)) * 8) / 4  # ties in every row
    rows[1] += 200
    rows[2] -= 200
    rows[3, ::2] = -np.inf
    rows[4, 1:] = -np.inf
    rows[5] = -np.inf
    rows[6, 7] = np.inf
    rows[7, 2] = np.nan
    rows[8] = [0.0, -0.0] * 6
    rows[9] = [3.0, 3.0, -9.0, -9.0, 5.0, 0.0, 0.0, 0.0, 4.0, 4.0, -1.0, -1.0]  # the second of a group equals the first
    rows[10, 4:] = -np.inf
    rows[11] -= 50  # exp of it is no subnormal number yet
    rows[12] -= 12  # 1 + exp of it has few digits of exp
    return rows


def check_routing() -> None:
    """Every scoring, with and without groups and a bias, on logits that break what is careless."""
    logits = special_logits()
    bias = 1 + np.random.default_rng(1).permutation(36).reshape(12, 3)[:, 1] / 1000  # equal in bf16; a stride of 3
    for scoring, (groups, kept, score), use_bias, (renormalize, form, key) in product(
        get_args(Scoring),
        ((1, 1, "max"), (3, 2, "max"), (3, 2, "top2_sum")),
        (False, True),
        ((False, "add", "score"), (True, "add", "logit"), (True, "max", "score")),
    ):
        config = MoEConfig(
            5,
            scoring=scoring,
            renormalize=renormalize,
            renormalize_eps=0.125 if form == "add" else 0.7,
            renormalize_form=form,  # type: ignore[arg-type]
            routed_scaling_factor=2.5,
            num_groups=groups,
            topk_groups=kept,
            group_score=score,
            selection_key=key,  # type: ignore[arg-type]
        )
        own = torch.from_numpy(np.tile(bias[:, None], 3))[:, 1] if use_bias else None
        weights = MoEWeights(torch.zeros(12, 4, 4), torch.zeros(12, 4, 2), selection_bias=own, config=config)
        expected = route(logits, config, bias if use_bias else None)
        defined = ~np.isnan(expected.topk_weights).any(axis=1)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            given = torch.from_numpy(logits).to(dtype)
            exact = route(given.double().numpy(), config, bias if use_bias else None)
            with guarded():
                found = executors.get("triton").route(torch.stack([given, given], -1)[..., 0], weights)
            ids = found.topk_ids.numpy()
            assert all(len({*row} & {*range(12)}) == 5 for row in ids.tolist())
            if not (use_bias or groups > 1):
                assert (ids[defined] == exact.topk_ids[defined]).all()
            else:
                assert admissible(
                    ids[defined], given.double().numpy()[defined], config, bias if use_bias else None
                ).all()
            d_weights = np.random.default_rng(2).normal(size=ids.shape)
            backward = _routing.backward_operator(
                torch.from_numpy(d_weights).to(found.topk_weights.dtype),
                found.topk_ids,
                given,
                *(scoring, renormalize, config.renormalize_eps, config.routed_scaling_factor, form),
            )
            d_logits = route_vjp(given.double().numpy(), ids.astype(np.int64), config, d_weights)
            np.testing.assert_allclose(
                backward.double().numpy()[defined],
                d_logits[defined],
                rtol=2e-2 if dtype == torch.bfloat16 else 1e-4,
                atol=1e-5,
            )
            assert not backward[torch.from_numpy(~defined)].any()
            same = (ids == exact.topk_ids).all(axis=1) | ~defined
            np.testing.assert_allclose(
                found.topk_weights.numpy()[same], exact.topk_weights[same], rtol=1e-5, atol=1e-37
            )
            assert same.mean() > 0.7


def check_exact_cases() -> None:
    """Where every step is representable."""
    for case in ("clamp_at_equality", "late_clamp_at_equality", "small_integers"):
        check_exact(executors.get("triton"), case, "float32")


def check_decoding() -> None:
    """Every code under every power of two, and nested scales of each kind: bits as the other executors have them."""
    rng = np.random.default_rng(0)
    bytes_of = partial(rng.integers, 0, 256, dtype=np.uint8)
    everything = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 1, 1))  # [exponent, codes, 16]
    powers = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)
    mx = MXFP4Tensor(*map(torch.from_numpy, (everything.reshape(2, 128, 16, 16), powers.reshape(2, 128, 16))))
    stored = (3, 36, 136)  # blocks of 32, which straddle rows
    code = torch.from_numpy(np.sort(rng.normal(size=256)).astype(np.float32))

    def nested(shape: tuple[int, int, int], blocks: int, coarse: int, offset: torch.Tensor) -> NF4Tensor:
        scales = torch.from_numpy(rng.normal(size=coarse).astype(np.float32))
        codes = torch.from_numpy(bytes_of(size=int(np.prod(shape)) // 2))
        absmax = torch.from_numpy(bytes_of(size=blocks))
        return NF4Tensor(codes, absmax, scales, code, offset, shape=shape, dtype="float32", blocksize=32)

    one = nested(stored, 459, 2, torch.tensor(0.3))
    each = nested((3, 36, 256), 864, 6, torch.tensor([0.3, -0.7, 0.011]))
    for tensor in (mx, one, replace(one, quant_type="fp4"), each):
        for dtype in ("float32", "bfloat16", "float16"):
            packed = replace(tensor, dtype=dtype)
            expected = decode_experts(packed, torch.arange(packed.shape[0]))
            groups = _grouping.Groups(torch.empty(0), torch.arange(packed.shape[0] + 1), torch.empty(0), 0)
            plan = LaunchPlan(groups, 1, FAMILIES["interpreter"].narrow[0], Device("interpreter", 3), "ieee", True)
            with guarded():
                out = torch.empty(packed.shape, dtype=expected.dtype)
                _interpreter.mend()
                decode.decode(packed, 0, out, plan)
            assert torch.equal(out.isnan(), expected.isnan())
            assert same_bits(out.nan_to_num(7.0), expected.nan_to_num(7.0))


def check_neighbours() -> None:
    """What stands around scales in memory has no part in a result."""
    problem, results = PANEL["nf4"], []
    for around in (0.0, torch.nan):

        def moved(array: torch.Tensor, around: float = around) -> torch.Tensor:
            if not array.is_floating_point():
                return array
            return torch.nn.functional.pad(array, (64, 64), value=around)[64:-64]

        inputs = to_torch(problem, build(problem))
        packed = {name: value.map(moved) for name, value in inputs.weights.packed().items()}
        inputs = replace(inputs, weights=inputs.weights.with_parameters(packed))
        results.append(run(executors.get("triton"), inputs).tensors)
    for name, value in results[0].items():
        assert same_bits(value, results[1][name]), name


ALONE = {
    "grouping": check_grouping,
    "routing": check_routing,
    "exact": check_exact_cases,
    "decoding": check_decoding,
    "neighbours": check_neighbours,
}


@pytest.mark.parametrize("name", ALONE)
def test_alone(name: str) -> None:
    ALONE[name]()


def test_no_two_checks_have_one_name() -> None:
    """Or planted bugs would be looked for by another check than theirs."""
    assert len({*ALONE, *PANEL, *RANGES}) == len(ALONE) + len(PANEL) + len(RANGES)


@pytest.mark.parametrize("name", [*PANEL, *(name for name in RANGES if not RANGES[name].norm)])
def test_as_they_are(name: str) -> None:
    check(name)


def marked() -> list[Any]:
    """Every third one; the others every night."""
    return [
        pytest.param(mutant, marks=[pytest.mark.nightly] if place % 3 else [])
        for place, mutant in enumerate(ALL_MUTANTS)
    ]


def plant(mutant: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the launchers launch kernels with the bug, from files in the folder."""
    file, right, wrong, _ = ALL_MUTANTS[mutant]
    text = source(file)
    assert text.count(right) >= 1, "the kernels have changed: so must this mutant"
    texts = {file: text.replace(right, wrong)}
    for importer in IMPORTERS.get(file, ()):
        text = source(importer)
        for other in texts:
            text = text.replace(f"executors._triton.kernels.{other}", f"planted_{other}")
        texts[importer] = text
    for name, text in texts.items():
        planted = folder / f"planted_{name}.py"
        planted.write_text(text)
        module = load(planted)
        for launcher in LAUNCHERS:
            for attribute in [a for a in vars(launcher) if a.endswith("_kernel") and hasattr(module, a)]:
                monkeypatch.setattr(launcher, attribute, getattr(module, attribute))


@pytest.mark.usefixtures("new_kernels")
@pytest.mark.parametrize("mutant", marked())
def test_planted(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(mutant, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check(ALL_MUTANTS[mutant][3])
