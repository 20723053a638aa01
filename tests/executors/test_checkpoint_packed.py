"""Checkpoints in 4 bits: gpt-oss' MXFP4, and what bitsandbytes writes, per expert and stacked."""

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
from torch import Tensor

import executors
from checkpoint_cases import (
    GPT_OSS,
    MIXTRAL,
    PREFIX,
    SPARSE,
    E,
    H,
    I,
    State,
    T,
    folder,
    gpt_oss,
    merged,
    mixtral,
    random,
    same_layer,
)
from executors import checkpoint, mxfp4, nf4
from moe_ref import MoEConfig, MoEWeights
from moe_ref import mxfp4 as mxfp4_specification
from moe_ref import nf4 as nf4_specification
from nf4_cases import same

FORMS = [(quant_type, nested) for quant_type in ("nf4", "fp4") for nested in (False, True)]


def in_four_bits(state: State, quant_type: str, nested: bool, names: tuple[str, ...]) -> State:
    """The state as bitsandbytes writes it, with tensors of these endings quantised by the library."""
    found = {}
    for key, value in state.items():
        if not key.endswith(names):
            found[key] = value
            continue
        packed, quant_state = bitsandbytes.quantize_4bit(value, quant_type=quant_type, compress_statistics=nested)
        found[key] = packed
        found |= {f"{key}.{name}": entry for name, entry in quant_state.as_dict(packed=True).items()}
    return found


def decoded(packed: Tensor, state: State, key: str) -> Tensor:
    """What the library decodes, of shapes that it decodes right."""
    entries = {name: value for name, value in state.items() if name.startswith(f"{key}.")}
    quant_state = bitsandbytes.QuantState.from_dict(entries, device=torch.device("cpu"))
    return bitsandbytes.dequantize_4bit(packed, quant_state)


@pytest.mark.parametrize(("quant_type", "nested"), FORMS)
def test_linear_layers_of_bitsandbytes_keep_their_bytes(quant_type: str, nested: bool, tmp_path: Path) -> None:
    state = in_four_bits(mixtral(), quant_type, nested, ("w1.weight", "w2.weight", "w3.weight"))
    opened = checkpoint.open(folder(tmp_path, state, MIXTRAL))
    weights = opened.weights(0)
    assert opened.layers[0].form == f"{quant_type}, per expert"
    assert [tensor.quant_type for tensor in weights.packed().values()] == [quant_type] * 2
    keys = [key for key in state if f"{key}.absmax" in state]
    dense = {key: decoded(state[key], state, key) for key in keys}
    up, down = merged(dense)
    assert torch.equal(nf4_specification.decode(weights.gate_up_proj), up.float())
    assert torch.equal(nf4_specification.decode(weights.down_proj), down.float())
    bytes_of = [state[f"{SPARSE}experts.{e}.{n}.weight"].view(-1) for e in range(E) for n in ("w1", "w3")]
    assert torch.equal(weights.gate_up_proj.packed, torch.cat(bytes_of))


@pytest.mark.parametrize(("quant_type", "nested"), FORMS)
def test_stacks_of_bitsandbytes_are_read_in_the_family_s_order(quant_type: Any, nested: bool, tmp_path: Path) -> None:
    dense, state = gpt_oss(rows=32), gpt_oss(rows=32)
    expected = {}
    for name in ("gate_up_proj", "down_proj"):
        key = f"{PREFIX}experts.{name}"
        tensor = nf4.quantize_tensor(dense[key], quant_type, 64, nested)
        expected[name] = tensor.transpose(1, 2)
        state |= nf4.to_state_dict(tensor, key)
    opened = checkpoint.open(folder(tmp_path, state, GPT_OSS))
    weights = opened.weights(0)
    assert opened.layers[0].form == f"{quant_type}, stacked"
    for name, tensor in expected.items():
        same(getattr(weights, name), tensor)
    assert torch.equal(weights.gate_up_proj_bias, dense[f"{PREFIX}experts.gate_up_proj_bias"])


@pytest.mark.parametrize("packed", [False, True])
def test_one_joined_linear_layer_per_expert(packed: bool, tmp_path: Path) -> None:
    """Older checkpoints of gpt-oss in 4 bits have them, with biases."""
    stacks = gpt_oss()
    state = {key: value for key, value in stacks.items() if "router" in key}
    for expert in range(E):
        for name in ("gate_up_proj", "down_proj"):
            own = f"{PREFIX}experts.{name}s.{expert}."
            state[f"{own}weight"] = stacks[f"{PREFIX}experts.{name}"][expert].T.contiguous()
            state[f"{own}bias"] = stacks[f"{PREFIX}experts.{name}_bias"][expert]
    dense = checkpoint.open(folder(tmp_path, state, GPT_OSS)).weights(0)
    same_layer(dense, stacks)
    assert dense.config.gate_up_layout == "interleaved"
    if packed:
        state = in_four_bits(state, "nf4", True, ("s.0.weight", "s.1.weight", "s.2.weight", "s.3.weight"))
        weights = checkpoint.open(folder(tmp_path, state, GPT_OSS)).weights(0)
        assert weights.gate_up_proj.segments == E  # nested statistics go with experts
        key = f"{PREFIX}experts.gate_up_projs.2.weight"
        assert torch.equal(nf4_specification.decode(weights.gate_up_proj)[2], decoded(state[key], state, key).float())
        assert torch.equal(weights.down_proj_bias, dense.down_proj_bias)


def test_mxfp4_keeps_its_bytes_and_computes(tmp_path: Path) -> None:
    weights = MoEWeights(random(E, 2 * I, H), random(E, H, I, seed=1), random(E, 2 * I, seed=2), config=MoEConfig(2))
    packed = mxfp4.quantize(weights)
    router = {f"{PREFIX}router.weight": random(E, H, seed=3), f"{PREFIX}router.bias": random(E, seed=4)}
    state = mxfp4.to_state_dict(packed, f"{PREFIX}experts.") | router
    opened = checkpoint.open(folder(tmp_path, state, GPT_OSS))
    found = opened.weights(0)
    assert opened.layers[0].form == "mxfp4, stacked"
    for name, tensor in packed.packed().items():
        other = found.packed()[name]
        assert (other.shape, other.dtype, other.transposed) == (tensor.shape, "bfloat16", False)
        assert torch.equal(other.blocks, tensor.blocks)
        assert torch.equal(other.scales, tensor.scales)
    assert found.config.gate_up_layout == "interleaved"
    x = random(T, H)
    y = executors.get("grouped_nf4")(x, opened.router(0).logits(x), found)
    dense = {name: mxfp4_specification.decode(tensor).bfloat16() for name, tensor in found.packed().items()}
    native = executors.get("native")(x, opened.router(0).logits(x), found.with_parameters(dense))
    assert torch.equal(y, native)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "float16", "dtype": None}, "float16"),
        ({"dtype": None}, "bfloat16"),
    ],
)
def test_mxfp4_decodes_to_the_model_s_dtype(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    packed = mxfp4.quantize(MoEWeights(random(E, 2 * I, H), random(E, H, I), config=MoEConfig(2)))
    state = mxfp4.to_state_dict(packed, f"{PREFIX}experts.")
    found = checkpoint.open(folder(tmp_path, state, GPT_OSS | config)).weights(0)
    assert {tensor.dtype for tensor in found.packed().values()} == {expected}
