"""Error bars are reproducible, complete, zero where nothing can err, and as large as real roundings."""

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_ref import MoEConfig, moe_vjp, routed_experts_vjp
from moe_ref.conformance.judgement.reference import bars_of, reference
from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.error_bars import TensorBars, named
from moe_ref.numerics import Nearest, Perturbed, round_to_nearest
from moe_ref.samples import Recorded, Replayed

PROBLEM = Problem(
    16, 6, 12, 7, MoEConfig(3, scoring="sigmoid", renormalize=True), "bfloat16", gate_up_bias=True, down_bias=True
)


def sampled(arrays: Arrays, **options: object) -> dict[str, TensorBars]:
    return bars_of(arrays, **{"dtype": "bfloat16", "samples": 4, **options})


def test_exact_values_are_the_specification_s() -> None:
    arrays = build(PROBLEM)
    y, gradients = moe_vjp(arrays.x, arrays.router_logits, arrays.weights, arrays.dy)
    exact = named(y, gradients)
    bars = sampled(arrays)
    assert set(bars) == set(exact)
    for name, value in exact.items():
        np.testing.assert_allclose(bars[name].exact, value, rtol=0, atol=1e-13)


def test_same_seed_same_bars() -> None:
    arrays = build(PROBLEM)
    first, second, other = sampled(arrays), sampled(arrays), sampled(arrays, seed=1)
    assert (first["y"].storage.variance == second["y"].storage.variance).all()
    assert (first["y"].storage.variance != other["y"].storage.variance).any()


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = build(PROBLEM)
    whole = sampled(arrays)
    monkeypatch.setattr("moe_ref.error_bars.CHUNK_ELEMENTS", 1)
    np.testing.assert_allclose(sampled(arrays)["x"].storage.variance, whole["x"].storage.variance, rtol=1e-6)


def test_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bars are equal to the last bit, and threads inherit np.errstate for the NaN in x."""
    arrays = build(replace(PROBLEM, broken_x=1))
    monkeypatch.setattr("moe_ref.error_bars.CHUNK_ELEMENTS", 1)
    found = []
    for count in (1, 3):
        monkeypatch.setattr("moe_ref.error_bars.processors", lambda count=count: count)
        used: set[int] = set()

        def noting(*arguments: Any, used: set[int] = used) -> Perturbed:
            used.add(threading.get_ident())
            time.sleep(0.01)  # another thread's turn
            return Perturbed(*arguments)

        monkeypatch.setattr("moe_ref.error_bars.Perturbed", noting)
        with np.errstate(invalid="ignore"):
            found.append(sampled(arrays, samples=7))
        assert len(used) == count
    for name, one in found[0].items():
        for kind in ("storage", "accumulation"):
            for figure in ("variance", "gains", "probes"):
                several = getattr(getattr(found[1][name], kind), figure)
                np.testing.assert_array_equal(getattr(getattr(one, kind), figure), several)


def test_deviations_of_the_exact_run_serve_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that compute their own deviations, as past the memory limit, give the same bars."""
    arrays = build(PROBLEM)
    kept = sampled(arrays, samples=64)
    monkeypatch.setattr("moe_ref.samples.KEPT_BYTES", 1000)
    own = sampled(arrays, samples=64)
    for name, bars in kept.items():
        ratio = own[name].accumulation.variance.mean() / bars.accumulation.variance.mean()
        assert 0.8 < ratio < 1.25, name
        assert ratio != 1.0, name


def test_deviations_belong_to_their_sites() -> None:
    recorded, one = Recorded(), np.ones((1, 2))
    recorded.accumulate("z", one, lambda: one)
    with pytest.raises(AssertionError, match=r"^h: must come as in the exact run, which has z here"):
        Replayed(Perturbed("accumulation", 3), recorded).accumulate("h", one, lambda: one)


def test_experts_without_tokens_have_no_error() -> None:
    """D2: a bar of zero demands exactly zero."""
    bars = reference(replace(PROBLEM, tokens=1)).bars
    unused = [e for e in range(6) if not bars["gate_up_proj"].exact[e].any()]
    assert len(unused) == 3
    assert not bars["gate_up_proj"].sd("bfloat16", "bfloat16")[unused].any()
    assert not bars["down_proj_bias"].sd("bfloat16", "bfloat16")[unused].any()


def test_a_vanishing_gradient_keeps_its_terms_error() -> None:
    """With K=1 and renormalisation the exact gradient of the router is 0, but an implementation's is not."""
    problem = replace(PROBLEM, config=MoEConfig(1, renormalize=True, renormalize_eps=0.0), dtype="float32")
    d_logits = reference(problem).bars["router_logits"]
    assert np.abs(d_logits.exact).max() < 1e-15
    assert (d_logits.sd("float32", "float32").max(axis=1) > 1e-9).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bars_have_the_size_of_real_roundings(dtype: str) -> None:
    """The twin that rounds at every site strays by about one standard deviation."""
    problem = replace(PROBLEM, tokens=64, hidden=64, intermediate=32, dtype=dtype, entry="experts")
    truth = reference(problem)
    arrays = truth.arrays
    y, gradients = routed_experts_vjp(
        arrays.x, arrays.topk_ids, arrays.topk_weights, arrays.weights, arrays.dy, Nearest(dtype)
    )
    for name, value in named(y, gradients).items():
        bars, out = truth.bars[name], problem.dtype_of(name)
        z = (round_to_nearest(value, out) - bars.exact) / bars.sd(dtype, out)
        assert 0.25 < np.sqrt(np.mean(z**2)) < 1.0, name
        assert np.abs(z).max() < 5, name


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    sampled(build(PROBLEM), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (8, 8)


def test_exactly_one_kind_of_routing() -> None:
    arrays = build(PROBLEM)
    with pytest.raises(TypeError, match=r"^router_logits, topk_weights: exactly one of the two must be given$"):
        sampled(replace(arrays, router_logits=None))


def test_infinite_elements_are_left_out() -> None:
    """An infinity in x spoils the gradients of its experts, but no bar of any other element."""
    problem = replace(PROBLEM, tokens=64, hidden=64, intermediate=32, dtype="float32", broken_x=1)
    truth = next(t for t in (reference(replace(problem, seed=s)) for s in range(20)) if t.infinite.any())
    for name, bars in truth.bars.items():
        for figure in (bars.sd("float32", "float32"), bars.rms_sd("float32", "float32")):
            assert np.isfinite(figure).all(), name
        assert np.isfinite(bars.gain_sd("float32", "float32"))
        assert not bars.sd("float32", "float32")[~np.isfinite(bars.exact)].any()


@pytest.mark.parametrize("scaled", [False, True])
def test_y_alone_is_that_of_the_whole(scaled: bool) -> None:
    arrays = build(replace(PROBLEM, expert_scale=scaled))
    whole, alone = sampled(arrays), sampled(replace(arrays, dy=None))
    assert list(alone) == ["y"]
    assert np.array_equal(alone["y"].exact, whole["y"].exact)
    assert np.array_equal(alone["y"].storage.variance, whole["y"].storage.variance)
