"""PEFT's adapters on experts in 4 bits, run apart: as on the decoded dense experts, and no stack decoded."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="the extra moe-ref[qlora]")
pytest.importorskip("bitsandbytes", reason="the extra moe-ref[qlora]")

from peft import PeftModel, get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM

import executors.hf
import moe_ref
import packed_models
import peft_models
from executors.hf.storage import put
from packed_models import counted, decoded, packed_by_bitsandbytes
from peft_models import NAMES, close, experts_in, fill, formed, lora_config, step, switched, wrappers_of

pytestmark = peft_models.MARKS
each = pytest.mark.parametrize("name", NAMES)
TOLERANCE = 2e-5  # fp32: grouped_nf4 takes no float64


def dense_of(model: nn.Module, name: str) -> PeftModel:
    """Plain PEFT on the dense model with the numbers that the codes mean."""
    dense = get_peft_model(decoded(model, packed_models.build(name)), lora_config())
    fill(dense)
    return dense


def full_names(model: nn.Module) -> list[str]:
    """As PEFT wants them of parametrized parameters."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if executors.hf.is_experts(module)
        for own in packed_models.names_of(module)
    ]


equal_steps = partial(peft_models.equal_steps, tolerance=TOLERANCE)


@each
@pytest.mark.parametrize("names", ["suffixes", "full"])
def test_two_steps_are_those_of_the_decoded_model(name: str, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made within hf.peft, whichever form of names the configuration has."""
    model = packed_models.build(name, "nested")
    dense = dense_of(model, name)
    given = {} if names == "suffixes" else {"target_parameters": full_names(model)}
    with counted() as stacks, executors.hf.peft(model):
        ours = get_peft_model(model, lora_config(**given))
    assert stacks == []
    fill(ours)
    executors.hf.use(ours, "grouped_nf4")
    for turn in range(2):
        with formed(monkeypatch) as seen, counted() as stacks:
            _, gradients = step(ours)
        assert (seen, stacks) == ([], [])
        assert len(gradients) == 4 * len(experts_in(ours)) > 0
        assert all(value is not None and value.any() for value in gradients.values())
        equal_steps(ours, dense)
        fill(dense, turn + 1)
        fill(ours, turn + 1)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_what_peft_wrapped_alone_is_mended(name: str) -> None:
    """By full names PEFT takes 4 bits, but nests its wrappers the other way round."""
    model = packed_models.build(name, "nf4")
    dense = dense_of(model, name)
    ours = get_peft_model(model, lora_config(target_parameters=full_names(model)))
    assert [own.parameter_name for own in wrappers_of(ours)[:2]] == ["gate_up_proj", "down_proj"]
    executors.hf.use(ours, "grouped_nf4")
    assert [own.parameter_name for own in wrappers_of(ours)[:2]] == ["down_proj", "gate_up_proj"]
    fill(ours)
    equal_steps(ours, dense)


def test_adapters_that_peft_did_not_find_are_refused() -> None:
    """It only warns: without hf.peft, or of no parameter, or of one experts' parameter of two."""
    model = packed_models.build("gpt_oss", "nf4")
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        ours = get_peft_model(model, lora_config(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"^adapter 'default': target_parameters=\[.*: must be .*in executors\.hf\.peft alone$"
    ):
        executors.hf.use(ours, "grouped_nf4")

    def made(*targets: str) -> None:
        model = packed_models.build("gpt_oss", "nf4")
        with executors.hf.peft(model):
            get_peft_model(model, lora_config(target_modules=["q_proj"], target_parameters=[*targets]))

    with (
        pytest.warns(RuntimeWarning, match="no parameter was matched"),
        pytest.raises(ValueError, match="here of down_proj and gate_up_proj"),
    ):
        made("mlp.experts.up_proj")
    with pytest.raises(ValueError, match=r"attn\.down_proj"):
        made("mlp.experts.gate_up_proj", "attn.down_proj")
    made("mlp.experts.gate_up_proj", "mlp.experts.up_proj")  # other families' names beside one that is found


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_experts_may_be_quantized_after_peft(name: str) -> None:
    ours = peft_models.adapted(name, torch.float32)
    packed_by_bitsandbytes(ours, "nf4")
    dense = dense_of(ours, name)
    executors.hf.use(ours, "grouped_nf4")
    equal_steps(ours, dense)


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h"])
def test_files_are_those_of_dense_experts(name: str, tmp_path: Path) -> None:
    """An adapter of 4-bit experts is loaded by plain PEFT on dense ones, and the other way round."""
    model = packed_models.build(name, "nf4")
    dense = dense_of(model, name)
    with executors.hf.peft(model):
        ours = get_peft_model(model, lora_config())
    executors.hf.use(ours, "grouped_nf4")
    fill(ours, 5)
    ours.save_pretrained(tmp_path / "ours")
    plain = PeftModel.from_pretrained(decoded(model, packed_models.build(name)), tmp_path / "ours", is_trainable=True)
    equal_steps(ours, plain)

    dense.save_pretrained(tmp_path / "dense")
    model = packed_models.build(name, "nf4")
    with executors.hf.peft(model):
        ours = PeftModel.from_pretrained(model, tmp_path / "dense", is_trainable=True)
    executors.hf.use(ours, "grouped_nf4")
    equal_steps(ours, dense)
    with executors.hf.peft(ours), counted() as stacks:
        ours.load_adapter(tmp_path / "ours", "second", is_trainable=True)
        ours.add_adapter("third", lora_config(r=2))
    assert stacks == []
    ours.set_adapter("second")
    equal_steps(ours, plain, adapter="second")
    with ours.disable_adapter():
        expected = peft_models.logits(decoded(model, packed_models.build(name)))
        assert close(peft_models.logits(ours), expected, TOLERANCE)


@pytest.mark.parametrize("packed", ["up_proj", "down_proj"])
def test_files_of_models_with_one_projection_in_4_bits(packed: str, tmp_path: Path) -> None:
    """PEFT nests its wrappers in the order of parameters, and files have that order."""
    model, other = packed_models.build("nemotron_h"), packed_models.build("nemotron_h")
    for module, dense in zip(experts_in(model), experts_in(other), strict=True):
        packed_models.parametrize.replace_parameter_4bit(module, packed, quant_type="nf4")
        getattr(dense, packed).data = packed_models.values_of(module, packed)
    plain = peft_models.with_adapter(other)
    plain.save_pretrained(tmp_path)
    keys = [key for key, _ in model.named_parameters()]
    with executors.hf.peft(model):
        ours = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    assert [key.replace("base_layer.", "") for key, _ in model.named_parameters() if "lora" not in key] == keys
    executors.hf.use(ours, "grouped_nf4")
    equal_steps(ours, plain)


def test_a_model_is_as_it_was_after_peft() -> None:
    """Bytes, statistics, class, hooks; after an error of PEFT too."""
    model = packed_models.build("mixtral", "nested")
    (module, *_) = experts_in(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kind, chain, keys = type(module), module.parametrizations.gate_up_proj, [key for key, _ in model.named_parameters()]
    with executors.hf.peft(model):
        assert module.gate_up_proj.shape == (4, 48, 32)
        assert module.gate_up_proj.untyped_storage().nbytes() == 4
        assert peft_models.logits(model).isnan().all()  # who calls it against advice sees it
        assert dict(module.named_parameters()).keys() == {"gate_up_proj", "down_proj"}
    with pytest.raises(ValueError, match="lora_dropout"), executors.hf.peft(model):
        get_peft_model(model, lora_config(lora_dropout=0.1))
    assert type(module) is kind
    assert module.parametrizations.gate_up_proj is chain
    assert [key for key, _ in model.named_parameters()] == keys
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_layers_are_as_they_were_if_a_later_one_is_refused() -> None:
    model = packed_models.build("mixtral", "nf4")
    first, *_, last = experts_in(model)
    executors.hf.use(model, "grouped_nf4")
    before = peft_models.logits(model)
    nn.utils.parametrize.register_parametrization(last, "down_proj", nn.Identity(), unsafe=True)
    said = "down_proj is in 4 bits and is parametrized by Identity too"
    with pytest.raises(executors.Unsupported, match=said), executors.hf.peft(model):
        pass
    assert first.parametrizations.gate_up_proj.original.dtype == torch.uint8
    del last.parametrizations.down_proj[1]
    assert torch.equal(peft_models.logits(model), before)


def test_adapters_that_are_there_when_experts_are_quantized() -> None:
    """Plain PEFT ignores them in 4 bits. They run apart on an executor, and on nothing else."""
    model = peft_models.adapted("mixtral", torch.float32)
    executors.hf.quantize_experts(model)
    with pytest.raises(executors.Unsupported, match="is in 4 bits and has an adapter: must run on an executor"):
        peft_models.logits(model)
    dense = dense_of(model, "mixtral")
    executors.hf.use(model, "grouped_nf4")
    equal_steps(model, dense)


def test_adapters_that_were_merged_before_stay_so() -> None:
    """PEFT would take them off what it has decoded, and then say that they are off."""
    model = peft_models.adapted("mixtral", torch.float32)
    model.merge_adapter()
    executors.hf.quantize_experts(model)
    executors.hf.use(model, "grouped_nf4")
    merged = peft_models.logits(model)
    said = "is in 4 bits, with its adapter merged: cannot be had without it"
    with pytest.raises(executors.Unsupported, match=said), model.disable_adapter():
        peft_models.logits(model)
    with pytest.raises(executors.Unsupported, match=said):
        model.unmerge_adapter()
    assert torch.equal(peft_models.logits(model), merged)


def test_peft_refuses_or_goes_wrong_alone() -> None:
    """What hf.peft is for. If this fails, a later PEFT can do it."""
    with pytest.raises(ValueError, match="No `target_modules` passed but also no `target_parameters` found"):
        get_peft_model(packed_models.build("mixtral", "nf4"), lora_config())


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda model: model.merge_adapter(), "gate_up_proj|down_proj is in 4 bits: must be dense to have its adapter"),
        (lambda model: model.merge_and_unload(), "gate_up_proj|down_proj is in 4 bits: must be dense to have its"),
        (
            lambda model: (model.base_model.model.set_experts_implementation("eager"), peft_models.logits(model)),
            "is in 4 bits and has an adapter: must run on an executor",
        ),
    ],
)
def test_what_peft_cannot_do_in_4_bits_is_refused(act: Any, said: str) -> None:
    """PEFT would merge into what it has decoded, and then say that it is merged."""
    model = packed_models.build("mixtral", "nf4")
    with executors.hf.peft(model):
        ours = get_peft_model(model, lora_config())
    executors.hf.use(ours, "grouped_nf4")
    fill(ours)
    before = peft_models.logits(ours)
    with pytest.raises(executors.Unsupported, match=said):
        act(ours)
    executors.hf.use(ours, "grouped_nf4")
    assert torch.equal(peft_models.logits(ours), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_in_4_bits(reentrant: bool) -> None:
    model = packed_models.build("gpt_oss", "nested")
    with executors.hf.peft(model):
        ours = get_peft_model(model, lora_config())
    executors.hf.use(ours, "grouped_nf4")
    fill(ours)
    ours.train()
    y, wanted = step(ours)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    with counted() as stacks:
        for _ in range(2):
            again, found = step(ours)
            assert torch.equal(again, y)
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert stacks == []


def test_dense_models_go_through_unchanged() -> None:
    plain = peft_models.adapted("mixtral")
    with executors.hf.peft(model := peft_models.base("mixtral")):
        ours = get_peft_model(model, lora_config())
    fill(ours)
    equal_steps(switched(ours), plain)
    equal_steps(copy.deepcopy(ours), plain)
    with pytest.raises(TypeError, match=r"^model=None: must be a torch.nn.Module$"), executors.hf.peft(None):
        pass


def test_experts_in_mxfp4() -> None:
    """Stored in another order than the class has: gpt-oss' class keeps (E, H, 2I), its checkpoints do not."""
    model = GptOssForCausalLM(
        GptOssConfig(
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 4},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": peft_models.VOCAB},
        )
    )
    dense = copy.deepcopy(model)
    for module, other in zip(experts_in(model), experts_in(dense), strict=True):
        for name in packed_models.names_of(module):
            tensor = executors.mxfp4.quantize_tensor(getattr(module, name).detach().transpose(1, 2) * 20)
            getattr(other, name).data = moe_ref.mxfp4.decode(tensor).float().transpose(1, 2)
            put(module, name, tensor)
    with executors.hf.peft(model):
        ours = get_peft_model(model, lora_config())
    plain = get_peft_model(dense, lora_config())
    executors.hf.use(ours, "grouped_nf4")
    for each_model in (ours, plain):
        fill(each_model)
    equal_steps(ours, plain)


def test_a_model_that_was_loaded_in_4_bits(tmp_path: Path) -> None:
    """From the folder that hf.save_quantized writes, with an adapter that PEFT saved."""
    model = packed_models.build("mixtral", "nf4")
    executors.hf.save_quantized(model, tmp_path / "model")
    with executors.hf.peft(model):
        first = get_peft_model(model, lora_config())
    fill(first)
    first.save_pretrained(tmp_path / "adapter")
    loaded = executors.hf.load_quantized(tmp_path / "model")
    with executors.hf.peft(loaded):
        again = PeftModel.from_pretrained(loaded, tmp_path / "adapter", is_trainable=True)
    for each_model in (first, again):
        executors.hf.use(each_model, "grouped_nf4")
    equal_steps(again, first)
