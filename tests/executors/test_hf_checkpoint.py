"""`executors.hf.load_quantized` on checkpoints of others: quantised while they load, or in 4 bits already."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra moe-ref[qlora]")
pytest.importorskip("bitsandbytes", reason="the extra moe-ref[qlora]")

from safetensors.torch import load_file, save_file

import executors.hf
import families
import moe_ref
from executors import checkpoint
from executors.checkpoint import BadCheckpoint
from executors.hf import load_quantized, quantize_experts, save_quantized, weights_of
from executors.hf.storage import MXFP4Parametrization
from executors.nf4 import quantization
from family_errors import inputs
from packed_models import Alive, build, counted, experts_in
from tiny_models import edit_config, saved, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "granitemoe")


def same_state(model: Any, other: Any) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype, key
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_while_it_loads(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As transformers loads it and `quantize_experts` quantises it; experts lie in their own tensors mostly."""
    saved(build(name).bfloat16(), tmp_path / "dense", max_shard_size="30KB")
    expected = build(name).__class__.from_pretrained(tmp_path / "dense")
    quantize_experts(expected, "fp4", False, 128)
    capfd.readouterr()
    told: list[tuple[int, int]] = []
    found = load_quantized(tmp_path / "dense", "fp4", False, 128, progress=lambda *both: told.append(both))
    same_state(found, expected)
    assert type(found) is type(expected)
    assert not found.training
    layers = len(experts_in(expected))
    assert told == [(done, layers) for done in range(layers + 1)]
    assert "MISSING" not in capfd.readouterr().err  # transformers misses nothing
    assert "experts" not in str(found._keys_to_ignore_on_load_missing)
    same_state(load_quantized(save_quantized(found, tmp_path / "own")), expected)


def of_families() -> list[families.Family]:
    """Those whose text model `executors.checkpoint` knows."""
    known = checkpoint.families()
    return [family for family in families.families() if families.model_class(family).config_class.model_type in known]


@pytest.mark.nightly
@pytest.mark.parametrize("family", of_families(), ids=str)
def test_every_family(family: families.Family, tmp_path: Path) -> None:
    model = families.build(family)
    saved(model, tmp_path / "dense")
    expected = type(model).from_pretrained(tmp_path / "dense")
    quantize_experts(expected)
    same_state(load_quantized(tmp_path / "dense", "nf4"), expected)


def test_one_dense_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantization.PIECES, "cpu", 4096)
    model = tiny_model("mixtral", hidden_size=64, intermediate_size=64, num_hidden_layers=6)
    layer = sum(value.nbytes for value in experts_in(model)[0].parameters())
    saved(model, tmp_path / "dense")
    with Alive([]) as alive:
        found = load_quantized(tmp_path / "dense", "nf4")
    size = sum(value.nbytes for value in found.state_dict().values())
    assert alive.peak < size + 1.3 * layer
    assert size + 1.3 * layer < 3 * layer  # of six


def in_mxfp4(folder: Path) -> dict[str, moe_ref.MoEWeights]:
    """A dense gpt-oss checkpoint turned into one as it is released; returns the layers' dense weights by prefix."""
    found = {}
    state = load_file(folder / "model.safetensors")
    for key in [key for key in state if key.endswith("experts.gate_up_proj")]:
        prefix = key.removesuffix("gate_up_proj")
        for name in ("gate_up_proj", "down_proj"):
            tensor = executors.mxfp4.quantize_tensor(state.pop(f"{prefix}{name}").transpose(1, 2))
            found[f"{prefix}{name}"] = tensor
            state |= {f"{prefix}{name}_blocks": tensor.blocks, f"{prefix}{name}_scales": tensor.scales}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, lambda values: values.update(quantization_config={"quant_method": "mxfp4"}))
    return found


def test_mxfp4_stays_what_it_is(tmp_path: Path) -> None:
    """gpt-oss as released: its bytes run, nothing is decoded whole, and they are saved again."""
    model = tiny_model("gpt_oss", intermediate_size=32)
    saved(model, tmp_path / "released")
    packed = in_mxfp4(tmp_path / "released")
    with counted() as stacks:
        found = load_quantized(tmp_path / "released")
        executors.hf.use(found, "auto")
        again = load_quantized(save_quantized(found, tmp_path / "own"))
        executors.hf.use(again, "auto")
        ids = torch.arange(12)[None]
        with torch.no_grad():
            y, z = found(ids)[0], again(ids)[0]
    assert stacks == []
    assert torch.equal(y, z)
    same_state(again, found)
    with torch.no_grad():
        for value in again.state_dict().values():
            value.zero_()
    again.load_state_dict(found.state_dict())
    same_state(again, found)
    assert not hasattr(found.config, "quantization_config")
    for name, module in found.named_modules():
        if executors.hf.is_experts(module):
            for projection in ("gate_up_proj", "down_proj"):
                tensor, chain = getattr(weights_of(module), projection), module.parametrizations[projection]
                expected = packed[f"{name}.{projection}"]
                assert isinstance(chain[0], MXFP4Parametrization)
                assert (tensor.blocks.data_ptr(), tensor.dtype) == (chain.original.data_ptr(), "float32")
                assert torch.equal(tensor.blocks, expected.blocks)
                assert torch.equal(tensor.scales, expected.scales)
                dense = moe_ref.mxfp4.decode(expected).float().transpose(1, 2)
                assert torch.equal(getattr(module, projection), dense)  # for code that knows of no executor
                model.get_submodule(name).get_parameter(projection).data = dense
    executors.hf.use(model, "native")
    with torch.no_grad():
        torch.testing.assert_close(y, model(ids)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_linear_layers_of_experts_in_4_bits(nested: bool, tmp_path: Path) -> None:
    """Gate and up apart, as bitsandbytes quantised a layer for each expert: the bytes are joined."""
    model = tiny_model("mixtral", intermediate_size=32)
    saved(model, tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    tensors = {}
    for key in [key for key in state if ".experts." in key]:
        tensors[key] = executors.nf4.quantize_tensor(state.pop(key), "nf4", 64, nested)
        state |= executors.nf4.to_state_dict(tensors[key], key)
    save_file(state, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    found = load_quantized(tmp_path / "dense")
    block = "model.layers.1.block_sparse_moe.experts"
    weights = weights_of(experts_in(found)[1])
    for expert in range(8):
        parts = {name: moe_ref.nf4.decode(tensors[f"{block}.{expert}.{name}.weight"]) for name in ("w1", "w3", "w2")}
        assert torch.equal(moe_ref.nf4.decode(weights.gate_up_proj)[expert], torch.cat([parts["w1"], parts["w3"]]))
        assert torch.equal(moe_ref.nf4.decode(weights.down_proj)[expert], parts["w2"])
    executors.hf.use(found)
    with torch.no_grad():
        assert found(torch.arange(12)[None])[0].isfinite().all()


def test_nothing_is_quantised_twice(tmp_path: Path) -> None:
    saved(tiny_model("gpt_oss", intermediate_size=32), tmp_path / "released")
    in_mxfp4(tmp_path / "released")
    with pytest.raises(executors.Unsupported, match="experts: in mxfp4: quant_type='nf4' must be None"):
        load_quantized(tmp_path / "released", "nf4")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


W1 = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no type": (
        lambda f: None,
        executors.Unsupported,
        "model.layers.0.block_sparse_moe.experts: dense: quant_type must be 'nf4' or 'fp4'",
    ),
    "rest missing": (
        lambda f: edit(f, lambda s: s.pop("model.norm.weight")),
        BadCheckpoint,
        "model.norm.weight: must be there, for a MixtralForCausalLM",
    ),
    "rest unknown": (
        lambda f: edit(f, lambda s: s.update({"model.more": torch.ones(3)})),
        BadCheckpoint,
        "model.more: is unknown: must not be there, for a MixtralForCausalLM",
    ),
    "expert missing": (lambda f: edit(f, lambda s: s.pop(W1.format(1, 3))), BadCheckpoint, W1.format(1, 3)),
    "expert's shape": (
        lambda f: edit(f, lambda s: s.update({W1.format(0, 2): torch.ones(3, 4)})),
        BadCheckpoint,
        W1.format(0, 2),
    ),
    "NaN": (
        lambda f: edit(f, lambda s: s[W1.format(0, 2)].fill_(torch.nan)),
        BadCheckpoint,
        "model.layers.0.block_sparse_moe.experts.gate_up_proj: values has NaN or infinite elements",
    ),
    "a layer too many": (
        lambda f: edit_config(f, lambda values: values.update(num_hidden_layers=1)),
        BadCheckpoint,
        "model.layers.1",
    ),
    "experts too many": (
        lambda f: (
            edit(f, lambda s: [s.pop(key) for key in list(s) if "layers.1." in key and ".experts." not in key]),
            edit_config(f, lambda values: values.update(num_hidden_layers=1)),
        ),
        BadCheckpoint,
        "model.layers.1.block_sparse_moe.experts are too many: must be those of config.json",
    ),
    "a layer too few": (
        lambda f: edit(f, lambda s: [s.pop(key) for key in list(s) if "layers.1.block_sparse_moe.experts" in key]),
        BadCheckpoint,
        "has no layer 1: must be one of 0",
    ),
    "other sizes": (
        lambda f: edit_config(f, lambda values: values.update(intermediate_size=16)),
        BadCheckpoint,
        "experts.gate_up_proj has shape (8, 48, 32): must be (8, 32, 32), as config.json has it",
    ),
    "another quantiser": (
        lambda f: edit_config(f, lambda values: values.update(quantization_config={"quant_method": "fp8"})),
        executors.Unsupported,
        "quant_method='fp8': must be dense, mxfp4 or bitsandbytes",
    ),
    "another family": (
        lambda f: edit_config(
            f, lambda values: values.update(model_type="phimoe", architectures=["PhimoeForCausalLM"])
        ),
        BadCheckpoint,
        "model_type='phimoe' is not read: its router is a sparsemixer",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    change, kind, said = BROKEN[case]
    saved(tiny_model("mixtral"), tmp_path / "dense")
    change(tmp_path / "dense")
    with pytest.raises(kind, match=re.escape(said)) as caught:
        load_quantized(tmp_path / "dense", None if case == "no type" else "nf4")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_rest_in_4_bits(tmp_path: Path) -> None:
    """A checkpoint whose linear layers bitsandbytes quantised, and whose experts transformers left dense."""
    from transformers import BitsAndBytesConfig

    model = tiny_model("qwen3_moe", hidden_size=64, head_dim=16)
    saved(model, tmp_path / "dense")
    given = BitsAndBytesConfig(load_in_4bit=True)
    half = type(model).from_pretrained(tmp_path / "dense", quantization_config=given)
    saved(half, tmp_path / "half")
    found = load_quantized(tmp_path / "half", "nf4")
    quantize_experts(half)
    same_state(found, half)
    assert found.is_loaded_in_4bit
    ids = inputs(build("qwen3_moe"))["input_ids"] % 48
    for each in (found, half):
        executors.hf.use(each)
    with torch.no_grad():
        assert torch.equal(found(ids)[0], half(ids)[0])
