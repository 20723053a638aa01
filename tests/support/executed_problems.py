"""A fixed set of problems: every kernel of ``triton``, tile of sm80, dtype and form of 4 bits is in one of them.

With those for sm90, so is every tile of sm90.
"""

from __future__ import annotations

from dataclasses import replace

from executors._triton import configs
from executors._triton.launch.operands import UNIT
from moe_ref import MoEConfig
from moe_ref.conformance.problems.problem import Problem

GPT_OSS = MoEConfig(2, scoring="topk_softmax", alpha=1.702, limit=1.0, up_offset=1.0, gate_up_layout="interleaved")
DEEPSEEK = MoEConfig(
    3, scoring="sigmoid", renormalize=True, num_groups=4, topk_groups=2, group_score="top2_sum", activation="geglu"
)
ALL_BIASES = {"gate_up_bias": True, "down_bias": True}
FEW = Problem(12, 5, 64, 48, GPT_OSS, "bfloat16", **ALL_BIASES)  # up to 16 rows of an expert
SOME = replace(FEW, tokens=41, experts=2)  # up to 64
MANY = replace(FEW, tokens=140, experts=2, hidden=80, intermediate=112)  # more
ODD = replace(FEW, hidden=7, intermediate=17, tokens=9)
GATED = MoEConfig(2, activation="geglu")
SCALED = MoEConfig(2, scale_input=True)
NF4 = replace(FEW, hidden=64, intermediate=96, quant_type="nf4")
LORA = {"gate_up_rank": 5, "down_rank": 18}
ROUTED = Problem(17, 8, 16, 8, DEEPSEEK, selection_bias="small", broken_logits=3)

# name: the problem, and for 4 bits the path of ``grouped_nf4`` that takes it; "" is ``triton``
FIXED: dict[str, tuple[Problem, str]] = {
    "few, bf16": (FEW, ""),
    "some, bf16, transposed, geglu": (replace(SOME, config=GATED, weights_layout="transposed"), ""),
    "many, bf16": (MANY, ""),
    "many, bf16, scaled, adapters": (replace(MANY, config=SCALED, **LORA, entry="experts"), ""),
    "few, fp16, adapters": (replace(FEW, dtype="float16", **LORA), ""),
    "some, fp16": (replace(SOME, dtype="float16", config=replace(GPT_OSS, limit=0.5, clamp="after")), ""),
    "many, fp16, transposed": (replace(MANY, dtype="float16", config=GATED, weights_layout="transposed"), ""),
    "few, fp32": (replace(FEW, dtype="float32"), ""),
    "many, fp32, frozen": (
        replace(MANY, dtype="float32", config=SCALED, frozen=frozenset({"gate_up_proj", "down_proj"})),
        "",
    ),
    "odd, bf16": (replace(ODD, dtype="bfloat16", weights_layout="sliced", dy_layout="sliced"), ""),
    "odd, fp16, adapters": (replace(ODD, dtype="float16", tokens=33, experts=2, **LORA), ""),
    "odd, fp32, down bias": (replace(ODD, dtype="float32", gate_up_bias=False), ""),  # sums of one product a thread
    "odd, fp32, many": (
        replace(ODD, dtype="float32", tokens=50, experts=2, config=MoEConfig(2, activation="relu2")),
        "",
    ),
    "capped, fp32": (
        replace(FEW, dtype="float32", config=replace(GPT_OSS, limit=None, gate_softcap=2.0, up_softcap=25.0)),
        "",
    ),
    "tanh, empty slots, bf16": (
        replace(FEW, config=MoEConfig(2, activation="gelu_tanh"), entry="experts", empty_slots=True),
        "",
    ),
    "groups": (ROUTED, ""),
    "ties, fp64": (replace(ROUTED, config=MoEConfig(4), logits="ties", routing_dtype="float64"), ""),
    "many slots": (Problem(300, 5, 8, 8, MoEConfig(4, activation="silu"), "bfloat16", entry="experts"), ""),
    "nf4, few, bf16": (NF4, ""),
    "nf4, some, bf16, nested": (replace(NF4, tokens=41, experts=2, nested="one"), ""),
    "nf4, many, bf16": (replace(NF4, tokens=140, experts=2, config=GATED, weights_layout="transposed"), ""),
    "fp4, fp16, per expert": (replace(NF4, dtype="float16", quant_type="fp4", nested="per expert"), ""),
    "nf4, fp32": (replace(NF4, dtype="float32"), ""),
    "fp4, fp32, some": (replace(NF4, dtype="float32", quant_type="fp4", tokens=41, experts=2), ""),
    "nf4, odd, bf16": (replace(NF4, hidden=17, intermediate=33, blocksize=32), ""),
    "nf4, odd, fp32, many": (replace(NF4, dtype="float32", hidden=17, intermediate=33, tokens=41, experts=2), ""),
    "mxfp4, few, bf16, adapters": (replace(NF4, quant_type="mxfp4", **LORA), ""),
    "mxfp4, fp16": (replace(NF4, dtype="float16", quant_type="mxfp4", tokens=41, experts=2), ""),
    "nf4, decoded, bf16, nested": (replace(NF4, nested="one", weights_layout="transposed"), "decoded"),
    "fp4, decoded, fp32": (replace(NF4, quant_type="fp4", dtype="float32"), "decoded"),
    "mxfp4, decoded, fp16": (replace(NF4, quant_type="mxfp4", dtype="float16", tokens=41, experts=2), "decoded"),
}

# Sizes that TMA takes, with more steps of the inner dimension than are loaded ahead, and boxes that end outside.
SM90: dict[str, tuple[Problem, str]] = {
    "few, bf16, TMA": (replace(FEW, hidden=400), ""),
    "some, bf16, transposed, TMA": (replace(SOME, hidden=336, config=GATED, weights_layout="transposed"), ""),
    "some, fp16, TMA": (replace(SOME, dtype="float16", intermediate=272), ""),
    "many, bf16, TMA": (replace(MANY, tokens=70, hidden=336, intermediate=80), ""),
    "many, fp16, transposed, TMA": (
        replace(MANY, dtype="float16", config=GATED, intermediate=272, weights_layout="transposed"),
        "",
    ),
}

# Of these every tile and kernel is in another problem too: they run every night.
NIGHTLY_ONLY = {
    *("some, fp16", "many, bf16", "many, fp16, transposed", "capped, fp32"),
    *("mxfp4, fp16", "mxfp4, decoded, fp16"),
}


def tile_of(family: str, problem: Problem, path: str) -> configs.KernelConfig:
    """The configuration that a problem takes: by dtype, alignment, 4 bits and rows."""
    packed = bool(problem.quant_type) and path != "decoded"
    sizes = (problem.hidden, problem.intermediate)
    aligned = all(size % UNIT == 0 for size in sizes) and problem.weights_layout != "sliced"
    narrow = problem.dtype != "float32"
    rows = problem.tokens * problem.top_k / problem.experts
    return configs.config_of(family, narrow=narrow, aligned=aligned, rows=rows, batch_invariant=False, packed=packed)


def every_tile(family: str) -> set[configs.KernelConfig]:
    """All configurations of a family."""
    own = configs.FAMILIES[family]
    return {*own.narrow, *own.wide, *own.odd, *own.packed.narrow, *own.packed.wide, *own.packed.odd}
