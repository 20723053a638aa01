"""DTensors are refused in one line that says what to call; what it says works."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import executors
from dense_cases import PROBLEM, inputs_of
from forward_cases import CASES, layer_of, leaves_of
from moe_ref.types import PackedTensor

EVERY_RANK = r"call {}.to_local\(\)$"
TOKENS = r"call {}.to_local\(\) for this rank's tokens, or {}.full_tensor\(\)$"
EXPERTS = r"call {}.full_tensor\(\), or .experts\(\) with the .to_local\(\) of all parameters, topk_ids minus"
REMEDIES = {"x": TOKENS, "router_logits": TOKENS, "post_expert_norm": r"call {}.full_tensor\(\)$"}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """Of one process."""
    store: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("placement", [Replicate(), Shard(0)])
def test_each_argument_is_refused(name: str, placement: Placement, mesh: DeviceMesh) -> None:
    inputs = inputs_of(CASES[name].problem)
    executor, leaves = CASES[name].executor(), leaves_of(inputs)
    layer = layer_of(executor, inputs)
    for own, leaf in leaves.items():
        distributed = leaves | {own: distribute_tensor(leaf, mesh, [placement])}
        remedy = EVERY_RANK if placement.is_replicate() else REMEDIES.get(own, EXPERTS)
        with pytest.raises(
            TypeError, match=rf"^{own} is a DTensor placed as \(.*,\): must be a plain tensor; "
        ) as refused:
            layer(distributed)
        assert refused.match(remedy.format(own, own)), own
        assert "\n" not in str(refused.value)
    logits, bias = leaves["router_logits"], inputs.weights.selection_bias
    assert bias is not None
    moved = distribute_tensor(logits, mesh, [placement]), distribute_tensor(bias.detach(), mesh, [placement])
    with pytest.raises(TypeError, match=r"^router_logits is a DTensor"):
        executor.route(moved[0], inputs.weights)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"^selection_bias is a DTensor"):
        executor.route(logits, replace(inputs.weights, selection_bias=moved[1]))  # type: ignore[attr-defined]
    routing = {"topk_ids": inputs.topk_ids, "topk_weights": torch.ones(inputs.topk_ids.shape)}
    for own, value in routing.items():
        with pytest.raises(TypeError, match=f"^{own} is a DTensor"):
            executor.experts(
                leaves["x"],
                **routing | {own: distribute_tensor(value, mesh, [placement])},
                weights=inputs.weights,
            )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.problem.quant_type])
def test_codes_are_refused(name: str, mesh: DeviceMesh) -> None:
    inputs = inputs_of(CASES[name].problem)
    packed: dict[str, PackedTensor] = {
        own: tensor.map(lambda array: distribute_tensor(array, mesh, [Replicate()]) if array.ndim else array)
        for own, tensor in inputs.weights.packed().items()
    }
    inputs = replace(inputs, weights=inputs.weights.with_parameters(packed))
    with pytest.raises(TypeError, match=r"^gate_up_proj is a DTensor placed as"):
        layer_of(CASES[name].executor(), inputs)(leaves_of(inputs))


def test_what_is_advised_works(mesh: DeviceMesh) -> None:
    """The parts of all ranks' experts add up; gradients come back to DTensors."""
    inputs = inputs_of(replace(PROBLEM, experts=6))
    executor, weights, x = executors.get("native"), inputs.weights, inputs.x.detach()
    expected = executor(x, inputs.router_logits, weights).detach()
    routing = executor.route(inputs.router_logits, weights)  # type: ignore[attr-defined]
    parts, ranks = [], 2
    for first in range(0, weights.num_experts, weights.num_experts // ranks):
        own = {name: value.detach()[first : first + 3] for name, value in weights.parameters().items()}
        given = {name: distribute_tensor(value, mesh, [Shard(0)]).requires_grad_() for name, value in own.items()}
        local = weights.with_parameters({name: value.to_local() for name, value in given.items()})
        ids, slot_weights = routing.topk_ids - first, routing.topk_weights.detach()
        part = executor.experts(x, topk_ids=ids, topk_weights=slot_weights, weights=local)
        part.sum().backward()
        assert all(isinstance(value.grad, DTensor) for value in given.values())
        parts.append(part.detach())
    torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-6)
