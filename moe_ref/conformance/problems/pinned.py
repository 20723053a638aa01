"""Problems that always run: sizes of real layers, many tokens, and one for each bug that was found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import MoEConfig

GPT_OSS = MoEConfig(
    top_k=4, scoring="topk_softmax", alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved"
)
STEP = MoEConfig(top_k=8, scoring="sigmoid", renormalize=True, limit=7.0, clamp="after")
INKLING2 = MoEConfig(top_k=4, scoring="sigmoid", renormalize=True, gate_softcap=4.0, up_softcap=25.0)
DEEPSEEK = MoEConfig(top_k=8, scoring="sigmoid", renormalize=True, routed_scaling_factor=2.5)
DEEPSEEK_V4 = MoEConfig(top_k=6, scoring="sqrtsoftplus", renormalize=True, routed_scaling_factor=1.5)
KOLIBRI = MoEConfig(top_k=4, scoring="sigmoid", renormalize=True, renormalize_eps=0.0, selection_key="logit")
GROUPED = MoEConfig(top_k=3, scoring="sigmoid", num_groups=4, topk_groups=2, group_score="top2_sum")
ERNIE = MoEConfig(top_k=6, renormalize=True, renormalize_eps=1e-12, renormalize_form="max")
GEMMA = MoEConfig(top_k=8, renormalize=True, renormalize_eps=0.0, activation="geglu_tanh")
MUSE = MoEConfig(top_k=4, scoring="sigmoid", renormalize=True, renormalize_eps=1e-15, post_expert_norm_eps=1e-8)
BIASES: dict[str, Any] = {"gate_up_bias": True, "down_bias": True}
ADAPTERS: dict[str, Any] = {"gate_up_rank": 4, "down_rank": 4}

LARGE = (
    # gpt-oss' own width; few tokens, so that most experts have none
    Problem(3, 4, 2880, 90, GPT_OSS, "bfloat16", **BIASES, weights_layout="transposed", seed=1),
    # thousands of tokens: rms gates see a systematic error of 1% here
    Problem(2048, 9, 32, 33, GPT_OSS, "bfloat16", **BIASES, logits="skewed", seed=2),
    # many experts, not a power of two, long sums over tokens
    Problem(4096, 96, 16, 8, DEEPSEEK, "float32", logits="skewed", seed=3),
)

PACKED = (
    # the format of a fine-tuned gpt-oss: stored transposed, nested for each expert, biases and adapters
    Problem(
        64,
        9,
        64,
        64,
        GPT_OSS,
        "bfloat16",
        **BIASES,
        **ADAPTERS,
        quant_type="nf4",
        nested="per expert",
        weights_layout="transposed",
        seed=1,
    ),
    # gpt-oss' checkpoints, with adapters
    Problem(64, 9, 64, 96, GPT_OSS, "bfloat16", **BIASES, **ADAPTERS, quant_type="mxfp4", seed=6),
    # MXFP4 in the order in which gpt-oss has its parameters in bf16
    Problem(
        33, 5, 96, 32, GPT_OSS, "float16", gate_up_bias=True, quant_type="mxfp4", weights_layout="transposed", seed=7
    ),
    # gpt-oss' own width: thousands of blocks; blocks of nested statistics straddle experts
    Problem(3, 4, 2880, 90, GPT_OSS, "bfloat16", quant_type="nf4", nested="one", down_bias=True, seed=2),
    # thousands of tokens, all experts
    Problem(2048, 9, 32, 32, DEEPSEEK, "float16", quant_type="fp4", blocksize=32, logits="skewed", seed=3),
    # blocks straddle rows and experts, and the last one is partial, down to half a byte
    Problem(9, 5, 7, 5, MoEConfig(2, activation="gelu"), quant_type="nf4", blocksize=32, nested="one", seed=4),
    Problem(
        8, 3, 17, 1, MoEConfig(2), "float16", quant_type="fp4", blocksize=4096, weights_layout="transposed", seed=5
    ),
    # a norm after each expert, which no kernel has
    Problem(
        33, 5, 64, 32, MUSE, "bfloat16", quant_type="nf4", down_bias=True, down_rank=3, post_expert_norm=True, seed=8
    ),
    # nobody has a token; a single number
    Problem(0, 3, 8, 8, MoEConfig(1), "bfloat16", quant_type="nf4"),
    Problem(1, 1, 1, 1, MoEConfig(1, activation="relu2"), quant_type="fp4", nested="one"),
    # a single block to a row, the fewest that MXFP4 has
    Problem(1, 1, 32, 32, MoEConfig(1, activation="relu2"), quant_type="mxfp4"),
    Problem(0, 2, 32, 32, MoEConfig(2), "float16", quant_type="mxfp4"),
    # one projection in 4 bits, frozen, and the other dense, with a gradient; either way round, adapters on both
    Problem(
        17,
        5,
        64,
        32,
        GPT_OSS,
        "bfloat16",
        **BIASES,
        **ADAPTERS,
        quant_type="nf4",
        down_quant_type="",
        nested="per expert",
        weights_layout="transposed",
        seed=8,
    ),
    Problem(17, 5, 64, 32, replace(DEEPSEEK, top_k=2), "float16", **ADAPTERS, down_quant_type="mxfp4", seed=9),
    # two formats of 4 bits; in one of them blocks straddle experts
    Problem(9, 5, 64, 32, MoEConfig(2), quant_type="fp4", down_quant_type="nf4", blocksize=4096, nested="one", seed=10),
    Problem(9, 5, 96, 32, GPT_OSS, "bfloat16", gate_up_rank=3, quant_type="mxfp4", down_quant_type="nf4", seed=11),
)


def _in_fp16(sizes: tuple[int, int, int, int], config: MoEConfig, powers: dict[str, int], **more: Any) -> Problem:
    return Problem(*sizes, config, "float16", powers=tuple(powers.items()), **more)


PAST_RANGE = (  # clause E7
    # gpt-oss clamps numbers past the range; the other tokens are ordinary
    _in_fp16((9, 5, 64, 64), GPT_OSS, {"x[0]": 12, "gate_up_proj": 4}, **BIASES, **ADAPTERS, seed=1),
    # the same in the format of gpt-oss' checkpoints
    _in_fp16((9, 5, 64, 64), GPT_OSS, {"x[0]": 12, "gate_up_proj": 4}, gate_up_bias=True, quant_type="mxfp4", seed=2),
    # one token's z, h and o among ordinary ones
    _in_fp16(
        (9, 5, 32, 32), MoEConfig(2), {"x[0]": 9, "gate_up_proj": 6, "topk_weights": -20}, entry="experts", seed=3
    ),
    # h alone in NF4, each expert with its own nested statistics; o alone in FP4, whose blocks straddle experts
    _in_fp16(
        (33, 5, 64, 32),
        MoEConfig(2, activation="geglu", routed_scaling_factor=2.0**-14),
        {"up": 13, "x": 3},
        quant_type="nf4",
        nested="per expert",
        seed=4,
    ),
    _in_fp16(
        (33, 5, 17, 50),
        MoEConfig(2, routed_scaling_factor=2.0**-16),
        {"gate_up_proj": 2, "down_proj": 13},
        down_bias=True,
        quant_type="fp4",
        seed=5,
    ),
    # dh and dz, with adapters whose inner gradients pass the range too
    _in_fp16(
        (7, 3, 32, 64),
        MoEConfig(2, activation="gelu"),
        {"x": -4, "gate_up_proj": -5, "gate_up_lora_a": -7, "gate_up_lora_b": -2, "dy": 8, "down_proj": 9},
        **ADAPTERS,
        lora_dtype="float16",
        seed=6,
    ),
    # adapters
    _in_fp16(
        (4, 3, 32, 32),
        MoEConfig(2),
        {"gate_up_lora_a": 14, "gate_up_lora_b": -14, "down_lora_a": 14, "down_lora_b": -14, "dy": -3},
        **ADAPTERS,
        seed=7,
    ),
    # w x, and with it z
    _in_fp16(
        (16, 3, 32, 64),
        MoEConfig(2, scoring="sigmoid", scale_input=True, routed_scaling_factor=2.0**12),
        {"x": 5, "gate_up_proj": -14, "dy": -9},
        seed=8,
    ),
    # o; and what comes back through the norm, of small ones
    _in_fp16(
        (9, 5, 32, 32),
        MUSE,
        {"gate_up_proj": 6, "down_proj": 6, "dy": 10},
        post_expert_norm=True,
        down_bias=True,
        seed=10,
    ),
    _in_fp16(
        (9, 5, 32, 32),
        replace(MUSE, top_k=2, scale_input=True),
        {"gate_up_proj": -3, "down_proj": -10, "dy": 5},
        post_expert_norm=True,
        seed=11,
    ),
    # many rows of an expert, some of which pass the range
    _in_fp16(
        (2048, 9, 32, 33),
        MoEConfig(4, routed_scaling_factor=2.0**-10),
        {"gate_up_proj": 6, "down_proj": 5, "dy": -3},
        logits="skewed",
        seed=9,
    ),
)

EXAMPLES = (
    # gates so far below 0 that some gradients are beyond every dtype: their gains were, too
    _in_fp16(
        (1, 1, 1, 7),
        MoEConfig(1, limit=0.5, routed_scaling_factor=2.0**-20),
        {"x[0]": 8, "gate_up_proj": 7, "topk_weights": -20},
        seed=2002,
    ),
    # nothing at all, and the smallest of everything
    Problem(0, 1, 1, 1, MoEConfig(1)),
    Problem(1, 1, 1, 1, MoEConfig(1), batch=True),
    # fp64 routing weights beside fp16 states: two dtypes met in one index_put
    Problem(1, 1, 1, 1, MoEConfig(1), dtype="float16", routing_dtype="float64"),
    # sigmoid close to 1: s (1 - s) has the error of 1 - s, and its error bar must include it
    Problem(2, 16, 1, 1, MoEConfig(8, scoring="sigmoid"), dtype="float64", routing_dtype="float64"),
    # equal rows round equally: their errors add up, and error bars must include that
    Problem(
        9,
        1,
        50,
        1,
        MoEConfig(1, renormalize=True, renormalize_eps=0.1),
        dtype="float16",
        bias_dtype="float16",
        down_bias=True,
        dy_layout="scalar",
    ),
    # equal rows may also round differently, by their place in a tile, where u + 1 nearly cancels
    Problem(8, 8, 17, 1, MoEConfig(1, up_offset=1.0), entry="experts", cut_points=True, x_layout="expanded"),
    # one token, and an expert in several of its slots: a path for decoding may write one row for all of them
    Problem(1, 4, 32, 32, MoEConfig(3), "bfloat16", "experts", cut_points=True, bias_dtype="bfloat16"),
    # a true gradient of 3e-11 that fp16 rounds to zero: its gain is -1, and its error bar must include that
    Problem(1, 2, 1, 1, MoEConfig(1, renormalize=True, renormalize_eps=1e-6), routing_dtype="float16"),
    # a softmax whose other expert is e**-18: its gradient has the relative error of that exponential
    Problem(
        130,
        2,
        1,
        1,
        MoEConfig(2, renormalize=True, alpha=1.702),
        gate_up_bias=True,
        logits="skewed",
        dy_layout="scalar",
        seed=2,
    ),
    # every kind of broken row at once
    Problem(9, 5, 8, 8, MoEConfig(2, scoring="topk_softmax"), broken_logits=3, broken_x=1, seed=4),
    # -inf logits that must be chosen
    Problem(16, 3, 8, 8, MoEConfig(3, scoring="sigmoid", renormalize=True), logits="masked", seed=5),
    # most experts excused for a broken token: the gain of the rest has another deviation than the gain of all
    Problem(
        64,
        9,
        32,
        17,
        MoEConfig(7, scoring="sigmoid", activation="relu2"),
        gate_up_bias=True,
        gate_up_rank=1,
        down_rank=3,
        logits="shifted",
        broken_logits=1,
        x_layout="expanded",
        seed=9457635,
    ),
    # two experts chosen out of a group that has one: all chosen logits are -inf, and the weights are undefined
    Problem(
        16,
        6,
        1,
        16,
        MoEConfig(1, scoring="topk_softmax", num_groups=3, topk_groups=1, group_score="top2_sum", activation="silu"),
        logits="masked",
    ),
    # squared ReLU beside an adapter: rounding carries a pre-activation across 0, where no error bar reaches
    Problem(2, 33, 50, 64, MoEConfig(1, activation="relu2"), "bfloat16", entry="experts", gate_up_rank=1, seed=3),
    # numbers about the clamp after the activation, and far past it
    Problem(
        130, 9, 17, 33, STEP, "bfloat16", gate_up_bias=True, powers=(("gate", 3), ("up", 2)), logits="skewed", seed=1
    ),
    Problem(33, 3, 32, 16, replace(STEP, top_k=2, limit=0.5, alpha=1.702, up_offset=1.0), gate_up_rank=4, seed=2),
    # the same about softcaps; a small cap and an offset, which nearly cancel
    Problem(130, 9, 17, 33, INKLING2, "bfloat16", gate_up_bias=True, powers=(("gate", 3), ("up", 5)), seed=3),
    Problem(
        64, 2, 16, 1, MoEConfig(1, up_offset=1.0, up_softcap=1.0), powers=(("up", 1),), x_layout="expanded", seed=4
    ),
    Problem(9, 2, 8, 8, MoEConfig(1, alpha=1.702, gate_softcap=0.5), "float16", gate_up_rank=1, seed=5),
    # a broken token with scale_input: the gradient of a bias does not show which expert the token chose
    Problem(1, 16, 1, 1, MoEConfig(1, scale_input=True), down_bias=True, broken_logits=1),
    # sqrt(softplus) far below 0 and far above, a gradient at -inf, and a +inf, whose row is undefined
    Problem(33, 16, 8, 8, DEEPSEEK_V4, logits="shifted", selection_bias="small", broken_logits=3, seed=1),
    Problem(33, 9, 8, 8, DEEPSEEK_V4, "bfloat16", logits="masked", selection_bias="small", seed=2),
    # its digits where 1 + exp(logit) has none
    Problem(33, 7, 1, 8, MoEConfig(7, scoring="sqrtsoftplus"), logits="skewed", seed=3),
    # a bias on the logit, larger than any score
    Problem(33, 16, 8, 8, KOLIBRI, "bfloat16", selection_bias="small", seed=4),
    Problem(16, 9, 8, 8, KOLIBRI, selection_bias="large", logits="masked", seed=5),
    # infinite biases: masked experts, in groups too; and sums of scores that are 0, without an epsilon
    Problem(33, 9, 8, 8, KOLIBRI, selection_bias="infinite", logits="masked", seed=5),
    Problem(33, 8, 8, 8, GROUPED, selection_bias="infinite", seed=60),
    Problem(33, 3, 8, 8, replace(KOLIBRI, top_k=1), selection_bias="infinite", logits="masked", seed=1),
    # the larger of sum and epsilon: the sum, and either
    Problem(33, 16, 8, 8, ERNIE, "bfloat16", selection_bias="small", seed=6),
    Problem(33, 16, 8, 8, replace(ERNIE, top_k=3, renormalize_eps=0.7), selection_bias="small", seed=7),
    # a learned scale of each expert's weights; ignored where the caller gives them
    Problem(33, 16, 8, 8, GEMMA, "bfloat16", expert_scale=True, bias_dtype="bfloat16", seed=8),
    Problem(9, 5, 8, 8, replace(GEMMA, top_k=2), expert_scale=True, broken_logits=3, broken_x=1, seed=9),
    Problem(9, 5, 8, 8, MoEConfig(2), entry="experts", expert_scale=True, frozen=frozenset({"expert_scale"}), seed=10),
    # a norm after each expert; its factor's gradient is a sum over all slots, which one broken token spoils
    Problem(130, 16, 17, 33, MUSE, "bfloat16", bias_dtype="bfloat16", post_expert_norm=True, logits="skewed", seed=11),
    Problem(33, 5, 16, 8, MUSE, **BIASES, **ADAPTERS, post_expert_norm=True, broken_logits=2, broken_x=1, seed=12),
    # empty slots beside it, and one sum of thousands of slots
    Problem(9, 5, 8, 8, MUSE, "float16", "experts", empty_slots=True, post_expert_norm=True, **BIASES, seed=13),
    Problem(1024, 2, 8, 8, replace(MUSE, top_k=2), post_expert_norm=True, dy_layout="scalar", seed=14),
    # outputs of zeros: the epsilon is all that the norm divides by, and the gradient of o a thousand times that of o'
    Problem(33, 3, 7, 1, MoEConfig(2, activation="relu2", post_expert_norm_eps=1e-6), post_expert_norm=True, seed=15),
    # rows of a single number, which would be its sign but for the epsilon; and weights on the input
    Problem(33, 3, 1, 8, MoEConfig(2, post_expert_norm_eps=1.0), "bfloat16", post_expert_norm=True, seed=16),
    Problem(33, 3, 16, 8, replace(MUSE, top_k=2, scale_input=True), post_expert_norm=True, **BIASES, seed=17),
)

ALL = EXAMPLES + LARGE + PACKED + PAST_RANGE
SMALL = tuple(p for p in ALL if (p.tokens + p.experts) * p.hidden * p.intermediate < 100_000)  # of profile "quick"
