"""Layers for which the kernels are compiled: of real models, and with what matters to a compiler."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from executors._base.arguments import Activation
from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor
from moe_ref.validation import dtype_name


class CaseLayer(NamedTuple):
    """A layer as the products see it.

    Attributes:
        name: the model, or what is special about the layer.
        experts, top_k, hidden, intermediate: E, K, H, I.
        act: the activation.
        biases: whether both projections have one.
        by_columns: whether (E, H, 2I) and (E, I, H) are stored, as in gpt-oss.
        scale_input: C3.
        rank: of both adapters, with frozen projections; 0 for none.
        lora_dtype: of the adapters; "" for x's.
        packed: how both projections are frozen in 4 bits: "nf4", "nested" (scales in 8 bits) or "mxfp4"; "" for dense.
        decoded: whether they are decoded before the products.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    act: Activation
    biases: bool = False
    by_columns: bool = False
    scale_input: bool = False
    rank: int = 0
    lora_dtype: str = ""
    packed: str = ""
    decoded: bool = False


SWIGLU = Activation("swiglu", 1.0, None, 0.0, "concatenated")
CLAMPED = Activation("swiglu", 1.702, 7.0, 1.0, "interleaved")
QWEN3 = CaseLayer("qwen3", 128, 8, 2048, 768, SWIGLU)
GPT_OSS = CaseLayer("gpt-oss", 32, 4, 2880, 2880, CLAMPED, biases=True, by_columns=True)
GPT_OSS_ROWS = GPT_OSS._replace(name="oss-rows", by_columns=False)
DEEPSEEK = CaseLayer("deepseek", 256, 8, 7168, 2048, SWIGLU, by_columns=True)  # 15 GB: offsets need 64 bits
GEGLU = QWEN3._replace(name="geglu", act=SWIGLU._replace(name="geglu"), biases=True)
STEP = QWEN3._replace(name="step", act=SWIGLU._replace(limit=7.0, clamp="after"))
INKLING2 = CaseLayer("inkling2", 384, 8, 4608, 2304, SWIGLU._replace(gate_softcap=4.0, up_softcap=25.0))
GELU = CaseLayer("gelu", 128, 8, 1040, 528, Activation("gelu", 1.0, None, 0.0, ""), biases=True, scale_input=True)
RELU2 = QWEN3._replace(name="relu2", act=Activation("relu2", 1.0, None, 0.0, ""))
ODD = CaseLayer("odd", 5, 2, 50, 17, CLAMPED._replace(layout="concatenated"), biases=True)
# Rows so short and odd that a thread holds one element of a row: sums of products begin between lanes.
ODD_PAIRS = ODD._replace(name="odd-pairs", hidden=7, act=CLAMPED)
ODD_SCALED = ODD_PAIRS._replace(name="odd-scale", scale_input=True)

LORA = QWEN3._replace(name="lora", rank=16)
LORA_FP32 = GPT_OSS._replace(name="lora-fp32", rank=32, lora_dtype="float32")  # as PEFT makes them

NF4 = QWEN3._replace(name="nf4", packed="nf4")
NESTED = GPT_OSS._replace(name="nf4-nest", packed="nested")
MXFP4 = GPT_OSS_ROWS._replace(name="mxfp4", packed="mxfp4")
PEFT = NESTED._replace(name="nf4-peft", rank=16, lora_dtype="float32")
DECODED = NESTED._replace(name="nf4-dec", decoded=True)
ODD_NF4 = ODD._replace(name="odd-nf4", packed="nested")


def packed_like(kind: str, matrices: torch.Tensor, transposed: bool) -> PackedTensor:
    """A projection in 4 bits with the shape of matrices [E, m, k], in the same order in memory.

    Args:
        kind: "nf4", "nested" or "mxfp4".
        matrices: gives shape, dtype and device.
        transposed: whether m is their last dimension in memory.
    """
    absent = partial(torch.empty, device=matrices.device)
    experts, outer, inner = (matrices.transpose(1, 2) if transposed else matrices).shape
    if kind == "mxfp4":
        groups = (experts, outer, inner // 32)
        codes, scales = absent(*groups, 16, dtype=torch.uint8), absent(groups, dtype=torch.uint8)
        return MXFP4Tensor(codes, scales, dtype=dtype_name(matrices), transposed=transposed)
    blocks = -(-experts * outer * inner // 64)
    codes = absent(-(-experts * outer * inner // 2), dtype=torch.uint8)
    form: dict[str, Any] = {"shape": tuple(matrices.shape), "dtype": dtype_name(matrices), "transposed": transposed}
    if kind == "nf4":
        return NF4Tensor(codes, absent(blocks), **form)
    absmax = absent(blocks, dtype=torch.uint8)
    return NF4Tensor(codes, absmax, absent(-(-blocks // 256)), absent(256), absent(()), **form)
