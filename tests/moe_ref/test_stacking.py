"""`MoEWeights.stack`: experts one by one, gate and up apart, in either layout, in NumPy and in torch."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import executors
from moe_ref import MoEConfig, MoEWeights, moe, nf4

E, H, I, T = 3, 5, 4, 6  # noqa: E741
RNG = np.random.default_rng(0)
GATE, UP = RNG.standard_normal((2, E, I, H))
GATE_BIAS, UP_BIAS = RNG.standard_normal((2, E, I))
DOWN, DOWN_BIAS = RNG.standard_normal((E, H, I)), RNG.standard_normal((E, H))
X, LOGITS = RNG.standard_normal((T, H)), RNG.standard_normal((T, E))
LAYOUTS = ("concatenated", "interleaved")


def by_hand() -> np.ndarray:
    """The layer of K = E experts whose gate and up are apart, one expert at a time."""
    scores = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    y = np.zeros((T, H))
    for e in range(E):
        gate, up = X @ GATE[e].T + GATE_BIAS[e], X @ UP[e].T + UP_BIAS[e]
        y += scores[:, e, None] * ((up * gate / (1 + np.exp(-gate))) @ DOWN[e].T + DOWN_BIAS[e])
    return y


def parts(form: Any) -> dict[str, Any]:
    given = {
        "gate_proj": GATE,
        "up_proj": UP,
        "down_proj": DOWN,
        "gate_proj_bias": GATE_BIAS,
        "up_proj_bias": UP_BIAS,
        "down_proj_bias": DOWN_BIAS,
    }
    return {name: form(value) for name, value in given.items()}


FORMS: dict[str, Any] = {
    "stacks": lambda value: value,
    "lists": list,
    "tuples": tuple,
    "torch stacks": torch.from_numpy,
    "lists of tensors": lambda value: list(torch.from_numpy(value)),
    "parameters": lambda value: torch.nn.ParameterList(map(torch.nn.Parameter, torch.from_numpy(value))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_e1_the_layer_is_the_one_by_hand(form: str, layout: str) -> None:
    """However gate and up are laid."""
    config = MoEConfig(E, gate_up_layout=layout)
    weights = MoEWeights.stack(**parts(FORMS[form]), config=config)
    assert tuple(weights.gate_up_proj.shape) == (E, 2 * I, H)
    x, logits = (X, LOGITS) if form in ("stacks", "lists", "tuples") else map(torch.from_numpy, (X, LOGITS))
    np.testing.assert_allclose(
        np.asarray(moe(x, logits, weights).detach() if hasattr(x, "to") else moe(x, logits, weights)),
        by_hand(),
        rtol=1e-12,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_where_the_layout_says(layout: str) -> None:
    weights = MoEWeights.stack(**parts(list), config=MoEConfig(1, gate_up_layout=layout))
    gate, up = (slice(0, None, 2), slice(1, None, 2)) if layout == "interleaved" else (slice(I), slice(I, None))
    for name, halves in (("gate_up_proj", (GATE, UP)), ("gate_up_proj_bias", (GATE_BIAS, UP_BIAS))):
        assert (getattr(weights, name)[:, gate] == halves[0]).all()
        assert (getattr(weights, name)[:, up] == halves[1]).all()


@pytest.mark.parametrize("name", ["native", "grouped_mm", "numba", "triton", "auto"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_executors_compute_what_was_stacked(name: str, layout: str) -> None:
    if name not in executors.available():
        pytest.skip(f"{name} is not available here")
    weights = MoEWeights.stack(**parts(FORMS["lists of tensors"]), config=MoEConfig(E, gate_up_layout=layout))
    given = (torch.from_numpy(value).float() for value in (X, LOGITS))
    y = executors.get(name)(*given, weights.to(dtype=torch.float32))
    np.testing.assert_allclose(y.numpy(), by_hand(), rtol=1e-3, atol=1e-4)


def test_a_stack_is_not_copied() -> None:
    """What is built is new memory; what is there already stays what it was, 4 bits too."""
    down = executors.nf4.quantize_tensor(torch.randn(E, H, 32))
    gate_up = torch.randn(E, 64, H)
    weights = MoEWeights.stack(gate_up_proj=gate_up, down_proj=down, config=MoEConfig(1))
    assert weights.gate_up_proj is gate_up
    assert weights.down_proj is down
    built = MoEWeights.stack(gate_up_proj=list(gate_up), down_proj=down, config=MoEConfig(1))
    assert torch.equal(built.gate_up_proj, gate_up)
    assert built.gate_up_proj.data_ptr() != gate_up.data_ptr()


def test_gradients_reach_the_parts() -> None:
    given = parts(FORMS["parameters"])
    weights = MoEWeights.stack(**given, config=MoEConfig(E))
    executors.get("native")(torch.from_numpy(X), torch.from_numpy(LOGITS), weights).sum().backward()
    for name, values in given.items():
        assert all(value.grad is not None and value.grad.any() for value in values), name


def test_without_gates_the_up_projection_is_all() -> None:
    config = MoEConfig(1, activation="relu2")
    named = MoEWeights.stack(up_proj=list(UP), up_proj_bias=list(UP_BIAS), down_proj=list(DOWN), config=config)
    whole = MoEWeights.stack(gate_up_proj=list(UP), gate_up_proj_bias=UP_BIAS, down_proj=DOWN, config=config)
    assert (named.gate_up_proj == UP).all()
    assert (moe(X, LOGITS, named) == moe(X, LOGITS, whole)).all()


def test_everything_else_of_a_layer_is_passed_on() -> None:
    bias, scale = np.arange(E) / 7, np.ones(E)
    config = MoEConfig(1)
    weights = MoEWeights.stack(**parts(list), config=config, selection_bias=bias, expert_scale=scale)
    assert weights.selection_bias is bias
    assert weights.expert_scale is scale
    assert weights.config is config


TENSOR = torch.ones(I, H)
NF4 = executors.nf4.quantize_tensor(torch.ones(E, 8, 32))
JOIN = "executors.nf4 has fuse, from_linears and from_state_dict, which join 4 bits"
GIVEN: dict[str, Any] = {"gate_proj": [TENSOR] * E, "up_proj": [TENSOR] * E, "down_proj": [TENSOR.T] * E}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"up_proj": None}, "up_proj=None: must be given with gate_proj"),
        ({"gate_proj": None}, "gate_proj=None: must be given with up_proj"),
        ({"gate_proj": None, "up_proj": None}, "gate_up_proj=None: must be given, or gate_proj and up_proj"),
        ({"gate_up_proj": TENSOR}, "gate_up_proj is given: must be None with up_proj"),
        (
            {"config": MoEConfig(1, activation="silu")},
            "gate_proj is given: must be None for an activation that is not gated",
        ),
        ({"up_proj": [TENSOR] * 2}, "up_proj has 2 experts: must have 3, as gate_proj"),
        ({"up_proj": [TENSOR, TENSOR[1:], TENSOR]}, "up_proj[1].shape=(3, 5): must be (4, 5), up_proj[0]'s"),
        ({"up_proj": [TENSOR[1:]] * E}, "up_proj[0].shape=(3, 5): must be (4, 5), gate_proj[0]'s"),
        ({"up_proj": [TENSOR.double()] * E}, "up_proj[0].dtype=float64: must be float32, gate_proj[0]'s"),
        ({"down_proj": [TENSOR, TENSOR.half()]}, "down_proj[1].dtype=float16: must be float32, down_proj[0]'s"),
        ({"down_proj": [TENSOR, TENSOR.to("meta")]}, "down_proj[1].device=meta: must be cpu, down_proj[0]'s"),
        ({"down_proj": []}, "down_proj is of 0 experts: must be of at least 1"),
        ({"down_proj": [TENSOR, 1.0]}, "down_proj[1]=1.0: must be an array of at least one dimension"),
        ({"down_proj": 1.0}, "down_proj=1.0: must be an array, or a sequence of one for each expert"),
        ({"down_proj": "w2"}, "down_proj='w2': must be an array, or a sequence of one for each expert"),
        ({"gate_proj": NF4}, f"gate_proj is in nf4: must be dense; {JOIN}"),
        ({"up_proj": [NF4] * E}, f"up_proj[0] is in nf4: must be dense; {JOIN}"),
        ({"down_proj": [TENSOR, replace(NF4, quant_type="fp4")]}, f"down_proj[1] is in fp4: must be dense; {JOIN}"),
    ],
)
def test_refused_in_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(line)}$"):
        MoEWeights.stack(**{"config": MoEConfig(1), **GIVEN, **changes})


def test_what_is_named_for_4_bits_fuses_them() -> None:
    gate, up = (executors.nf4.quantize_tensor(torch.randn(E, 32, 32)) for _ in range(2))
    fused = executors.nf4.fuse(gate, up)
    weights = MoEWeights.stack(gate_up_proj=fused, down_proj=torch.randn(E, 32, 32), config=MoEConfig(1))
    assert torch.equal(nf4.decode(weights.gate_up_proj), torch.cat([nf4.decode(gate), nf4.decode(up)], dim=1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config is a NoneType: must be a MoEConfig"),
        (MoEConfig(1, activation="nope"), "activation='nope'"),  # type: ignore[arg-type]
        (MoEConfig(1, gate_up_layout="interleavd"), "gate_up_layout='interleavd'"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_copied(config: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MoEWeights.stack(
            gate_proj=np.ones((2, 3, 4)), up_proj=np.ones((2, 3, 4)), down_proj=np.ones((2, 4, 3)), config=config
        )
