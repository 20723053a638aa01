"""PEFT's adapters on dense experts, run apart on an executor: against plain PEFT, which forms W + B A, in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="the extra moe-ref[qlora]")

from peft import PeftModel, get_peft_model

import executors.hf
import peft_models
from peft_models import (
    NAMES,
    adapted,
    base,
    close,
    equal_steps,
    experts_in,
    fill,
    formed,
    lora_config,
    step,
    switched,
    wrappers_of,
)

pytestmark = peft_models.MARKS
each = pytest.mark.parametrize("name", NAMES)


@each
def test_two_steps_are_those_of_plain_peft(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and the gradient of every factor: none missing, none zero, none stale; and nothing forms W + B A."""
    plain = adapted(name)
    ours = switched(copy.deepcopy(plain))
    for turn in range(2):
        with formed(monkeypatch) as seen:
            _, gradients = step(ours)
        assert seen == []
        assert len(gradients) == 4 * len(experts_in(ours)) > 0
        assert all(value is not None and value.any() for value in gradients.values())
        equal_steps(ours, plain)
        fill(plain, turn + 1)
        fill(ours, turn + 1)
    assert not any(hasattr(module, "parametrizations") for module in experts_in(ours))


def test_what_plain_peft_forms_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch is no ornament."""
    with formed(monkeypatch) as seen:
        step(adapted("mixtral"))
    assert {"get_delta_factors", "register_parametrization"} <= set(seen)


def test_use_says_what_runs_apart() -> None:
    model = adapted("gpt_oss")
    found = executors.hf.use(model, "native")
    assert str(found) == "2 layers of GptOssExperts run on 'native', adapters of down_proj and gate_up_proj apart"
    assert [each.adapters for each in found.layers] == [("gate_up_proj", "down_proj")] * 2
    assert [model.get_submodule(each.name) for each in found.layers] == experts_in(model)
    assert executors.hf.use(base("gpt_oss"), "native").layers[0].adapters == ()


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_one_projection_alone(name: str, target: str) -> None:
    plain = adapted(name, target_parameters=[f"experts.{target}"])
    ours = copy.deepcopy(plain)
    assert executors.hf.use(ours, "native").layers[0].adapters == (target,)
    equal_steps(ours, plain)


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"lora_alpha": 64, "r": 1}])
def test_scalings(changes: dict[str, Any]) -> None:
    plain = adapted("mixtral", **changes)
    equal_steps(switched(copy.deepcopy(plain)), plain)


def test_attention_may_have_adapters_too() -> None:
    plain = adapted("qwen3_moe", target_modules=["q_proj", "v_proj"])
    equal_steps(switched(copy.deepcopy(plain)), plain)


@each
def test_merged_by_plain_peft(name: str, tmp_path: Path) -> None:
    """An adapter that is saved from our model and merged into another dense one."""
    ours = switched(adapted(name))
    ours.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base(name), tmp_path)
    assert close(peft_models.logits(plain.merge_and_unload()), peft_models.logits(ours))


@each
def test_an_adapter_of_plain_peft_is_loaded(name: str, tmp_path: Path) -> None:
    plain = adapted(name)
    plain.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base(name), tmp_path, is_trainable=True)
    equal_steps(switched(ours), plain)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_several_adapters(name: str, tmp_path: Path) -> None:
    """One after the other, both at once (of other ranks and scalings), none, and one that comes after the switch."""
    plain = adapted(name)
    other = lora_config(r=2, lora_alpha=7)
    plain.add_adapter("other", other)
    fill(plain)
    ours = switched(copy.deepcopy(plain))
    for active in ("default", "other", ["default", "other"]):
        for model in (plain, ours):
            model.base_model.set_adapter(active)
        equal_steps(ours, plain)
    with ours.disable_adapter(), plain.disable_adapter():
        assert close(peft_models.logits(ours), peft_models.logits(base(name)))
    ours.delete_adapter("other")
    for model in (plain, ours):
        model.base_model.set_adapter("default")
        if model is ours:
            ours.add_adapter("other", lora_config(r=2, lora_alpha=7))
        fill(model)
        model.base_model.set_adapter(["default", "other"])
    equal_steps(ours, plain)


def test_adapters_are_unloaded_and_merged() -> None:
    """What the call passes through counts, and nothing that was seen before."""
    plain = adapted("gpt_oss")
    wanted = peft_models.logits(plain)
    ours = switched(copy.deepcopy(plain))
    ours.merge_adapter()
    assert close(peft_models.logits(ours), wanted)
    with ours.disable_adapter():
        assert close(peft_models.logits(ours), peft_models.logits(base("gpt_oss")))
    assert close(peft_models.logits(ours), wanted)
    bare = ours.unload()
    assert not wrappers_of(bare)
    assert close(peft_models.logits(bare), peft_models.logits(base("gpt_oss")))
    assert close(peft_models.logits(switched(plain).merge_and_unload()), wanted)


def test_back_to_transformers_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = adapted("mixtral")
    ours = switched(copy.deepcopy(plain))
    ours.base_model.model.set_experts_implementation("eager")
    with formed(monkeypatch) as seen:
        equal_steps(ours, plain)
    assert seen


def test_an_adapter_after_the_switch_is_refused_until_it_runs_apart() -> None:
    """PEFT would form W + B A, and the executor would take it for W."""
    model = switched(base("mixtral"))
    ours = get_peft_model(model, lora_config())
    with pytest.raises(executors.Unsupported, match=r"^MixtralExperts: gate_up_proj has an adapter that PEFT forms"):
        peft_models.logits(ours)
    plain = adapted("mixtral")
    fill(ours)
    equal_steps(switched(ours), plain)
    with executors.hf.peft(model := switched(base("mixtral"))):
        ours = get_peft_model(model, lora_config())
    fill(ours)
    equal_steps(ours, plain)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"lora_dropout": 0.1}, "does not work with lora_dropout"),
        ({"use_dora": True}, "does not work with use_dora"),
        ({"lora_bias": True}, "does not work with lora_bias"),
    ],
)
def test_what_peft_refuses_by_name(option: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get_peft_model(base("mixtral"), lora_config(**option))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: own.lora_dropout.update({"default": nn.Dropout(0.1)}), "has lora_dropout: must not"),
        (lambda own: own.use_dora.update(default=True), "has use_dora: must not"),
        (lambda own: own.lora_bias.update(default=True), "has lora_bias: must not"),
        (lambda own: own.lora_variant.update(default=object()), "has a LoRA variant: must not"),
        (lambda own: setattr(own, "_did_swap_in_out_features", False), "has in and out exchanged: must be made by"),
    ],
)
def test_what_a_later_peft_may_allow_is_refused(change: Any, said: str) -> None:
    """All or nothing: no wrapper is changed, nothing is switched."""
    model = adapted("mixtral")
    change(wrappers_of(model)[-1])
    with pytest.raises(executors.Unsupported, match=f"^adapter 'default' of gate_up_proj {said}"):
        executors.hf.use(model, "native")
    assert {type(each).__module__ for each in wrappers_of(model)} == {"peft.tuners.lora.layer"}
    assert model.config._experts_implementation == "eager"


def test_an_adapter_of_a_bias_is_refused() -> None:
    model = adapted("gpt_oss", target_parameters=["experts.gate_up_proj_bias"])
    with pytest.raises(executors.Unsupported, match=r"^target_parameters has 'gate_up_proj_bias': must be of "):
        executors.hf.use(model, "native")


def test_another_batch_of_adapters_is_refused_as_peft_does() -> None:
    model = switched(adapted("mixtral")).eval()
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(input_ids=peft_models.ids(), adapter_names=["default", "__base__"])


def test_no_block_is_as_large_as_a_stack() -> None:
    """Memory: forward and backward of one experts module whose stacks are larger than all else."""
    plain = adapted("mixtral", torch.float32)
    ours = switched(copy.deepcopy(plain))
    wanted = min(value.nbytes for value in experts_in(ours)[0].parameters())

    def action(model: nn.Module) -> int:
        module = model.base_model.model.model.layers[0].mlp.experts
        x = torch.randn(1, 32, requires_grad=True)
        return peft_models.largest_allocation(
            lambda: module(x, torch.tensor([[0, 2]]), torch.tensor([[0.25, 0.75]])).sum().backward()
        )

    assert action(ours) < wanted <= action(plain)
