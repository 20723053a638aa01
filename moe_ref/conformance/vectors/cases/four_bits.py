"""Four bits (Q1 to Q6, M1): every code, blocks that straddle, nested statistics, ties, and layers of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moe_ref.conformance.problems.pinned import GPT_OSS, MUSE
from moe_ref.conformance.vectors.cases.case import Case, layer, of
from moe_ref.conformance.vectors.contents import Decode, Quantize
from moe_ref.nf4 import FP4_CODE, NF4_CODE, dynamic_code
from moe_ref.types import MoEConfig, MXFP4Tensor, NF4Tensor, PackedTensor

ALL_CODES = np.arange(0, 256, 17, dtype=np.uint8)  # 0x00, 0x11, ..., 0xff
TWO = MoEConfig(2)


def _u8(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint8)


def _f32(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


def _decode(name: str, clauses: str, says: str, tensor: PackedTensor) -> Case:
    return of(f"decode-{name}", clauses, says, Decode(tensor))


def _nf4() -> list[Case]:
    cases = []
    for kind in ("nf4", "fp4"):
        for dtype in ("float32", "bfloat16", "float16"):
            tensor = NF4Tensor(ALL_CODES, _f32(1.3886116743087769), shape=(32,), dtype=dtype, quant_type=kind)  # type: ignore[arg-type]
            cases.append(_decode(f"{kind}-codes-{dtype}", "Q1 Q2", "Every code in both nibbles.", tensor))
    one: dict[str, Any] = {"dtype": "float32", "blocksize": 32}
    rows = NF4Tensor(_u8(*[0xF7] * 24), _f32(1, 2), shape=(3, 16), **one)
    straddling = NF4Tensor(_u8(0xF7, 0x0F, 0x70), _f32(1), shape=(2, 1, 3), dtype="float32")
    says = "Blocks ignore rows: two rows of 16 share a block of 32."
    cases += [
        _decode("rows-share-a-block", "Q1 Q6", says, rows),
        _decode("experts-share-a-byte", "Q1", "The second expert begins with a low nibble.", straddling),
        _decode("odd", "Q1", "The last low nibble means nothing.", NF4Tensor(_u8(0x0F, 0x7C), _f32(2), shape=(3,), **one)),
        _decode("one-row", "Q6 Q1", "One row of two numbers.", NF4Tensor(_u8(0xF0), _f32(1), shape=(1, 2), **one)),
        _decode("nothing", "Q1 E3", "No numbers at all.", NF4Tensor(_u8(), _f32(), shape=(0, 4), **one)),
        _decode("transposed", "Q1", "Bytes of (1, 2, 3), read as (1, 3, 2).",
                NF4Tensor(_u8(0xF7, 0x07, 0x70), _f32(1), shape=(1, 2, 3), dtype="float32").transpose(1, 2)),
        _decode("tie-of-bf16", "Q2", "A product in fp32 that is a tie of bf16: one exact product would round up.",
                NF4Tensor(_u8(0xE0), _f32(1.3886116743087769), shape=(1,), dtype="bfloat16")),
        _decode("tiny-bf16", "Q2 Q6", "Subnormal numbers, which a processor may flush.",
                NF4Tensor(_u8(0xF0, 0x8E), _f32(2.0**-133), shape=(4,), dtype="bfloat16")),
        _decode("tiny-fp32", "Q2", "Subnormal numbers of fp32.",
                NF4Tensor(ALL_CODES, _f32(2.0**-140), shape=(32,), dtype="float32")),
        _decode("tiny-fp16", "Q2", "Subnormal numbers of fp16, and ties among them.",
                NF4Tensor(ALL_CODES, _f32(2.0**-22), shape=(32,), dtype="float16", quant_type="fp4")),
        _decode("past-fp16", "Q2", "Numbers past fp16's range are infinite.",
                NF4Tensor(ALL_CODES, _f32(70000.0), shape=(32,), dtype="float16")),
        _decode("minus-zero", "Q2", "A negative scale: zeros keep their sign.",
                NF4Tensor(ALL_CODES, _f32(-1.0), shape=(32,), dtype="float32", quant_type="fp4")),
    ]  # fmt: skip
    return cases


def _nested() -> list[Case]:
    trap = np.zeros(256, dtype=np.float32)
    trap[3] = 1 + 2**-12
    line = np.arange(256, dtype=np.float32)
    wide, fused = dict[str, Any](dtype="float32"), _f32(1 + 2**-12)
    segments = NF4Tensor(
        _u8(*[0xF2] * 96), _u8(1, 1, 1, 2, 2, 2), _f32(1, 10, 100, 1000), line, _f32(0.5, 0.25),
        shape=(2, 1, 96), blocksize=32, nested_blocksize=2, **wide,
    )  # fmt: skip
    rng = np.random.default_rng(5)
    code = np.array(dynamic_code(), dtype=np.float32)
    many = NF4Tensor(
        rng.integers(0, 256, 16 * 260, dtype=np.uint8), rng.integers(0, 256, 260, dtype=np.uint8), _f32(0.75, 1.5), code,
        np.float32(1.25) * np.ones((), dtype=np.float32), shape=(260, 32), blocksize=32, dtype="bfloat16",
    )  # fmt: skip
    alone = [NF4Tensor(_u8(*[0xFF] * 10), _f32(s), shape=(20,), blocksize=32, **wide) for s in (1, 2)]
    joined = NF4Tensor(_u8(*[0xFF] * 20), _f32(1, 2), shape=(2, 20), blocksize=32, **wide)
    offset = np.float32(2**-26) * np.ones((), dtype=np.float32)
    return [
        _decode("nested-not-fused", "Q3", "A product, then a sum, each rounded: a fused multiply-add gives another number.",
                NF4Tensor(_u8(0xF7), _u8(3), fused, trap, offset, shape=(2,), **wide)),
        _decode("nested-per-expert", "Q5 Q3", "Each expert has its offset, and its nested blocks begin anew.", segments),
        _decode("nested-transposed", "Q5", "The same, read with its last dimensions swapped.", segments.transpose(1, 2)),
        _decode("nested-two-blocks", "Q3", "260 blocks of codes: the last four have a nested block of their own.", many),
        _decode("first-alone", "Q5", "20 numbers in blocks of 32.", alone[0]),
        _decode("second-alone", "Q5", "20 more, with another scale.", alone[1]),
        _decode("joined", "Q5", "The bytes of both, joined: block 0 straddles, so numbers differ.", joined),
    ]  # fmt: skip


def _quantize() -> list[Case]:
    rng = np.random.default_rng(6)
    cases = []

    def add(name: str, clauses: str, says: str, values: np.ndarray, kind: str, **form: Any) -> None:
        cases.append(of(f"quantize-{name}", clauses, says, Quantize(values, kind, **form)))

    for kind, code in (("nf4", NF4_CODE), ("fp4", FP4_CODE)):
        table = np.array(sorted(set(code)), dtype=np.float32)
        middle = (table[1:] + table[:-1]) / np.float32(2)
        beside = [np.nextafter(middle, np.float32(to)) for to in (-2, 2)]
        ties = np.concatenate([[1.0], middle, *beside]).astype(np.float64)
        add(f"{kind}-ties", "Q4", "Every midpoint and its neighbours: a tie takes the lower number.", ties, kind)
        normal = rng.standard_normal(130).astype(np.float32).astype(np.float64)
        add(f"{kind}-normal", "Q4", "Two blocks and a partial one.", normal, kind, dtype="bfloat16")
        add(f"{kind}-zeros", "Q4", "A block of zeros, of both signs.", np.copysign(0.0, normal[:33]), kind, blocksize=32)
        nested = (normal * 3)[:128]
        add(f"{kind}-nested", "Q4", "Scales are quantised too.", nested, kind, blocksize=32, nested=True)
    tiny = np.array([1e-39, -5e-40, 1e-38, 0.0], dtype=np.float32).astype(np.float64)
    add("nf4-tiny", "Q4", "A block whose largest magnitude is below 1e-38, and one of 1e-38.", tiny, "nf4")
    bf16 = np.round(rng.standard_normal(64) * 64) / 64
    add("nf4-of-bf16", "Q4", "Numbers in bf16.", bf16, "nf4", values_dtype="bfloat16", dtype="bfloat16")
    values = np.array([-7.9, 2.5, 1.25, 0.75, 0.25, 0.26, -0.2, -0.0, *[0.0] * 24], dtype=np.float32).astype(np.float64)
    add("mxfp4-ties", "M1", "Ties take the code with an even mantissa; beyond 6 is 6; what is not below 0 has no sign.", values, "mxfp4")
    sizes = np.concatenate([np.ldexp(rng.standard_normal((4, 32)), [[-149], [-120], [0], [126]]), np.zeros((1, 32))])
    add("mxfp4-sizes", "M1", "Subnormal blocks, huge ones, zeros.", sizes.astype(np.float32).astype(np.float64), "mxfp4")
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


def _layers() -> list[Case]:
    small = replace(GPT_OSS, top_k=2)
    both: dict[str, Any] = {"gate_up_bias": True, "down_bias": True}
    adapters: dict[str, Any] = {"gate_up_rank": 2, "down_rank": 2}
    wanted: dict[str, tuple[str, str, MoEConfig, str, dict[str, Any]]] = {
        "nf4": ("Q1 Q2", "Frozen projections in NF4.", TWO, "5 3 16 8", {"quant_type": "nf4", **both}),
        "nf4-straddling": ("Q1 Q3", "Blocks straddle rows and experts.", MoEConfig(2, activation="gelu"), "5 5 7 5",
                           {"quant_type": "nf4", "blocksize": 32, "nested": "one"}),
        "nf4-nested-per-expert": ("Q5 Q3", "Stored transposed, nested for each expert, with adapters.", small, "5 3 32 16",
                                  {"quant_type": "nf4", "nested": "per expert", "weights_layout": "transposed",
                                   "dtype": "bfloat16", **both, **adapters}),
        "nf4-large-block": ("Q1", "All numbers are in one block, which is partial.", TWO, "4 3 17 1",
                            {"quant_type": "fp4", "blocksize": 4096, "weights_layout": "transposed", "dtype": "float16"}),
        "fp4": ("Q1 Q2", "Frozen projections in FP4.", TWO, "5 3 16 8", {"quant_type": "fp4", "dtype": "float16"}),
        "nf4-norm": ("Q1 E8", "A norm after each expert.", replace(MUSE, top_k=2), "4 3 16 8",
                     {"quant_type": "nf4", "post_expert_norm": True, "down_bias": True}),
        "nf4-no-tokens": ("Q1 E3", "Nobody has a token.", TWO, "0 3 8 8", {"quant_type": "nf4"}),
        "nf4-beside-dense": ("Q1 D1", "One projection in 4 bits, the other dense, with a gradient.", small, "4 3 16 8",
                             {"quant_type": "nf4", "down_quant_type": "", "dtype": "bfloat16", **both}),
        "fp4-beside-nf4": ("Q1 Q5", "Two formats.", TWO, "4 3 16 8",
                           {"quant_type": "fp4", "down_quant_type": "nf4", "blocksize": 32, "nested": "one"}),
        "mxfp4": ("M1", "gpt-oss' form.", small, "4 2 32 32", {"quant_type": "mxfp4", "dtype": "bfloat16", **both}),
        "mxfp4-transposed": ("M1", "Blocks along the output dimension.", small, "4 2 32 32",
                             {"quant_type": "mxfp4", "weights_layout": "transposed", "dtype": "float16"}),
        "mxfp4-beside-dense": ("M1 D1", "down_proj in 4 bits beside a dense one.", TWO, "4 1 32 32",
                               {"down_quant_type": "mxfp4", "down_rank": 2}),
    }  # fmt: skip
    wanted["mxfp4-beside-dense"][4].setdefault("seed", 3)
    return [
        layer(f"layer-{name}", clauses, says, config if int(sizes.split()[1]) > 1 else replace(config, top_k=1), sizes, **more)
        for name, (clauses, says, config, sizes, more) in wanted.items()
    ]


def cases() -> list[Case]:
    """All of them."""
    return [*_nested(), *_nf4(), *_quantize(), *_mxfp4(), *_layers()]
