"""The port in JAX: the package is what the registry expects, it passes, and it fails where it is broken."""

import importlib
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from executors import Executor
from moe_ref.conformance.judgement.checks import ConformanceError, applicable, check_problem
from moe_ref.conformance.judgement.exact import CASES, check_exact
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.vectors.cases import every_case
from moe_ref.conformance.vectors.folder import write_vectors
from moe_ref.conformance.vectors.judging import check_vector
from moe_ref.conformance.vectors.reading import read_folder
from moe_ref.types import MoEConfig, MoEWeights

PORT = Path(__file__).parents[2] / "examples" / "port_jax"
LIMITED = MoEConfig(2, alpha=1.702, limit=0.5, up_offset=1.0, gate_up_layout="interleaved")
GROUPS = MoEConfig(2, scoring="sigmoid", num_groups=2, topk_groups=1, renormalize=True, activation="geglu_tanh")
ON_INPUT = MoEConfig(2, activation="relu2", scale_input=True)
FAR_BELOW = MoEConfig(6, scoring="sqrtsoftplus", renormalize=True)
FULL = {"gate_up_bias": True, "down_bias": True, "gate_up_rank": 2, "down_rank": 1}
PROBLEMS = {
    "limited": Problem(5, 4, 8, 6, LIMITED, entry="experts", empty_slots=True, broken_x=1, **FULL),
    "groups": Problem(
        7, 8, 8, 6, GROUPS, "bfloat16", selection_bias="small", expert_scale=True, broken_logits=2, margins=True
    ),
    "normed": Problem(6, 4, 8, 6, ON_INPUT, "float16", post_expert_norm=True),
    "far below": Problem(33, 16, 8, 8, FAR_BELOW, selection_bias="small", logits="shifted", broken_logits=3, seed=1),
}


@pytest.fixture(scope="module")
def port() -> Iterator[Executor]:
    """As installed, from the entry point that the package declares."""
    (entry,) = tomllib.loads((PORT / "pyproject.toml").read_text())["project"]["entry-points"][
        "moe_ref.executors"
    ].items()
    sys.path.insert(0, str(PORT))
    try:
        yield EntryPoint(entry[0], entry[1], "moe_ref.executors").load()()
    finally:
        sys.path.remove(str(PORT))


def test_its_tests_are_one_line() -> None:
    (line,) = (PORT / "tests" / "test_conformance.py").read_text().splitlines()
    assert line.startswith("from moe_ref.conformance.suite import *")


@pytest.mark.nightly  # in every run of CI the suite and the vectors do
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_passes(port: Executor, name: str) -> None:
    check_problem(port, applicable(port, PROBLEMS[name]))


def test_sums_are_exact_in_16_bits(port: Executor) -> None:
    """E2: products of bf16 are summed in fp32."""
    assert check_exact(port, "long_sums", "bfloat16") == ""


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_exact_case(port: Executor, case: str, dtype: str) -> None:
    assert check_exact(port, case, dtype) == ""


@pytest.mark.nightly
def test_it_passes_all_vectors(port: Executor, tmp_path: Path) -> None:
    write_vectors(tmp_path / "v", every_case())
    folder = read_folder(tmp_path / "v")
    lacking = {check_vector(port, folder, name, "cpu") for name in folder.entries}
    assert "" in lacking


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, MoEWeights]:
    generator = torch.Generator().manual_seed(0)
    stacks = (torch.randn(shape, generator=generator, requires_grad=True) for shape in ((3, 12, 8), (3, 8, 6)))
    x = torch.randn(4, 8, generator=generator, requires_grad=True)
    ids = torch.tensor([[0, 2], [2, 0], [0, -1], [2, 2]])
    return x, ids, torch.ones(4, 2), MoEWeights(*stacks, config=MoEConfig(2))


def test_an_expert_without_rows_is_not_read(port: Executor) -> None:
    """Its NaN reaches neither y nor any gradient; with a row of its own it does (R7, D2)."""
    results = []
    for spoilt in (0.0, torch.nan):
        x, ids, w, weights = inputs()
        with torch.no_grad():
            weights.gate_up_proj[1], weights.down_proj[1] = spoilt, spoilt
        y = port.experts(x, topk_ids=ids, topk_weights=w, weights=weights)
        y.sum().backward()
        results.append([y.detach(), x.grad, weights.gate_up_proj.grad, weights.down_proj.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    ids[3, 0] = 1
    y = port.experts(x, topk_ids=ids, topk_weights=w, weights=weights)
    assert y.isnan().any(dim=1).tolist() == [False, False, False, True]


def test_ragged_dot_reads_what_it_should_not() -> None:
    """If this fails, JAX has changed: products.py and the README may be simpler."""
    rows, stack, sizes = jnp.ones((3, 2)), jnp.stack([jnp.ones((2, 2)), jnp.full((2, 2), jnp.nan)]), jnp.asarray([2, 0])
    assert np.isnan(jax.lax.ragged_dot(rows, stack, sizes)).all()


Change = Callable[[Any], Any]
BROKEN: dict[
    str, tuple[str, str, Change, str]
] = {  # by what is wrong: module, function, change, and the problem that shows it
    "the offset": ("layer", "activation", lambda f: lambda z, c: f(z, replace(c, up_offset=0.0)), "limited"),
    "the layout": (
        "layer",
        "activation",
        lambda f: lambda z, c: f(z, replace(c, gate_up_layout="concatenated")),
        "limited",
    ),
    "ties": ("routing", "largest", lambda f: lambda keys, n: jnp.argsort(keys, stable=True)[..., :n], "groups"),
    "the norm": ("layer", "normalized", lambda f: lambda outputs, arrays, layer: outputs, "normed"),
    "the square of the divisor": (
        *("routing", "renormalized"),
        lambda f: lambda s, c: s / sys.modules["port_jax.routing"].divisor(s, c),
        "far below",
    ),
}


@pytest.mark.nightly
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_port_fails(port: Executor, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, name, change, problem = BROKEN[what]
    module = importlib.import_module(f"port_jax.{file}")
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    jax.clear_caches()
    try:
        with pytest.raises(ConformanceError):
            check_problem(port, applicable(port, PROBLEMS[problem]))
    finally:
        monkeypatch.undo()
        jax.clear_caches()
