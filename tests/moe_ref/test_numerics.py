"""Rounding to the formats, and the policies that perturb."""

import math

import numpy as np
import pytest
import torch

from moe_ref.numerics import EXACT, FORMATS, Nearest, Perturbed, matmul_transposed, round_to_nearest, sum_sd

LOW = ["float32", "bfloat16", "float16"]


def spread(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(20_000) * 10.0 ** rng.integers(-50, 39, 20_000)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounds_as_torch_does(dtype: str) -> None:
    v = spread()
    expected = torch.from_numpy(v).to(getattr(torch, dtype)).double().numpy()
    np.testing.assert_array_equal(round_to_nearest(v, dtype), expected)


def test_rounds_to_fp16_as_numpy_does() -> None:
    v = spread()
    with np.errstate(over="ignore"):
        expected = v.astype(np.float16).astype(np.float64)
    np.testing.assert_array_equal(round_to_nearest(v, "float16"), expected)


def test_rounds_once_where_torch_rounds_twice() -> None:
    """torch rounds fp64 to fp16 through fp32, where this number becomes a tie and takes the even neighbour."""
    assert round_to_nearest(np.array([51.7343741]), "float16")[0] == 51.71875


@pytest.mark.parametrize("dtype", LOW)
def test_ties_go_to_even(dtype: str) -> None:
    u = FORMATS[dtype].unit_roundoff
    assert round_to_nearest(np.array([1 + u, 1 + 3 * u]), dtype).tolist() == [1.0, 1 + 4 * u]


@pytest.mark.parametrize("dtype", LOW)
def test_subnormals_overflow_and_nan(dtype: str) -> None:
    fmt = FORMATS[dtype]
    tiny = fmt.smallest_normal * 2 * fmt.unit_roundoff  # the smallest subnormal
    values = np.array([tiny, 0.4 * tiny, 0.6 * tiny, fmt.max, 1.01 * fmt.max, -math.inf, math.nan])
    expected = [tiny, 0.0, tiny, fmt.max, math.inf, -math.inf, math.nan]
    np.testing.assert_array_equal(round_to_nearest(values, dtype), expected)


@pytest.mark.parametrize("dtype", LOW)
def test_torch_and_numpy_round_alike(dtype: str) -> None:
    v = spread(1)
    np.testing.assert_array_equal(round_to_nearest(torch.from_numpy(v), dtype).numpy(), round_to_nearest(v, dtype))


def test_exact_returns_what_it_was_given() -> None:
    v = np.ones(3)
    assert EXACT.store("z", v) is v
    assert EXACT.accumulate("y", v, lambda: pytest.fail("not needed")) is v


def test_nearest_stores_low_and_accumulates_wide() -> None:
    third = np.array([1 / 3])
    twin = Nearest("bfloat16")
    assert twin.store("z", third)[0] == round_to_nearest(third, "bfloat16")[0]
    assert twin.accumulate("y", third, lambda: third)[0] == np.float32(1 / 3)


def errors(kind: str, value: np.ndarray, samples: int = 4000) -> np.ndarray:
    policy = Perturbed(kind, samples, seed=1)
    if kind == "storage":
        return (policy.store("z", value[None]) - value) / policy.scale
    return (policy.accumulate("z", value[None], lambda: np.ones_like(value)[None]) - value) / policy.scale


def test_storage_errors_are_uniform_in_units_of_the_value() -> None:
    e = errors("storage", np.array([1.5, -40.0]))
    np.testing.assert_allclose(e.std(axis=0), np.array([1.5, 40.0]) / math.sqrt(3), rtol=0.05)
    assert np.abs(e).max() <= 40.0
    np.testing.assert_allclose(e.mean(axis=0), 0, atol=2.0)


def test_accumulation_errors_have_the_deviation_asked_for() -> None:
    np.testing.assert_allclose(errors("accumulation", np.array([1.5, -40.0])).std(axis=0), 1.0, rtol=0.05)


def test_each_kind_leaves_the_other_s_sites_alone() -> None:
    v = np.array([[1.5]])
    assert (Perturbed("storage", 3).accumulate("y", v, lambda: v) == v).all()
    assert (Perturbed("accumulation", 3).store("y", v) == v).all()


def test_equal_values_err_equally_in_even_samples_and_alone_in_odd_ones() -> None:
    e = errors("storage", np.array([1.5, 1.5, 3.0]), samples=100)
    assert (e[0::2, 0] == e[0::2, 1]).all()
    np.testing.assert_allclose(2 * e[0::2, 0], e[0::2, 2], rtol=1e-9)
    assert (e[1::2, 0] != e[1::2, 1]).all()


def test_samples_do_not_depend_on_how_they_are_split() -> None:
    v = np.array([[0.3, 0.7]])
    whole = Perturbed("storage", 6, seed=3).store("z", v)
    parts = [Perturbed("storage", 3, seed=3, first=first).store("z", v) for first in (0, 3)]
    assert (whole == np.concatenate(parts)).all()


def test_sites_and_seeds_are_independent() -> None:
    v = np.array([[0.3]])
    policy = Perturbed("storage", 5, seed=3)
    assert (policy.store("z", v) != policy.store("h", v)).all()
    assert (policy.store("z", v) != Perturbed("storage", 5, seed=4).store("z", v)).all()


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_sum_sd_covers_fp32_sums_in_order(mean: float) -> None:
    """Measured: sums of 512 fp32 terms added one by one, of random signs and of one sign."""
    rng = np.random.default_rng(0)
    terms = (rng.standard_normal((2000, 512)) + mean).astype(np.float32)
    total = np.zeros(2000, dtype=np.float32)
    for column in terms.T:
        total = total + column
    exact = terms.astype(np.float64)
    sd = 2.0**-24 * sum_sd(exact.sum(axis=1), (exact**2).sum(axis=1), 512)
    rms = np.sqrt(np.mean(((total - exact.sum(axis=1)) / sd) ** 2))
    assert 0.3 < rms < 1.0


def test_matmul_transposed_is_one() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 4)), rng.standard_normal((5, 4))
    assert (matmul_transposed(EXACT, "z", a, b) == a @ b.T).all()
