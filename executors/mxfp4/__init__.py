"""Weights in MXFP4, the format of gpt-oss' checkpoints: take over, quantise, save (docs/mxfp4-weights.md).

`from_blocks` and `from_state_dict` keep a checkpoint's bytes, and `to_state_dict` returns them; none of these copies.
They refuse what they cannot take over exactly. The bits are those of clause M1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from executors._decode.dense import check_dense, decoded_dtype, name_of
from executors.mxfp4.quantization import quantized
from moe_ref.types import PROJECTIONS, MoEConfig, MoEWeights, MXFP4Tensor
from moe_ref.validation import DECODED_DTYPES, check_mxfp4, check_quantize_mxfp4, check_weights

__all__ = ["from_blocks", "from_state_dict", "quantize", "quantize_tensor", "to_state_dict"]

BYTES = 16  # per block


def from_blocks(blocks: Tensor, scales: Tensor, *, dtype: torch.dtype | str = "bfloat16") -> MXFP4Tensor:
    """Makes a tensor from a checkpoint's bytes, without a copy.

    Args:
        blocks: uint8, [..., k / 32, 16] as in gpt-oss, or [..., k / 2], with as many dimensions as the scales, as in
            transformers' own experts.
        scales: uint8, [..., k / 32].
        dtype: the dtype to decode to: fp32, bf16 or fp16, as a torch.dtype or its name.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    return _from_blocks(("blocks", "scales"), blocks, scales, dtype)


def from_state_dict(
    state: Mapping[str, Tensor], *, config: MoEConfig, prefix: str = "", dtype: torch.dtype | str = "bfloat16"
) -> MoEWeights:
    """Reads a layer from the entries of gpt-oss' checkpoints, with the same bytes.

    The entries are ``gate_up_proj_blocks`` [E, 2I, H / 32, 16] and ``gate_up_proj_scales`` [E, 2I, H / 32], the same of
    ``down_proj`` [E, H, I / 32, ...], and, where the layer has them, ``gate_up_proj_bias`` [E, 2I] and
    ``down_proj_bias`` [E, H]. Source: openai/gpt-oss-20b; transformers, ``integrations/mxfp4.py``.

    Args:
        state: a state dict; only these entries are read, and nothing is changed.
        config: the layer's configuration; gpt-oss' own is in docs/mxfp4-weights.md.
        prefix: the prefix of those names, such as "model.layers.0.mlp.experts.".
        dtype: the dtype that the projections decode to, also x's dtype: fp32, bf16 or fp16.

    Raises:
        ValueError, TypeError: one line naming the key or the field, its value, and what is allowed.
    """
    found: dict[str, Any] = {}
    for name in PROJECTIONS:
        keys = f"{prefix}{name}_blocks", f"{prefix}{name}_scales"
        for key in keys:
            if key not in state:
                raise ValueError(f"{key!r} is missing: must be there, with {' and '.join(keys)} of a layer in MXFP4")
        found[name] = _from_blocks(keys, state[keys[0]], state[keys[1]], dtype)
        found[f"{name}_bias"] = state.get(f"{prefix}{name}_bias")
    weights = MoEWeights(**found, config=config)
    check_weights(weights)
    return weights


def to_state_dict(weights: MoEWeights, prefix: str = "") -> dict[str, Tensor]:
    """Returns projections and biases under the names that `from_state_dict` reads, without a copy.

    Raises:
        ValueError, TypeError: one line naming what that form cannot hold: projections that are not in MXFP4 or are in
            the other order; adapters; a selection bias; expert scales; a norm of the experts' outputs.
    """
    check_weights(weights)
    for name in ("selection_bias", "expert_scale", "post_expert_norm", "lora"):
        if getattr(weights, name) is not None:
            raise ValueError(f"{name} is given: must be None, since gpt-oss' form cannot hold it")
    state: dict[str, Tensor] = {}
    for name in PROJECTIONS:
        tensor, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
        if not isinstance(tensor, MXFP4Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: must be a moe_ref.MXFP4Tensor")
        if tensor.transposed:
            raise ValueError(f"{name}.transposed=True: must be False, blocks along the input dimension")
        state |= {f"{prefix}{name}_{part}": array for part, array in tensor.arrays().items()}
        state |= {} if bias is None else {f"{prefix}{name}_bias": bias}
    return state


def quantize(weights: MoEWeights, *, dtype: torch.dtype | str | None = None) -> MoEWeights:
    """Quantises both projections of a layer to MXFP4 and keeps everything else (clause M1).

    Blocks run along the input dimension, H of gate_up_proj and I of down_proj, however the projections are stored:
    checkpoints have no other order. It works on the device of the weights, in pieces. Beside the result it needs tens
    of megabytes on a CPU and a few hundred elsewhere. The result holds no gradient.

    Args:
        weights: projections [E, 2I, H] (or [E, I, H]) and [E, H, I] in fp32, bf16 or fp16, of any strides; finite;
            H and I multiples of 32.
        dtype: the dtype to decode to: fp32, bf16 or fp16, as a torch.dtype or its name; default: the projections' own.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed; also for a projection
            that is in 4 bits already, or has NaN or infinite elements.
    """
    check_weights(weights)
    projections = {name: getattr(weights, name) for name in PROJECTIONS}
    return replace(weights, **_quantize(projections, dtype))


def quantize_tensor(values: Tensor, *, dtype: torch.dtype | str | None = None) -> MXFP4Tensor:
    """Quantises one tensor to MXFP4, in blocks along its last dimension, as `quantize` does.

    Raises:
        ValueError, TypeError: as `quantize`.
    """
    return _quantize({"values": values}, dtype)["values"]


def _quantize(dense: dict[str, Any], dtype: torch.dtype | str | None) -> dict[str, Any]:
    for name, values in dense.items():
        check_dense(name, values)
        check_quantize_mxfp4(values, decoded_dtype(values, dtype), name)
    with torch.no_grad():
        return {name: quantized(name, values, decoded_dtype(values, dtype)) for name, values in dense.items()}


def _from_blocks(names: tuple[str, str], blocks: Any, scales: Any, dtype: torch.dtype | str) -> MXFP4Tensor:
    for name, value in zip(names, (blocks, scales), strict=True):
        if not isinstance(value, Tensor) or value.dtype != torch.uint8:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} is {found}: must be a torch.Tensor of uint8")
    if blocks.device != scales.device:
        raise ValueError(f"{names[1]}.device={scales.device}: must be {blocks.device}, that of {names[0]}")
    named = name_of(dtype)
    if named not in DECODED_DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DECODED_DTYPES)}")
    shape = tuple(scales.shape)
    own, joined = (*shape, BYTES), (*shape[:-1], BYTES * shape[-1] if shape else 0)
    if tuple(blocks.shape) not in (own, joined) or not shape:
        allowed = f"must be {own} or {joined}, {BYTES} bytes for each of {names[1]}"
        raise ValueError(f"{names[0]}.shape={tuple(blocks.shape)}: {allowed}")
    tensor = MXFP4Tensor(blocks.detach().view(own), scales.detach(), dtype=named)
    check_mxfp4(names[0], tensor)
    return tensor
