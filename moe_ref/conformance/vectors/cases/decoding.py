"""Tensors in 4 bits and their numbers (Q1 to Q3, Q5, Q6, M1): every code, blocks that straddle, nested statistics."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.vectors.cases.case import Case, of
from moe_ref.conformance.vectors.contents import Decode
from moe_ref.nf4 import dynamic_code
from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor

ALL_CODES = np.arange(0, 256, 17, dtype=np.uint8)  # 0x00, 0x11, ..., 0xff
BF16_TIE = 1.3886116743087769  # times NF4's code 14, in fp32


def _u8(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint8)


def _f32(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


def _decode(name: str, clauses: str, says: str, tensor: PackedTensor) -> Case:
    return of(f"decode-{name}", clauses, says, Decode(tensor))


def _nested() -> list[Case]:
    trap = np.zeros(256, dtype=np.float32)
    trap[3] = 1 + 2**-12
    line = np.arange(256, dtype=np.float32)
    wide, fused = dict[str, Any](dtype="float32"), _f32(1 + 2**-12)
    segments = NF4Tensor(
        _u8(*[0xF2] * 96),
        _u8(1, 1, 1, 2, 2, 2),
        _f32(1, 10, 100, 1000),
        line,
        _f32(0.5, 0.25),
        shape=(2, 1, 96),
        blocksize=32,
        nested_blocksize=2,
        **wide,
    )
    rng = np.random.default_rng(5)
    code = np.array(dynamic_code(), dtype=np.float32)
    many = NF4Tensor(
        rng.integers(0, 256, 16 * 260, dtype=np.uint8),
        rng.integers(0, 256, 260, dtype=np.uint8),
        _f32(0.75, 1.5),
        code,
        np.float32(1.25) * np.ones((), dtype=np.float32),
        shape=(260, 32),
        blocksize=32,
        dtype="bfloat16",
    )
    alone = [NF4Tensor(_u8(*[0xFF] * 10), _f32(s), shape=(20,), blocksize=32, **wide) for s in (1, 2)]
    joined = NF4Tensor(_u8(*[0xFF] * 20), _f32(1, 2), shape=(2, 20), blocksize=32, **wide)
    offset = np.float32(2**-26) * np.ones((), dtype=np.float32)
    return [
        _decode(
            "nested-not-fused",
            "Q3",
            "A product, then a sum, each rounded: a fused multiply-add gives another number.",
            NF4Tensor(_u8(0xF7), _u8(3), fused, trap, offset, shape=(2,), **wide),
        ),
        _decode(
            "nested-per-expert", "Q5 Q3", "Each expert has its offset, and its nested blocks begin anew.", segments
        ),
        _decode(
            "nested-transposed", "Q5", "The same, read with its last dimensions swapped.", segments.transpose(1, 2)
        ),
        _decode(
            "nested-two-blocks", "Q3", "260 blocks of codes: the last four have a nested block of their own.", many
        ),
        _decode("first-alone", "Q5", "20 numbers in blocks of 32.", alone[0]),
        _decode("second-alone", "Q5", "20 more, with another scale.", alone[1]),
        _decode("joined", "Q5", "The bytes of both, joined: block 0 straddles, so numbers differ.", joined),
    ]


def _nf4() -> list[Case]:
    cases = []
    for kind in ("nf4", "fp4"):
        for dtype in ("float32", "bfloat16", "float16"):
            tensor = NF4Tensor(ALL_CODES, _f32(BF16_TIE), shape=(32,), dtype=dtype, quant_type=kind)
            cases.append(_decode(f"{kind}-codes-{dtype}", "Q1 Q2", "Every code in both nibbles.", tensor))
    one: dict[str, Any] = {"dtype": "float32", "blocksize": 32}
    rows = NF4Tensor(_u8(*[0xF7] * 24), _f32(1, 2), shape=(3, 16), **one)
    straddling = NF4Tensor(_u8(0xF7, 0x0F, 0x70), _f32(1), shape=(2, 1, 3), dtype="float32")
    says = "Blocks ignore rows: two rows of 16 share a block of 32."
    cases += [
        _decode("rows-share-a-block", "Q1 Q6", says, rows),
        _decode("experts-share-a-byte", "Q1", "The second expert begins with a low nibble.", straddling),
        _decode(
            "odd", "Q1", "The last low nibble means nothing.", NF4Tensor(_u8(0x0F, 0x7C), _f32(2), shape=(3,), **one)
        ),
        _decode("one-row", "Q6 Q1", "One row of two numbers.", NF4Tensor(_u8(0xF0), _f32(1), shape=(1, 2), **one)),
        _decode("nothing", "Q1 E3", "No numbers at all.", NF4Tensor(_u8(), _f32(), shape=(0, 4), **one)),
        _decode(
            "transposed",
            "Q1",
            "Bytes of (1, 2, 3), read as (1, 3, 2).",
            NF4Tensor(_u8(0xF7, 0x07, 0x70), _f32(1), shape=(1, 2, 3), dtype="float32").transpose(1, 2),
        ),
        _decode(
            "tie-of-bf16",
            "Q2",
            "A product in fp32 that is a tie of bf16: one exact product would round up.",
            NF4Tensor(_u8(0xE0), _f32(BF16_TIE), shape=(1,), dtype="bfloat16"),
        ),
        _decode(
            "tiny-bf16",
            "Q2 Q6",
            "Subnormal numbers, which a processor may flush.",
            NF4Tensor(_u8(0xF0, 0x8E), _f32(2.0**-133), shape=(4,), dtype="bfloat16"),
        ),
        _decode(
            "tiny-fp32",
            "Q2",
            "Subnormal numbers of fp32.",
            NF4Tensor(ALL_CODES, _f32(2.0**-140), shape=(32,), dtype="float32"),
        ),
        _decode(
            "tiny-fp16",
            "Q2",
            "Subnormal numbers of fp16, and ties among them.",
            NF4Tensor(ALL_CODES, _f32(2.0**-22), shape=(32,), dtype="float16", quant_type="fp4"),
        ),
        _decode(
            "past-fp16",
            "Q2",
            "Numbers past fp16's range are infinite.",
            NF4Tensor(ALL_CODES, _f32(70000.0), shape=(32,), dtype="float16"),
        ),
        _decode(
            "minus-zero",
            "Q2",
            "A negative scale: zeros keep their sign.",
            NF4Tensor(ALL_CODES, _f32(-1.0), shape=(32,), dtype="float32", quant_type="fp4"),
        ),
    ]
    return cases


def _mxfp4() -> list[Case]:
    codes = _u8(*[low | (low + 1) << 4 for low in range(0, 16, 2)] * 2)
    exponents = _u8(0, 1, 103, 121, 127, 128, 132, 252, 253, 254, 255)
    blocks = np.repeat(codes[None], len(exponents), axis=0)[None]
    cases = []
    for dtype in ("float32", "bfloat16", "float16"):
        tensor = MXFP4Tensor(blocks, exponents[None], dtype=dtype)
        cases.append(_decode(f"mxfp4-{dtype}", "M1", "Every code under exponents at the ends and about 1.", tensor))
    stored = MXFP4Tensor(np.full((1, 2, 2, 16), 0x21, np.uint8), np.array([[[127, 128], [129, 130]]], np.uint8))
    cases.append(_decode("mxfp4-rows", "M1", "Two rows of two blocks.", stored))
    cases.append(_decode("mxfp4-transposed", "M1", "The same, read as (1, 64, 2).", stored.transpose(1, 2)))
    return cases


def cases() -> list[Case]:
    """All of them."""
    return [*_nested(), *_nf4(), *_mxfp4()]
