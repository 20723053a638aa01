"""Activation checkpoints never choose other experts in their replay (D5)."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import executors
from dense_cases import CONFIG, EVERYTHING, PROBLEM, both, every, inputs_of
from moe_ref.conformance.judgement.call import call


@both
def test_checkpointing_never_chooses_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D5: under the policy, the replay uses the ids of the forward pass; without it, it chooses once more."""
    choices = count_choices(monkeypatch)
    context = partial(create_selective_checkpoint_contexts, executors.checkpoint_policy)
    expected = inputs_of(EVERYTHING)
    call(executors.get(name), expected).backward(expected.dy)
    for context_fn, times in ((context, 1), (None, 2)):
        choices.clear()
        inputs = inputs_of(EVERYTHING)
        arguments_ = {"context_fn": context_fn} if context_fn else {}
        y = checkpoint(
            executors.get(name), inputs.x, inputs.router_logits, inputs.weights, use_reentrant=False, **arguments_
        )
        y.backward(inputs.dy)
        assert len(choices) == times
        for leaf, value in expected.tensors().items():
            assert torch.equal(value.grad, inputs.tensors()[leaf].grad), leaf


@every
def test_a_replay_that_would_choose_otherwise(name: str) -> None:
    """D5: even if the logits change under the replay, the gradient is that of the experts of the forward pass."""
    problem = replace(PROBLEM, logits="ties")
    inputs, expected = inputs_of(problem), inputs_of(problem)
    call(executors.get(name), expected).backward(expected.dy)
    drift = torch.zeros(5)

    def layer(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return executors.get(name)(x, logits + drift, inputs.weights)

    context = partial(create_selective_checkpoint_contexts, executors.checkpoint_policy)
    y = checkpoint(layer, inputs.x, inputs.router_logits, use_reentrant=False, context_fn=context)
    drift += torch.arange(5) * 1e-6  # now the higher id wins ties
    y.backward(inputs.dy)
    torch.testing.assert_close(inputs.x.grad, expected.x.grad, rtol=1e-4, atol=1e-4)
    drift.zero_()
    again = inputs_of(problem)
    y = checkpoint(layer, again.x, again.router_logits, use_reentrant=False)
    drift += torch.arange(5) * 1e-6
    y.backward(again.dy)
    far = (again.x.grad - expected.x.grad).abs().amax()
    assert far > 0.01  # without the policy, other experts get the gradient


def count_choices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for each time that experts are really chosen."""
    from executors._base import routing

    chosen: list[int] = []
    largest = routing._largest

    def counted(keys: torch.Tensor, count: int) -> torch.Tensor:
        if count == CONFIG.top_k:  # not the choice of groups
            chosen.append(1)
        return largest(keys, count)

    monkeypatch.setattr(routing, "_largest", counted)
    return chosen
