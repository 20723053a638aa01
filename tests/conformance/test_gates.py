"""Each gate fails for the errors that it must see, and for no others."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from moe_ref.conformance.judgement.gates import judge, over
from moe_ref.error_bars import Part, TensorBars

U = 2.0**-8


def bars(exact: np.ndarray, samples: int = 32) -> TensorBars:
    """Independent errors of u times N(0, 1) around an exact value."""
    rng = np.random.default_rng(1)
    errors = rng.standard_normal((samples, exact.size)).astype(np.float32)
    gains = errors @ exact.ravel() / float(np.sum(exact**2))
    part = Part(np.ones_like(exact), gains, errors)
    none = Part(np.zeros_like(exact), np.zeros(samples), np.zeros_like(errors))
    return TensorBars(exact, part, none, np.arange(exact.size))


@pytest.fixture
def exact() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, 80))


def judged(actual: np.ndarray, exact: np.ndarray) -> str:
    return judge("y", actual, bars(exact), "bfloat16", "float64").failure


def test_honest_errors_pass(exact: np.ndarray) -> None:
    noise = np.random.default_rng(2).standard_normal(exact.shape)
    assert judged(exact + 0.9 * U * noise, exact) == ""


def test_one_element_far_out_fails(exact: np.ndarray) -> None:
    actual = exact.copy()
    actual[3, 5] += 6.5 * U
    assert judged(actual, exact).startswith("y(3, 5)=")
    assert "max z 6.5, limit 6" in judged(actual, exact)


def test_many_elements_somewhat_out_fail(exact: np.ndarray) -> None:
    noise = np.random.default_rng(2).uniform(-1, 1, exact.shape) * math.sqrt(3)
    failure = judged(exact + 1.2 * U * noise, exact)
    assert re.fullmatch(r"y: rms z=1\.2\d, but must be at most 1, over 5120 elements", failure)


def test_a_figure_just_past_its_limit_is_not_told_as_the_limit() -> None:
    assert over(1.0013, 1.0, 2) == "1.001"
    assert over(6.000004, 6.0) == "6.000004"
    assert over(8.25, 6.0) == "8.2"
    assert over(12345.6, 6.0) == "1.23e+04"
    assert over(math.inf, 6.0) == "inf"


@pytest.mark.parametrize(
    ("wrong", "clauses"), [({(2, 3): 9 * U}, "D1"), ({(0, 1): 1.0}, "D1, D2"), ({(0, 1): math.nan}, "D1, D2")]
)
def test_an_expert_without_tokens_is_told_apart(wrong: dict[tuple[int, int], float], clauses: str) -> None:
    """D2 is broken where a gradient must be zero by structure, and nowhere else."""
    exact = np.ones((3, 4))
    exact[0] = 0.0
    part = Part(exact, np.zeros(4), np.zeros((4, 12), dtype=np.float32))
    none = Part(np.zeros_like(exact), np.zeros(4), np.zeros((4, 12), dtype=np.float32))
    actual = exact.copy()
    for place, error in wrong.items():
        actual[place] += error
    verdict = judge("down_proj", actual, TensorBars(exact, part, none, np.arange(12)), "bfloat16", "float64")
    assert verdict.failure
    assert verdict.clauses == clauses


def test_few_elements_are_not_judged_by_rms() -> None:
    exact = np.random.default_rng(0).standard_normal((4, 8))
    noise = np.random.default_rng(2).uniform(-1, 1, exact.shape) * math.sqrt(3)
    assert judged(exact + 1.2 * U * noise, exact) == ""


def test_a_systematic_factor_fails(exact: np.ndarray) -> None:
    failure = judged(exact * (1 + 0.5 * U), exact)
    assert "gain" in failure


def test_structural_zeros_are_exact() -> None:
    part = Part(np.zeros((2, 2)), np.zeros(4), np.zeros((4, 4), dtype=np.float32))
    zero = TensorBars(np.zeros((2, 2)), part, part, np.arange(4))
    assert judge("y", np.zeros((2, 2)), zero, "bfloat16", "bfloat16").failure == ""
    off = np.array([[0.0, 1e-30], [0.0, 0.0]])
    assert judge("y", off, zero, "bfloat16", "bfloat16").failure == "y(0, 1)=1e-30, but must be exactly 0"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_masks_must_match(exact: np.ndarray, value: float) -> None:
    actual = exact.copy()
    actual[1, 2] = value
    assert judged(actual, exact).startswith("y(1, 2)=")
    assert judged(actual, exact).endswith(f"={value}, but must be {exact[1, 2]:.9g}")


def test_unjudged_elements_may_be_anything(exact: np.ndarray) -> None:
    actual = exact.copy()
    actual[1] = math.nan
    keep = np.arange(len(exact)) != 1
    assert judge("y", actual, bars(exact), "bfloat16", "float64", keep).failure == ""


def test_shape_must_match(exact: np.ndarray) -> None:
    assert judged(exact[:2], exact) == "y.shape=(2, 80), but must be (64, 80)"


def test_sd_is_at_least_half_its_row_s() -> None:
    exact = np.ones((1, 4))
    part = Part(np.array([[1.0, 1.0, 1.0, 0.01]]), np.zeros(4), np.zeros((4, 4), dtype=np.float32))
    none = Part(np.zeros((1, 4)), np.zeros(4), np.zeros((4, 4), dtype=np.float32))
    sd = TensorBars(exact, part, none, np.arange(4)).sd("bfloat16", "float64")
    np.testing.assert_allclose(sd[0, 3], U * math.sqrt(3.01 / 4) / 2, rtol=1e-6)
    np.testing.assert_allclose(sd[0, 0], U, rtol=1e-6)


def test_output_rounding_widens_the_bar(exact: np.ndarray) -> None:
    wide = bars(exact)
    narrow = replace(wide, storage=Part(np.zeros_like(exact), wide.storage.gains, wide.storage.probes))
    sd = narrow.sd("float32", "bfloat16")
    assert (sd >= (1 - 1e-12) * U * np.abs(exact) / math.sqrt(3)).all()
