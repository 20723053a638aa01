"""Learned scales of experts (R9): their gradient repeats, and everything that names tensors knows them."""

import torch

from executors._base.routing import scaled_by_expert
from executors._compare.run import LABELS
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.judgement.gates import CLAUSES
from moe_ref.types import LEARNED, Routing

TENSORS = {"y", "x", "router_logits", "topk_weights", *LEARNED}


def test_the_gradient_repeats_with_many_slots_and_threads() -> None:
    """C1: torch adds for an index with atomics from 32768 of them on, where there are several threads."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(16_384, 8, generator=generator).topk(4).indices
    slot_weights, upstream = torch.rand(2, *ids.shape, generator=generator)
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(max(4, threads))
    try:
        for _ in range(20):
            scale = torch.rand(8, generator=torch.Generator().manual_seed(1)).requires_grad_()
            scaled_by_expert(Routing(ids, slot_weights), scale).topk_weights.backward(upstream)
            found.append(scale.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], gradient) for gradient in found)
    exact = torch.zeros(8, dtype=torch.float64)
    exact.index_add_(0, ids.flatten(), (slot_weights.double() * upstream).flatten())
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=0)


def test_every_tensor_has_its_clause_and_its_label() -> None:
    assert set(CLAUSES) == set(LABELS) == TENSORS


def test_a_layer_with_other_arrays_has_other_scales() -> None:
    weights = MoEWeights(torch.ones(2, 4, 3), torch.ones(2, 3, 2), config=MoEConfig(1), expert_scale=torch.ones(2))
    assert weights.map(lambda array: 2 * array).expert_scale.tolist() == [2.0, 2.0]
    assert weights.with_parameters({"expert_scale": torch.zeros(2)}).expert_scale.tolist() == [0.0, 0.0]
