"""`executors.hf` on models of transformers: what is switched, what is refused, and what stays as it was."""

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import executors.hf
import families
from executors.hf import interface
from family_errors import run_model

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("mixtral", "gpt_oss", "qwen3_moe")
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets the class of each experts module that runs on an executor."""
    seen: list[str] = []
    true = interface.weights_of
    monkeypatch.setattr(interface, "weights_of", lambda module: seen.append(type(module).__name__) or true(module))
    return seen


@pytest.fixture
def mine() -> Iterator[str]:
    """A plug-in executor that negates what native gives."""

    class Mine:
        def __init__(self) -> None:
            self.native = executors.get("native")

        def experts(self, x: torch.Tensor, **given: Any) -> torch.Tensor:
            return -self.native.experts(x, **given)

    executors.register("mine", Mine)
    yield "mine"
    executors._registry._registered.pop("mine", None)


def build(name: str) -> PreTrainedModel:
    return families.build(families.named(name))


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if executors.hf.module.is_experts(module)]


def close(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models give the same, but for roundings."""
    actual, expected = run_model(model), run_model(other)
    return torch.allclose(actual.output, expected.output, rtol=1e-4, atol=1e-4)


def test_registered_names() -> None:
    assert executors.hf.register() == tuple(f"moe_{name}" for name in executors.names())
    assert executors.hf.register("native", "auto") == ("moe_native", "moe_auto")
    assert set(executors.hf.register()) <= set(ALL_EXPERTS_FUNCTIONS.valid_keys())


def test_one_name_is_one_function() -> None:
    """Registering again changes nothing."""
    executors.hf.register("native")
    before = ALL_EXPERTS_FUNCTIONS["moe_native"]
    executors.hf.register()
    assert ALL_EXPERTS_FUNCTIONS["moe_native"] is before


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(executors.UnknownExecutor, match="executor='nativ': must be one of 'auto', "):
        executors.hf.register("nativ")
    model = build("mixtral")
    with pytest.raises(executors.UnknownExecutor, match="did you mean 'native'"):
        executors.hf.use(model, "nativ")
    assert model.config._experts_implementation == "eager"


@each
def test_use_says_what_it_did(name: str, calls: list[str]) -> None:
    model = build(name)
    switched = executors.hf.use(model, "native")
    kinds = [type(module).__name__ for module in experts_of(model)]
    assert [layer.kind for layer in switched.layers] == kinds
    assert [model.get_submodule(layer.name) for layer in switched.layers] == experts_of(model)
    assert str(switched) == f"2 layers of {kinds[0]} run on 'native'"
    assert {layer.config.top_k for layer in switched.layers} == {None}
    run_model(model)
    assert calls == kinds


@each
def test_a_model_may_be_made_with_it(name: str, calls: list[str]) -> None:
    executors.hf.register()
    config = families.tiny_config(families.named(name))
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moe_native")
    run_model(model)
    assert len(calls) == 2
    other = copy.deepcopy(model)
    other.set_experts_implementation("eager")
    assert close(model, other)


def test_a_model_may_be_switched_to_it_and_back(calls: list[str]) -> None:
    executors.hf.register()
    model = build("mixtral")
    model.set_experts_implementation("moe_native")
    run_model(model)
    assert len(calls) == 2
    model.set_experts_implementation("eager")
    run_model(model)
    assert len(calls) == 2
    executors.hf.use(model, "auto")
    assert model.get_correct_experts_implementation(model.config._experts_implementation) == "moe_auto"
    run_model(model)
    assert len(calls) == 4


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    with pytest.raises(executors.Unsupported, match="model=LlamaForCausalLM: has no experts"):
        executors.hf.use(LlamaForCausalLM(config))


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one layer is refused, none is switched."""
    model = build("mixtral")
    experts_of(model)[1].act_fn = nn.Mish()
    with pytest.raises(executors.Unsupported, match="MixtralExperts: its gate is none of MoEConfig's"):
        executors.hf.use(model)
    assert {module.config._experts_implementation for module in experts_of(model)} == {"eager"}


def test_a_gate_that_was_exchanged_is_found_anew() -> None:
    model = build("mixtral")
    assert executors.hf.use(model).layers[0].config.activation == "swiglu"
    experts_of(model)[0].act_fn = nn.GELU()
    assert [layer.config.activation for layer in executors.hf.use(model).layers] == ["geglu", "swiglu"]


def test_layers_with_configurations_of_their_own_are_reached(calls: list[str]) -> None:
    """As models with other sizes in each layer have them; set_experts_implementation does not reach those."""
    executors.hf.register()
    model = build("qwen3_moe")
    experts_of(model)[1].config = copy.copy(model.config)
    model.set_experts_implementation("moe_native")
    run_model(model)
    assert len(calls) == 1
    executors.hf.use(model, "native")
    run_model(model)
    assert len(calls) == 3


def test_the_name_is_not_saved(tmp_path: Path) -> None:
    """Who loads the model may not have this package."""
    model = build("mixtral")
    executors.hf.use(model, "native")
    model.save_pretrained(tmp_path)
    assert "moe_native" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not loaded.config._experts_implementation.startswith("moe_")
    assert close(loaded, model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_native")
    assert again.config._experts_implementation == "moe_native"
    assert close(again, model)


@each
def test_a_switched_model_is_copied_and_pickled(name: str, calls: list[str]) -> None:
    model = build(name)
    executors.hf.use(model, "native")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert close(other, model)
        assert len(calls) == 4
        other.set_experts_implementation("eager")  # a copy's own
        run_model(other)
        run_model(model)
        assert len(calls) == 6


def test_a_model_without_values_is_switched() -> None:
    """Before its weights are loaded."""
    family = families.named("gpt_oss")
    with torch.device("meta"):
        model = families.model_class(family)(families.tiny_config(family)).eval()
        switched = executors.hf.use(model, "native")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    full = build("gpt_oss")
    assert switched.layers == executors.hf.use(full, "native").layers
    model.load_state_dict(full.state_dict(), assign=True)
    model.model.rotary_emb = full.model.rotary_emb  # its buffers are not saved
    assert close(model, full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_gate_is_found_under_any_default_dtype(dtype: torch.dtype) -> None:
    """from_pretrained sets it while it makes a model."""
    model, before = build("gpt_oss"), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        switched = executors.hf.use(model, "native")
    finally:
        torch.set_default_dtype(before)
    assert switched.layers == executors.hf.use(model, "native").layers


def test_a_plug_in_runs(mine: str) -> None:
    model = build("mixtral")
    expected = run_experts(model, "native")
    assert executors.hf.register("mine") == ("moe_mine",)
    model.set_experts_implementation("moe_mine")
    assert torch.equal(one(model), -expected)
    assert torch.equal(run_experts(model, "mine"), -expected)


@pytest.mark.parametrize(
    "switch",
    [
        lambda model: executors.hf.use(model, "mine"),
        lambda _: executors.hf.register("mine"),
        lambda _: executors.hf.register(),
    ],
)
def test_a_plug_in_that_was_exchanged_is_made_anew(switch: Callable[[nn.Module], object], mine: str) -> None:
    model = build("mixtral")
    negated = run_experts(model, mine)
    executors.unregister(mine)
    executors.register(mine, "executors.native:Native")
    switch(model)
    assert torch.equal(one(model), -negated)
    executors.unregister(mine)
    with pytest.raises(executors.UnknownExecutor, match="'mine'"):
        executors.hf.use(model, mine)


def run_experts(model: nn.Module, executor: str) -> torch.Tensor:
    executors.hf.use(model, executor)
    return one(model)


def one(model: nn.Module) -> torch.Tensor:
    """What its first experts give for one token."""
    module = experts_of(model)[0]
    return module(torch.ones(1, 32), torch.tensor([[0, 2]]), torch.tensor([[0.25, 0.75]])).detach()


@each
def test_parameters_that_were_replaced_are_used(name: str) -> None:
    """Weights are read at each call: those of the first call are not kept."""
    model, other = build(name), families.build(families.named(name), seed=1)
    executors.hf.use(model, "native")
    before = one(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    executors.hf.use(other, "native")
    assert torch.equal(one(model), one(other))
    assert not torch.equal(one(model), before)
    with torch.no_grad():
        experts_of(model)[0].down_proj.mul_(2)
        experts_of(model)[0].down_proj = nn.Parameter(2 * experts_of(model)[0].down_proj)
    if name != "gpt_oss":  # which adds a bias
        torch.testing.assert_close(one(model), 4 * one(other))
    model.to(torch.bfloat16)
    module = experts_of(model)[0]
    y = module(torch.ones(1, 32).bfloat16(), torch.tensor([[0, 2]]), torch.tensor([[0.25, 0.75]]))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert module.down_proj.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("function", ["use", "config_of", "weights_of", "config_of_experts"])
@pytest.mark.parametrize("value", [None, "mixtral"])
def test_what_is_no_module_is_refused(function: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^(model|module)={value!r}: must be a torch.nn.Module$"):
        getattr(executors.hf, function)(value)


class Odd(nn.Module):
    """Declares another layout than its gate has."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, False

    def _apply_gate(self, z: torch.Tensor) -> torch.Tensor:
        gate, up = z.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def test_a_layout_that_is_declared_otherwise_is_refused() -> None:
    with pytest.raises(executors.Unsupported, match=r"^Odd: is_concatenated=False: but its gate is concatenated$"):
        executors.hf.config_of_experts(Odd())
