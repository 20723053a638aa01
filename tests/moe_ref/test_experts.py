"""Experts by hand: layouts, clamp, biases, rows of no expert (E1)."""

import math

import numpy as np

from moe_ref import MoEConfig, MoEWeights
from moe_ref.activations import activation, join_gate_up, split_gate_up
from moe_ref.experts import experts


def silu(v: float) -> float:
    return v / (1 + math.exp(-v))


def test_layouts_name_the_halves() -> None:
    z = np.array([[1.0, 2.0, 3.0, 4.0]])
    gate, up = split_gate_up(z, MoEConfig(1))
    assert (gate.tolist(), up.tolist()) == ([[1, 2]], [[3, 4]])
    gate, up = split_gate_up(z, MoEConfig(1, gate_up_layout="interleaved"))
    assert (gate.tolist(), up.tolist()) == ([[1, 3]], [[2, 4]])


def test_join_is_the_inverse_of_split() -> None:
    z = np.arange(12.0).reshape(2, 6)
    for layout in ("concatenated", "interleaved"):
        config = MoEConfig(1, gate_up_layout=layout)
        assert (join_gate_up(*split_gate_up(z, config), config) == z).all()


def test_plain_swiglu() -> None:
    h = activation(np.array([[0.5, -2.0, 3.0, 4.0]]), MoEConfig(1))
    np.testing.assert_allclose(h, [[3 * silu(0.5), 4 * silu(-2.0)]], rtol=1e-15)


def test_clamped_swiglu_of_gpt_oss() -> None:
    config = MoEConfig(1, alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved")
    h = activation(np.array([[9.0, -8.0, -9.0, 8.0]]), config)
    expected = [(-7 + 1) * 7 / (1 + math.exp(-1.702 * 7)), (7 + 1) * -9 / (1 + math.exp(1.702 * 9))]
    np.testing.assert_allclose(h, [expected], rtol=1e-15)


def test_each_group_meets_its_expert_and_its_biases() -> None:
    gate_up = np.array([[[1.0], [1.0]], [[2.0], [1.0]], [[4.0], [1.0]]])
    down = np.array([[[1.0]], [[1.0]], [[-1.0]]])
    weights = MoEWeights(gate_up, down, np.array([[0.0, 5.0]] * 3), np.array([[10.0]] * 3), config=MoEConfig(1))
    rows = np.array([[1.0], [2.0], [3.0]])
    out = experts(rows, np.array([0, 2, 2, 3]), weights)
    expected = [(1 + 5) * silu(1) + 10, (2 + 5) * silu(2) + 10, -(3 + 5) * silu(12) + 10]
    np.testing.assert_allclose(out[:, 0], expected, rtol=1e-15)


def test_rows_of_no_group_are_never_read() -> None:
    weights = MoEWeights(np.ones((1, 2, 1)), np.ones((1, 1, 1)), config=MoEConfig(1))
    out = experts(np.array([[1.0], [math.nan]]), np.array([0, 1]), weights)
    assert out[1, 0] == 0.0


def test_weights_are_widened_not_rounded() -> None:
    third = np.float32(1 / 3)
    weights = MoEWeights(np.full((1, 2, 1), third), np.ones((1, 1, 1), dtype=np.float32), config=MoEConfig(1))
    out = experts(np.array([[1.0]]), np.array([0, 1]), weights)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out[0, 0], float(third) * silu(float(third)), rtol=1e-15)
