"""Weights in MXFP4: taken over from checkpoints without a copy, quantised, saved, or refused in one line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import executors
from executors import mxfp4
from executors.mxfp4 import quantization
from moe_ref import ExpertLoRA, MoEConfig, MoEWeights
from moe_ref import mxfp4 as specification
from moe_ref.conformance.problems.pinned import GPT_OSS
from nf4_cases import random
from random_mxfp4 import same_arrays

PREFIX = "model.layers.0.mlp.experts."
EXPERTS, HIDDEN, INNER = 5, 64, 32
State = dict[str, torch.Tensor]


def layer(dtype: torch.dtype = torch.bfloat16, config: MoEConfig = GPT_OSS) -> MoEWeights:
    return MoEWeights(
        random(EXPERTS, 2 * INNER, HIDDEN, dtype=dtype) / HIDDEN**0.5,
        random(EXPERTS, HIDDEN, INNER, dtype=dtype, seed=1) / INNER**0.5,
        random(EXPERTS, 2 * INNER, seed=2),
        random(EXPERTS, HIDDEN, seed=3),
        config=config,
    )


def checkpoint() -> State:
    """Entries of a layer as gpt-oss ships them, and some of others."""
    return mxfp4.to_state_dict(mxfp4.quantize(layer()), PREFIX) | {"model.norm.weight": torch.ones(3)}


def read(state: State, **arguments: Any) -> MoEWeights:
    return mxfp4.from_state_dict(state, **{"config": GPT_OSS, "prefix": PREFIX} | arguments)


def output(weights: MoEWeights, name: str = "grouped_nf4") -> torch.Tensor:
    x, logits = random(33, HIDDEN, dtype=torch.bfloat16, seed=7), random(33, EXPERTS, seed=8)
    return executors.get(name)(x, logits, weights)


# Taken over ------------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_gpt_oss() -> None:
    shapes = {key.removeprefix(PREFIX): tuple(value.shape) for key, value in checkpoint().items() if PREFIX in key}
    assert shapes == {
        "gate_up_proj_blocks": (EXPERTS, 2 * INNER, HIDDEN // 32, 16),
        "gate_up_proj_scales": (EXPERTS, 2 * INNER, HIDDEN // 32),
        "gate_up_proj_bias": (EXPERTS, 2 * INNER),
        "down_proj_blocks": (EXPERTS, HIDDEN, INNER // 32, 16),
        "down_proj_scales": (EXPERTS, HIDDEN, INNER // 32),
        "down_proj_bias": (EXPERTS, HIDDEN),
    }


def test_through_a_file_and_back(tmp_path: Path) -> None:
    weights = mxfp4.quantize(layer())
    save_file(mxfp4.to_state_dict(weights, PREFIX), tmp_path / "layer.safetensors")
    again = read(load_file(tmp_path / "layer.safetensors"))
    for name, tensor in weights.packed().items():
        same_arrays(getattr(again, name), tensor)
    assert again.gate_up_proj_bias.equal(weights.gate_up_proj_bias)
    assert again.down_proj_bias.equal(weights.down_proj_bias)
    assert output(again).equal(output(weights))


def test_nothing_is_copied() -> None:
    state = checkpoint()
    weights = read(state, dtype=torch.float16)
    assert [tensor.dtype for tensor in weights.packed().values()] == ["float16"] * 2
    for name, tensor in weights.packed().items():
        for part, array in tensor.arrays().items():
            assert array.data_ptr() == state[f"{PREFIX}{name}_{part}"].data_ptr()
    assert mxfp4.to_state_dict(weights)["down_proj_blocks"].data_ptr() == weights.down_proj.blocks.data_ptr()


def test_biases_are_optional() -> None:
    state = {key: value for key, value in checkpoint().items() if "bias" not in key}
    weights = read(state)
    assert weights.gate_up_proj_bias is None
    assert weights.down_proj_bias is None
    assert mxfp4.to_state_dict(weights, PREFIX).keys() == state.keys() - {"model.norm.weight"}


def test_blocks_with_rows_joined() -> None:
    """As transformers' Mxfp4GptOssExperts keeps them; a parameter, strided, is still no copy and frozen."""
    tensor = mxfp4.quantize_tensor(random(2, 6, 96))
    joined = torch.nn.Parameter(tensor.blocks.flatten(2), requires_grad=False)
    same_arrays(mxfp4.from_blocks(joined, tensor.scales, dtype="float32"), tensor)
    strided = mxfp4.from_blocks(joined[:, ::2], tensor.scales[:, ::2])
    assert strided.blocks.data_ptr() == joined.data_ptr()
    assert strided.blocks.equal(tensor.blocks[:, ::2])
    one_block = mxfp4.quantize_tensor(random(2, 16, 32))  # 16 rows of 16 bytes: the number of dimensions tells
    same_arrays(mxfp4.from_blocks(one_block.blocks.flatten(2), one_block.scales, dtype="float32"), one_block)


def test_a_layer_that_transformers_converts() -> None:
    """The same bits as native on transformers' numbers, which it has as (E, H, 2I); and its own experts agree."""
    library = pytest.importorskip("transformers.integrations.mxfp4")
    state = checkpoint()
    packed = read(state)
    dense = packed.with_parameters(
        {
            name: library.convert_moe_packed_tensors(
                state[f"{PREFIX}{name}_blocks"], state[f"{PREFIX}{name}_scales"]
            ).transpose(1, 2)
            for name in ("gate_up_proj", "down_proj")
        }
    )
    assert output(packed).equal(output(dense, "native"))
    from transformers.models.gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts = GptOssExperts(GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS))
    stored = {
        name: value.transpose(1, 2) if "bias" not in name else value for name, value in dense.parameters().items()
    }
    experts.load_state_dict(stored)
    x = random(9, HIDDEN)
    ids = torch.arange(18).remainder(EXPERTS).view(9, 2)
    w = torch.full((9, 2), 0.5)
    wide = packed.with_parameters({name: replace(t, dtype="float32") for name, t in packed.packed().items()})
    ours = executors.get("grouped_nf4").experts(x, topk_ids=ids, topk_weights=w, weights=wide)
    with torch.no_grad():
        theirs = experts.float()(x, ids, w)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


# Quantised -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_keeps_everything_but_its_projections(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """M1: the specification's bits, along the input dimension, in pieces."""
    monkeypatch.setitem(quantization.PIECES, "cpu", 1024)
    lora = ExpertLoRA(random(EXPERTS, 3, HIDDEN, seed=5), random(EXPERTS, 2 * INNER, 3, seed=6))
    weights = replace(layer(dtype), lora=lora, selection_bias=random(EXPERTS))
    weights.gate_up_proj.requires_grad_(True)
    found = mxfp4.quantize(weights)
    for name in ("gate_up_proj_bias", "down_proj_bias", "selection_bias", "lora", "config"):
        assert getattr(found, name) is getattr(weights, name)
    for name, tensor in found.packed().items():
        dense = getattr(weights, name).detach()
        same_arrays(tensor, specification.quantize(dense, dtype=str(dtype).removeprefix("torch.")))


def test_a_transposed_view_is_quantised_along_the_input_dimension() -> None:
    """Unlike `executors.nf4`, which keeps the order in which numbers are stored."""
    stored = random(EXPERTS, HIDDEN, 2 * INNER)
    found = mxfp4.quantize_tensor(stored.transpose(1, 2))
    assert not found.transposed
    same_arrays(found, specification.quantize(stored.transpose(1, 2).contiguous(), dtype="float32"))


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = quantization._codes
    monkeypatch.setitem(quantization.PIECES, "cpu", 640)
    monkeypatch.setattr(quantization, "_codes", lambda n, v: (seen.append(tuple(v.shape)), original(n, v))[1])
    mxfp4.quantize_tensor(random(2, 25, 64))
    assert seen == [(10, 64), (10, 64), (5, 64)] * 2


# Refused ---------------------------------------------------------------------------------------------------------


def without(key: str) -> State:
    return {name: value for name, value in checkpoint().items() if name != PREFIX + key}


def changed(key: str, change: Callable[[torch.Tensor], Any]) -> State:
    state = checkpoint()
    return state | {PREFIX + key: change(state[PREFIX + key])}


STATES: dict[str, Callable[[], State]] = {
    f"'{PREFIX}down_proj_scales' is missing: must be there, with {PREFIX}down_proj_blocks and {PREFIX}down_proj_scales"
    " of a layer in MXFP4": lambda: without("down_proj_scales"),
    f"{PREFIX}gate_up_proj_blocks is torch.int8: must be a torch.Tensor of uint8": lambda: changed(
        "gate_up_proj_blocks", lambda blocks: blocks.view(torch.int8)
    ),
    f"{PREFIX}down_proj_scales is ndarray: must be a torch.Tensor of uint8": lambda: changed(
        "down_proj_scales", lambda scales: scales.numpy()
    ),
    f"{PREFIX}gate_up_proj_blocks.shape=(5, 64, 2, 15): must be (5, 64, 2, 16) or (5, 64, 32), 16 bytes for each of "
    f"{PREFIX}gate_up_proj_scales": lambda: changed("gate_up_proj_blocks", lambda blocks: blocks[..., 1:]),
    f"{PREFIX}down_proj_blocks.shape=(5, 64, 1, 16): must be (5, 32, 1, 16) or (5, 32, 16), 16 bytes for each of "
    f"{PREFIX}down_proj_scales": lambda: changed("down_proj_scales", lambda scales: scales[:, :32]),
    "gate_up_proj_bias.shape=(4, 64): must be (5, 64), (E, 2*I)": lambda: changed(
        "gate_up_proj_bias", lambda bias: bias[1:]
    ),
}


@pytest.mark.parametrize("message", STATES)
def test_states_that_are_refused(message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        read(STATES[message]())
    assert str(caught.value) == message


def test_a_dtype_that_is_refused() -> None:
    line = "dtype=torch.float64: must be one of float32, bfloat16, float16"
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the line is compared)
        read(checkpoint(), dtype=torch.float64)
    assert str(caught.value) == line


def broken(**changes: Any) -> MoEWeights:
    return replace(layer(), **changes)


def spoiled(number: float) -> MoEWeights:
    weights = layer()
    weights.down_proj[1, 2, 3] = number
    return weights


WEIGHTS: dict[str, Callable[[], Any]] = {
    "down_proj has NaN or infinite elements: must be finite": lambda: spoiled(-torch.inf),
    "gate_up_proj.dtype=float64: must be one of float32, bfloat16, float16": lambda: layer(torch.float64),
    "gate_up_proj is an MXFP4Tensor: must be a dense tensor, since nothing is quantised twice": lambda: mxfp4.quantize(
        layer()
    ),
    "gate_up_proj.shape=(5, 64, 48): must be (..., k), k a multiple of 32": lambda: broken(
        gate_up_proj=random(5, 64, 48), down_proj=random(5, 48, 32), down_proj_bias=None
    ),
    "gate_up_proj is a numpy.ndarray: must be a torch.Tensor": lambda: MoEWeights(
        np.ones((2, 64, 32), np.float32), np.ones((2, 32, 32), np.float32), config=MoEConfig(1)
    ),
    "weights=7: must be a moe_ref.MoEWeights": lambda: 7,
}


@pytest.mark.parametrize("message", WEIGHTS)
def test_weights_that_are_refused(message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        mxfp4.quantize(WEIGHTS[message]())
    assert str(caught.value) == message


def test_an_nf4_layer_and_an_mxfp4_layer_refuse_each_other() -> None:
    with pytest.raises(TypeError, match=r"^gate_up_proj is an NF4Tensor: must be a dense tensor, since nothing"):
        mxfp4.quantize(executors.nf4.quantize(layer()))
    with pytest.raises(TypeError, match=r"^gate_up_proj is an MXFP4Tensor: must be a dense tensor, since nothing"):
        executors.nf4.quantize(mxfp4.quantize(layer()))


UNSAVED: dict[str, dict[str, Any]] = {
    "gate_up_proj is a Tensor: must be a moe_ref.MXFP4Tensor": {},
    "selection_bias is given: must be None, since gpt-oss' form cannot hold it": {"selection_bias": random(EXPERTS)},
    "lora is given: must be None, since gpt-oss' form cannot hold it": {
        "lora": ExpertLoRA(random(EXPERTS, 3, HIDDEN), random(EXPERTS, 2 * INNER, 3))
    },
    "down_proj.transposed=True: must be False, blocks along the input dimension": {
        "gate_up_proj": mxfp4.quantize_tensor(random(EXPERTS, 2 * INNER, HIDDEN)),
        "down_proj": mxfp4.quantize_tensor(random(EXPERTS, INNER, HIDDEN)).transpose(1, 2),
    },
}


@pytest.mark.parametrize("message", UNSAVED)
def test_what_the_form_has_no_place_for(message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        mxfp4.to_state_dict(replace(layer(torch.float32), **UNSAVED[message]))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "dtype=torch.float64: must be one of float32, bfloat16, float16"),
        ({"dtype": None}, "dtype=None: must be one of float32, bfloat16, float16"),
        (
            {"scales": torch.zeros(1, 2, 1, dtype=torch.uint8, device="meta")},
            "scales.device=meta: must be cpu, that of blocks",
        ),
    ],
)
def test_wrong_arguments_of_from_blocks_are_named(changes: dict[str, Any], message: str) -> None:
    given = {"blocks": torch.zeros(1, 2, 1, 16, dtype=torch.uint8), "scales": torch.zeros(1, 2, 1, dtype=torch.uint8)}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  # its whole text is compared
        mxfp4.from_blocks(**(given | changes))
    assert str(refusal.value) == message
