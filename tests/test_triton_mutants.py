"""Bugs planted in the text of the kernels: each must be seen by the checks that every executor passes."""

import importlib.util
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch

import executors
from executors.triton import _grouping, _products, _routing
from executors.triton._grouping import CHUNK
from guarded import guarded
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.build import build
from moe_ref.conformance.call import call, to_torch
from moe_ref.conformance.checks import check_problem
from moe_ref.conformance.choices import admissible
from moe_ref.conformance.problem import Problem
from moe_ref.grouping import group
from moe_ref.routing import route

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are planted in the interpreter")

KERNELS = Path(executors.__file__).parent / "triton" / "kernels"
LAUNCHERS = {
    "activation": (_products,),
    "combine": (_products,),
    "grouping": (_grouping,),
    "products": (_products,),
    "routing": (_routing,),
}

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
# Each feature in which a kernel can go wrong is in one of them. Five experts of about 16 rows, tails everywhere.
PANEL = {
    "interleaved": BASE,
    "scaled": replace(BY_EXPERTS, config=MoEConfig(2, scale_input=True)),
    "concatenated": replace(BY_EXPERTS, config=MoEConfig(2, activation="geglu_tanh")),
    "plain": replace(BY_EXPERTS, config=MoEConfig(2, activation="relu2", scale_input=True), weights_layout="sliced"),
    "groups": Problem(17, 8, 16, 8, DEEPSEEK, selection_bias="small", broken_logits=3),
    "softmax": Problem(17, 9, 16, 8, MoEConfig(3), logits="masked"),
    "ties": Problem(17, 9, 16, 8, MoEConfig(4, scoring="sigmoid"), logits="ties", broken_logits=2),
    "empty slots": replace(BY_EXPERTS, empty_slots=True, cut_points=True),
    "many slots": Problem(300, 5, 8, 8, MoEConfig(4, activation="silu"), entry="experts", cut_points=True),
}

# file, what stands there, what a mutant has instead, and a problem that shows it
MUTANTS = {
    "the last tile of the up projection is dropped": (
        "products",
        "num_row_tiles * num_column_tiles, tl.num_programs(0)",
        "num_row_tiles * num_column_tiles - 1, tl.num_programs(0)",
        "interleaved",
    ),
    "the last row tile is dropped": ("grouping", "tl.store(tiles, total)", "tl.store(tiles, total - 1)", "grouping"),
    "one k too few": ("products", "(ks < K)[:, None]", "(ks < K - 1)[:, None]", "interleaved"),
    "one k too few of x": ("products", "mask=(ks < K)[None, :]", "mask=(ks < K - 1)[None, :]", "concatenated"),
    "no mask at the tail of k": ("products", "& (ks < K)[:, None]", "", "plain"),
    "bias missing in the second half of the columns": (
        "products",
        "mask=columns < N, other=0.0).to(tl.float32)[None, :]",
        "mask=columns < N // 2, other=0.0).to(tl.float32)[None, :]",
        "interleaved",
    ),
    "the wrong expert's bias": (
        "products",
        "offset(expert, stride_be)",
        "offset(tl.maximum(expert - 1, 0), stride_be)",
        "concatenated",
    ),
    "the wrong expert's matrix": (
        "products",
        "offset(expert, strides[0])",
        "offset(tl.maximum(expert - 1, 0), strides[0])",
        "plain",
    ),
    "the row of another token": ("products", "offset(slots // TOP_K,", "offset(slots % TOP_K,", "interleaved"),
    "the weight of the row instead of the slot": (
        "products",
        "o *= tl.load(topk_weights + slots)",
        "o *= tl.load(topk_weights + tl.minimum(rows, end - 1))",
        "concatenated",
    ),
    "the input's weight forgotten": ("products", "z *= scale", "z *= 1.0", "plain"),
    "up's weight forgotten": ("products", "up *= scale", "up *= 1.0", "scaled"),
    "rows beyond the group are stored": (
        "products",
        "mask=(rows < end)[:, None] & (out < width)",
        "mask=(rows < end + 1)[:, None] & (out < width)",
        "interleaved",
    ),
    "columns beyond the last are stored": (
        "products",
        "& (columns < N)[None, :])",
        "& (columns < N + 1)[None, :])",
        "interleaved",
    ),
    "gate and up swapped": ("products", "value = gated(even, odd,", "value = gated(odd, even,", "interleaved"),
    "gate and up swapped, concatenated": ("products", "value = gated(z, up,", "value = gated(up, z,", "concatenated"),
    "column tiles beyond the first group of row tiles": (
        "products",
        "tile % per_group // height",
        "tile % per_group // GROUP_M",
        "interleaved",
    ),
    "no clamp from below": ("activation", "tl.where(up < -LIMIT, -LIMIT, up)", "up", "interleaved"),
    "gate clamped on both sides": (
        "activation",
        "gate = tl.where(gate > LIMIT, LIMIT, gate)",
        "gate = tl.where(gate > LIMIT, LIMIT, tl.where(gate < -LIMIT, -LIMIT, gate))",
        "interleaved",
    ),
    "alpha forgotten": ("activation", "gate if ALPHA == 1.0 else ALPHA * gate", "gate", "interleaved"),
    "the offset of up forgotten": ("activation", "up if UP_OFFSET == 0.0 else up + UP_OFFSET", "up", "interleaved"),
    "another cubic": ("activation", "0.044715", "0.04", "concatenated"),
    "erf for tanh": ("activation", 'ACTIVATION == "geglu":', 'ACTIVATION != "silu":', "concatenated"),
    "the last slot is not summed": ("combine", "range(TOP_K)", "range(TOP_K - 1)", "interleaved"),
    "empty slots are summed": ("combine", "there & full[:, None]", "there", "empty slots"),
    "an id of E is an expert": ("combine", "(ids < num_experts)", "(ids <= num_experts)", "empty slots"),
    "ranks begin at 1": ("grouping", "tl.gather(rows, ids, 0) +", "1 + tl.gather(rows, ids, 0) +", "grouping"),
    "later slots first": ("grouping", "[None, :] < tl.arange", "[None, :] > tl.arange", "grouping"),
    "an id below 0 is expert 0": ("grouping", "(ids >= 0) & (ids < num_experts)", "ids < num_experts", "grouping"),
    "chunks before are not counted": ("grouping", "rows = ends - own + before", "rows = ends - own", "grouping"),
    "a chunk counts itself": ("grouping", "tl.cumsum(found, 0) - found", "tl.cumsum(found, 0)", "grouping"),
    "the sum over chunks starts anew": (
        "grouping",
        "total += tl.sum(found, 0)",
        "total = tl.sum(found, 0)",
        "grouping",
    ),
    "no first offset": ("grouping", "tl.store(group_offsets, 0)", "tl.store(group_offsets, 1)", "grouping"),
    "tiles overlap": (
        "grouping",
        "tl.gather(ends - counts, expert, 0)) * BLOCK_M",
        "tl.gather(ends - counts, expert, 0)) * (BLOCK_M - 1)",
        "grouping",
    ),
    "a tile ends with its rows": (
        "grouping",
        "tl.minimum(row + BLOCK_M, end)",
        "row + BLOCK_M",
        "grouping",
    ),
    "a higher id wins": (
        "routing",
        "ranks = ordered(without_nan(keys))",
        "ranks = experts + 0 * ordered(keys)",
        "ties",
    ),
    "+0 above -0": ("routing", "keys = tl.where(keys == 0.0, 0.0, keys)", "keys = keys", "ties"),
    "-inf keeps its bias": (
        "routing",
        "tl.where(logits > LOWEST, without_nan(keys), LOWEST)",
        "without_nan(keys)",
        "routing",
    ),
    "the bias is contiguous": ("routing", "experts.to(tl.int64) * stride_bias", "experts.to(tl.int64)", "routing"),
    "the bias in the dtype of logits": (
        "routing",
        "bias.to(keys.dtype)",
        "bias.to(router_logits.dtype.element_ty).to(keys.dtype)",
        "routing",
    ),
    "softmax without its largest": (
        "routing",
        "tl.exp(sound - tl.max(sound, axis=1)[:, None])",
        "tl.exp(sound)",
        "routing",
    ),
    "softmax of the chosen without its largest": (
        "routing",
        "tl.exp(chosen - tl.max(chosen, axis=1)[:, None])",
        "tl.exp(chosen)",
        "routing",
    ),
    "equal keys count once in a group": (
        "routing",
        "tl.where(experts == place[:, None], LOWEST, own)",
        "tl.where(own == best[:, None], LOWEST, own)",
        "routing",
    ),
    "sigmoid overflows": ("routing", "small = tl.exp(-tl.abs(value))", "small = tl.exp(-value)", "routing"),
    "no epsilon": ("routing", "[:, None] + EPS)", "[:, None])", "routing"),
    "the selection bias in the weight": (
        "routing",
        "keys = scores\n",
        "scores += 0.1\n        keys = scores\n",
        "groups",
    ),
    "the selection bias forgotten": ("routing", "keys += bias.to(keys.dtype)", "keys += 0.0", "groups"),
    "one group too many": ("routing", "range(TOPK_GROUPS)", "range(TOPK_GROUPS + 1)", "groups"),
    "groups by their largest key": ("routing", "if TOP2:", "if TOP2 and NUM_GROUPS < 0:", "groups"),
    "renormalised no more": ("routing", "if RENORMALIZE:", "if RENORMALIZE and TOP_K < 0:", "groups"),
    "the factor forgotten": ("routing", "chosen * SCALING", "chosen", "groups"),
    "softmax over the chosen for softmax over all": (
        "routing",
        'SCORING == "topk_softmax":',
        'SCORING != "sigmoid":',
        "softmax",
    ),
    "broken rows get weights": (
        "routing",
        'tl.where(broken[:, None] == 1, float("nan"), chosen * SCALING)',
        "chosen * SCALING",
        "ties",
    ),
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
    """What every kernel must pass: first in memory that has bands around it, then against the specification."""
    if name in ALONE:
        ALONE[name]()
        return
    problem = PANEL[name]
    inputs = to_torch(problem, build(problem))
    with torch.no_grad(), guarded():
        call(executors.get("triton"), inputs)
    check_problem(executors.get("triton"), problem)


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
    return rows


def check_routing() -> None:
    """Every scoring, with and without groups and a bias, on logits that break what is careless."""
    logits = special_logits()
    bias = 1 + np.random.default_rng(1).permutation(36).reshape(12, 3)[:, 1] / 1000  # equal in bf16; a stride of 3
    for scoring, (groups, kept, score), use_bias, renormalize in product(
        ("softmax", "topk_softmax", "sigmoid"),
        ((1, 1, "max"), (3, 2, "max"), (3, 2, "top2_sum")),
        (False, True),
        (False, True),
    ):
        config = MoEConfig(
            5,
            scoring=scoring,
            renormalize=renormalize,
            renormalize_eps=0.125,
            routed_scaling_factor=2.5,
            num_groups=groups,
            topk_groups=kept,
            group_score=score,
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
            same = (ids == exact.topk_ids).all(axis=1) | ~defined
            np.testing.assert_allclose(
                found.topk_weights.numpy()[same], exact.topk_weights[same], rtol=1e-5, atol=1e-37
            )
            assert same.mean() > 0.7


ALONE = {"grouping": check_grouping, "routing": check_routing}


@pytest.mark.parametrize("name", ALONE)
def test_alone(name: str) -> None:
    ALONE[name]()


@pytest.mark.parametrize("name", PANEL)
def test_as_they_are(name: str) -> None:
    check(name)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, problem = MUTANTS[mutant]
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # settled when a kernel is made
    text = source(file)
    assert text.count(right) >= 1, "the kernels have changed: so must this mutant"
    planted = tmp_path / f"planted_{file}.py"
    planted.write_text(text.replace(right, wrong))
    module = load(planted)
    if file == "activation":  # products import it by name
        other = tmp_path / "planted_products.py"
        other.write_text(source("products").replace("executors.triton.kernels.activation", "planted_activation"))
        module = load(other)
    for launcher in LAUNCHERS[file]:
        for attribute in [a for a in vars(launcher) if a.endswith("_kernel") and hasattr(module, a)]:
            monkeypatch.setattr(launcher, attribute, getattr(module, attribute))
    with pytest.raises(AssertionError):
        check(problem)
