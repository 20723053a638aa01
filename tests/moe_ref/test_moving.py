"""Layers and 4-bit tensors on other devices and in other dtypes: what is cast, and what must not be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import executors
from executors import mxfp4, nf4
from moe_ref import ExpertLoRA, MoEConfig, MoEWeights, packed, route
from moe_ref.types import PackedTensor

CONFIG = MoEConfig(4, scoring="sigmoid", renormalize=True)
E, H, I, T = 32, 32, 32, 64  # noqa: E741


def layer(**more: object) -> MoEWeights:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    given = {
        "selection_bias": 7 + 0.02 * normal(E),
        "gate_up_proj_bias": normal(E, 2 * I),
        "expert_scale": normal(E),
        "lora": ExpertLoRA(gate_up_lora_a=normal(E, 2, H), gate_up_lora_b=normal(E, 2 * I, 2)),
    }
    return MoEWeights(normal(E, 2 * I, H), normal(E, H, I), config=CONFIG, **given | more)  # type: ignore[arg-type]


def logits() -> torch.Tensor:
    return 0.1 * torch.randn(T, E, generator=torch.Generator().manual_seed(1))


def chosen(weights: MoEWeights) -> list[list[int]]:
    return executors.get("native").route(logits(), weights).topk_ids.sort().values.tolist()


def packed_layer() -> MoEWeights:
    """One projection in NF4 with nested statistics, the other in MXFP4."""
    weights = layer()
    up = nf4.quantize_tensor(weights.gate_up_proj, nested=True)
    return replace(weights, gate_up_proj=up, down_proj=mxfp4.quantize_tensor(weights.down_proj))


def same_arrays(first: PackedTensor, second: PackedTensor) -> bool:
    return all(a is b for a, b in zip(first.arrays().values(), second.arrays().values(), strict=True))


def test_r3_a_cast_of_the_layer_chooses_the_same_experts() -> None:
    """DeepSeek-V3's biases are near 7 and some thousandths apart, which bf16 does not hold."""
    weights = layer()
    rounded = replace(weights, selection_bias=weights.selection_bias.bfloat16())
    others = [ours != theirs for ours, theirs in zip(chosen(weights), chosen(rounded), strict=True)]
    assert sum(others) > T // 4  # so that it can be seen
    low = weights.to(dtype=torch.bfloat16)
    assert low.selection_bias is weights.selection_bias
    assert chosen(low) == chosen(weights)
    assert {value.dtype for value in low.parameters().values()} == {torch.bfloat16}
    assert low.parameters().keys() == weights.parameters().keys()


def test_r3_map_refuses_to_round_the_selection_bias() -> None:
    message = (
        r"^selection_bias.dtype=bfloat16: must be float32, or hold it exactly, since it chooses experts \(R3\); "
        r"weights.to\(dtype=...\) leaves it alone$"
    )
    with pytest.raises(TypeError, match=message):
        layer().map(lambda value: value.to(torch.bfloat16))
    for narrow, other in (("bfloat16", "float16"), ("float16", "bfloat16"), ("float64", "float32")):
        bias = torch.ones(E, dtype=getattr(torch, narrow))
        with pytest.raises(TypeError, match=rf"^selection_bias.dtype={other}: must be {narrow}"):
            layer(selection_bias=bias).map(lambda value, other=other: value.to(getattr(torch, other)))


def test_map_changes_every_array_but_4_bits() -> None:
    """Exact changes of dtype, moves to another library, and copies; also of the selection bias."""
    weights = packed_layer()
    wide = weights.map(torch.Tensor.double)
    assert {value.dtype for value in (*wide.parameters().values(), wide.selection_bias)} == {torch.float64}
    in_numpy = layer().map(lambda value: value.numpy())
    assert isinstance(in_numpy.selection_bias, np.ndarray)
    assert weights.map(torch.clone).gate_up_proj is weights.gate_up_proj
    assert layer(selection_bias=None).map(torch.Tensor.bfloat16).down_proj.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "bfloat16"])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_q2_m1_another_dtype_is_what_4_bits_decode_to(name: str, dtype: torch.dtype | str) -> None:
    """Codes and scales keep their bytes; a number is rounded from fp32 to the new dtype."""
    tensor = packed_layer().packed()[name]
    low = tensor.to(dtype=dtype)
    assert low.dtype == str(dtype).removeprefix("torch.")
    assert same_arrays(low, tensor)
    own = getattr(torch, low.dtype)
    assert torch.equal(packed.decode(low), packed.decode(tensor).to(own).float())
    assert low.to(dtype="float32").dtype == "float32"
    assert torch.equal(packed.decode(low.to(dtype="float32")), packed.decode(tensor))


def test_everything_moves_to_a_device() -> None:
    weights = packed_layer().to("meta")
    arrays = [array for tensor in weights.packed().values() for array in tensor.arrays().values()]
    assert {array.device.type for array in (*arrays, *weights.parameters().values(), weights.selection_bias)} == {
        "meta"
    }
    assert [tensor.device.type for tensor in weights.packed().values()] == ["meta"] * 2
    assert weights.gate_up_proj.to(torch.device("meta")).nested_offset.device.type == "meta"
    in_numpy = weights.gate_up_proj.map(lambda value: np.zeros(value.shape))
    assert in_numpy.to("cpu", dtype="float16").dtype == "float16"


def test_a_cast_layer_computes_in_its_dtype() -> None:
    """One dense projection and one in 4 bits: both follow, and the gradient comes back in the parameter's dtype."""
    weights = replace(packed_layer(), down_proj=layer().down_proj.requires_grad_())
    low = weights.to(dtype="bfloat16")
    x = torch.randn(T, H, dtype=torch.bfloat16)
    y = executors.get("auto")(x, logits(), low)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert weights.down_proj.grad.dtype == torch.float32
    torch._dynamo.reset()
    cast = torch.compile(
        lambda given: executor(x, logits_, given.to(dtype=torch.bfloat16)), fullgraph=True, backend="eager"
    )
    executor, logits_ = executors.get("auto"), logits()
    assert torch.equal(cast(weights), y)


def test_numpy_is_cast_where_it_has_the_dtype() -> None:
    in_numpy = layer().map(lambda value: value.detach().numpy())
    assert in_numpy.to(dtype="float64").gate_up_proj.dtype == np.float64
    assert in_numpy.to("cpu", dtype=np.dtype("float16")).selection_bias.dtype == np.float32
    assert in_numpy.to(dtype=np.float64).down_proj.dtype == np.float64
    assert layer().to(dtype=np.float16).down_proj.dtype == torch.float16
    with pytest.raises(ValueError, match=r"^dtype=bfloat16: must be one that numpy has$"):
        in_numpy.to(dtype="bfloat16")
    ids = route(logits().numpy(), CONFIG, in_numpy.selection_bias).topk_ids
    assert (route(logits().numpy(), CONFIG, in_numpy.to(dtype="float16").selection_bias).topk_ids == ids).all()


def test_bad_dtypes_and_devices_are_refused_in_one_line() -> None:
    weights, tensor = packed_layer(), packed_layer().down_proj
    for bad in (torch.float64, "float64"):
        with pytest.raises(ValueError, match=r"^dtype=.*float64'?: must be one of float32, bfloat16, float16$"):
            tensor.to(dtype=bad)
    with pytest.raises(ValueError, match=r"^dtype='int8': must be one of float64, float32, bfloat16, float16$"):
        weights.to(dtype="int8")
    for given in (weights, tensor):
        with pytest.raises(TypeError, match=r"^device=torch.bfloat16: must be a device: give a dtype by name, to\("):
            given.to(torch.bfloat16)
