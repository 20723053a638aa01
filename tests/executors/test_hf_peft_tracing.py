"""PEFT's adapters that run apart: checkpoints, torch.compile, autocast, generation, copies, no gradients."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="the extra moe-ref[qlora]")

import executors.hf
import peft_models
from peft_models import adapted, close, formed, step, switched

pytestmark = peft_models.MARKS
each = pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])


@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are bitwise those without it, in two steps, and nothing is formed in the replay either."""
    model = switched(adapted(name, torch.float32)).train()
    y, wanted = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    replays = []
    model.base_model.model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda *_: replays.append(1))
    with formed(monkeypatch) as seen:
        for _ in range(2):
            again, found = step(model)
            assert torch.equal(again, y)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert seen == []
    assert len(replays) == 4


def compiled(module: nn.Module, graphs: list[object]) -> Any:
    def backend(graph: torch.fx.GraphModule, _example: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True)


def test_experts_are_one_graph() -> None:
    """Their wrappers with them; and what is compiled follows the active adapter, and none."""
    model = switched(adapted("mixtral", torch.float32))
    model.add_adapter("other", peft_models.lora_config())
    peft_models.fill(model)
    module, graphs = model.base_model.model.model.layers[0].mlp.experts, []
    traced = compiled(module, graphs)
    given = torch.randn(5, 32), torch.tensor([[0, 2]] * 5), torch.full((5, 2), 0.5)
    seen = []
    for adapter in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(adapter)
        y = module(*given)
        assert torch.equal(traced(*given), y)
        assert all(not torch.equal(y, other) for other in seen)
        seen.append(y)
        wanted = [torch.autograd.grad(run(*given).square().sum(), trained(module)) for run in (module, traced)]
        assert all(map(torch.equal, *wanted))
        assert len(wanted[0]) == 4 * len(adapter if isinstance(adapter, list) else [adapter])
    assert len(graphs) == 3
    model.base_model.disable_adapter_layers()
    assert torch.equal(traced(*given), module(*given))
    assert all(not torch.equal(module(*given), other) for other in seen)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [value for value in module.parameters() if value.requires_grad]


@each
@pytest.mark.nightly
def test_a_model_is_one_graph(name: str) -> None:
    """With its gradients."""
    model, graphs = switched(adapted(name, torch.float32)), []
    y, wanted = step(model)
    found = compiled(model, graphs)(input_ids=peft_models.ids()).logits
    torch.testing.assert_close(found, y)
    model.zero_grad(set_to_none=True)
    (found * torch.linspace(-1, 1, found.numel()).reshape(found.shape)).sum().backward()
    own = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
    assert own.keys() == wanted.keys()
    assert all(close(own[key], wanted[key], 1e-5) for key in wanted)
    assert len(graphs) == 1


@each
def test_generation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = adapted(name, torch.float32)
    ours = switched(copy.deepcopy(plain))
    given: dict[str, Any] = {"input_ids": peft_models.ids()[:1], "max_new_tokens": 8, "do_sample": False}
    with formed(monkeypatch) as seen:
        tokens = ours.generate(**given, pad_token_id=0)
    assert seen == []
    assert torch.equal(tokens, plain.generate(**given, pad_token_id=0))


@each
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name: str, mode: Any) -> None:
    plain = adapted(name)
    ours = switched(copy.deepcopy(plain))
    with mode():
        assert close(peft_models.logits(ours), peft_models.logits(plain))


@each
def test_a_model_is_copied_and_pickled(name: str) -> None:
    """The copy's adapters are its own."""
    model = switched(adapted(name))
    before = peft_models.logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(peft_models.logits(other), before)
        peft_models.fill(other, 7)
        assert not close(peft_models.logits(other), before, 1e-3)
        assert torch.equal(peft_models.logits(model), before)


@each
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(name: str, adapter_dtype: torch.dtype) -> None:
    """Adapters in fp32, as PEFT makes them, or in the model's dtype; with autocast or without. Gradients have their
    parameters' dtypes, and results are as far from fp32 as roundings of bf16 are.
    """
    model = switched(adapted(name, torch.bfloat16))
    exact = switched(copy.deepcopy(model).float())
    for key, value in model.named_parameters():
        if "lora_" in key:
            value.data = value.data.to(adapter_dtype)
    y, wanted = step(exact)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, gradients = step(model)
        assert close(found.float(), y, 0.1)
        assert {value.dtype for value in gradients.values()} == {adapter_dtype}
        assert all(close(gradients[key].float(), value, 0.3) for key, value in wanted.items())


def test_autocast_leaves_experts_in_their_dtype() -> None:
    """Experts and adapters in fp32 are multiplied in fp32, as without autocast."""
    model = switched(adapted("mixtral", torch.float32))
    module = model.base_model.model.model.layers[0].mlp.experts
    given = torch.randn(5, 32), torch.tensor([[0, 2]] * 5), torch.full((5, 2), 0.5)
    expected = module(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(*given), expected)
    y = module(*given)
    y.sum().backward()
    wanted = {key: value.grad for key, value in module.named_parameters() if value.grad is not None}
    assert len(wanted) == 4
    module.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(*given)
    y.sum().backward()
    assert all(torch.equal(module.get_parameter(key).grad, value) for key, value in wanted.items())


def test_two_wrapped_models_do_not_mix() -> None:
    """What a model's wrappers hand on is theirs alone."""
    one, other = (switched(adapted("mixtral")) for _ in range(2))
    peft_models.fill(other, 3)
    first, second = peft_models.logits(one), peft_models.logits(other)
    assert not close(first, second, 1e-3)
    assert torch.equal(peft_models.logits(one), first)


def test_no_wrapper_is_looked_for_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra moe-ref[hf] is enough for models without adapters."""
    monkeypatch.delitem(__import__("sys").modules, "peft")
    assert isinstance(executors.hf.use(peft_models.base("mixtral"), "native").layers, tuple)
