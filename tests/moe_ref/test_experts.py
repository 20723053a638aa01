"""Experts by hand: layouts, clamp, biases, rows of no expert (E1)."""

import math

import numpy as np

from moe_ref import MoEConfig, MoEWeights
from moe_ref.activations import activation, activation_vjp, join_gate_up, split_gate_up
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


def test_clamp_after_the_activation() -> None:
    config = MoEConfig(1, alpha=1.702, limit=0.5, up_offset=1.0, clamp="after")
    h = activation(np.array([[9.0, 0.25, -8.0, 0.125]]), config)
    expected = [(-0.5 + 1) * 0.5, (0.125 + 1) * 0.25 / (1 + math.exp(-1.702 * 0.25))]
    np.testing.assert_allclose(h, [expected], rtol=1e-15)


def test_the_late_clamp_has_slope_1_where_it_is_met() -> None:
    z = np.array([[1.0, 1.5, -1.0, 0.25]])  # so steep a sigmoid is 1: the first gate meets the limit
    dz = activation_vjp(z, MoEConfig(1, alpha=1000.0, limit=1.0, clamp="after"), np.ones((1, 2)))
    assert dz.tolist() == [[-1.0, 0.0, 1.0, 1.0]]


def test_softcaps_leave_the_sigmoid_alone() -> None:
    gate, up = 9.0, -8.0
    z, share = np.array([[gate, up]]), 1 / (1 + math.exp(-1.702 * gate))
    of_gate, of_up = 4 * math.tanh(gate / 4), 5 * math.tanh(up / 5)
    for caps, expected in (
        ({"gate_softcap": 4.0, "up_softcap": 5.0}, of_gate * share * (of_up + 1)),
        ({"gate_softcap": 4.0}, of_gate * share * (up + 1)),
        ({"up_softcap": 5.0}, gate * share * (of_up + 1)),
    ):
        h = activation(z, MoEConfig(1, alpha=1.702, up_offset=1.0, **caps))
        np.testing.assert_allclose(h, [[expected]], rtol=1e-14)


def test_gradients_of_every_form_are_those_of_differences() -> None:
    rng = np.random.default_rng(0)
    z, dh, step = 3 * rng.standard_normal((4, 10)), rng.standard_normal((4, 5)), 1e-6
    for form in ({"limit": 0.5, "clamp": "after"}, {"gate_softcap": 2.0}, {"gate_softcap": 2.0, "up_softcap": 0.5}):
        for alpha in (1.0, -1.702):
            config = MoEConfig(1, alpha=alpha, up_offset=1.0, gate_up_layout="interleaved", **form)
            dz = activation_vjp(z, config, dh)
            for column in range(10):
                shift = step * np.eye(10)[column]
                rise = activation(z + shift, config) - activation(z - shift, config)
                np.testing.assert_allclose(dz[:, column], (rise * dh).sum(1) / (2 * step), rtol=1e-6, atol=1e-8)


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
