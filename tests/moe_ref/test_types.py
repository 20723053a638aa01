"""MoEConfig and MoEWeights: static, thin, hashable."""

import dataclasses

import numpy as np
import pytest

from moe_ref import MoEConfig, MoEWeights


def test_config_is_hashable_and_compared_by_value() -> None:
    assert MoEConfig(4) == MoEConfig(4)
    assert hash(MoEConfig(4)) == hash(MoEConfig(4))
    assert MoEConfig(4) != MoEConfig(4, renormalize=True)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEConfig(4).top_k = 2  # type: ignore[misc]


def test_weights_hold_what_they_are_given() -> None:
    gate_up, down = np.zeros((5, 6, 4)), np.zeros((5, 4, 3))
    weights = MoEWeights(gate_up, down, config=MoEConfig(2))
    assert weights.gate_up_proj is gate_up
    assert (weights.num_experts, weights.hidden_size, weights.intermediate_size) == (5, 4, 3)


def test_weights_are_compared_by_identity() -> None:
    gate_up, down = np.zeros((5, 6, 4)), np.zeros((5, 4, 3))
    config = MoEConfig(2)
    assert MoEWeights(gate_up, down, config=config) != MoEWeights(gate_up, down, config=config)


def test_weights_are_not_validated_when_built() -> None:
    MoEWeights(None, "odd leaf of a pytree", config=MoEConfig(2))
