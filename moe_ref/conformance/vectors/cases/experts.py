"""The experts themselves: E1 to E6, C1 to C3; clamps at equality, odd sizes, strides, long sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from moe_ref.conformance.judgement import exact
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.pinned import GPT_OSS, INKLING2, STEP
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.vectors.cases.case import Case, layer, of
from moe_ref.conformance.vectors.layers import Layer
from moe_ref.types import GATED, Activation, MoEConfig

BOTH: dict[str, Any] = {"gate_up_bias": True, "down_bias": True}
TWO = MoEConfig(2)


def _activations() -> list[Case]:
    cases = []
    for number, name in enumerate(get_args(Activation)):
        for layout in ("concatenated", "interleaved") if name in GATED else ("concatenated",):
            config = MoEConfig(2, activation=name, gate_up_layout=layout)
            says = f"{name}, {'gate and up ' + layout if name in GATED else 'without a gate'}, with biases."
            cases.append(layer(f"{name}-{layout}", "E1 D1", says, config, **BOTH, seed=number))
    says = "gpt-oss' activation, with pre-activations on both sides of its limit."
    powers = (("gate", 3), ("up", 3))
    gpt_oss = replace(GPT_OSS, top_k=2)
    cases.append(layer("gpt-oss", "E1", says, gpt_oss, **BOTH, powers=powers, seed=20))
    cases.append(layer("gpt-oss-in-bf16", "E1 E2", says, gpt_oss, dtype="bfloat16", **BOTH, powers=powers, seed=21))
    step = replace(STEP, top_k=2)
    says = "The limit clamps what comes after the activation."
    cases.append(layer("clamp-after", "E1", says, step, gate_up_bias=True, powers=powers, seed=22))
    cases.append(layer("clamp-after-small", "E1", says, replace(step, limit=0.5, alpha=1.702, up_offset=1.0), seed=23))
    says = "Softcaps, which bend below their bound already."
    caps = replace(INKLING2, top_k=2)
    cases.append(layer("softcaps", "E1", says, caps, powers=(("gate", 3), ("up", 5)), gate_up_bias=True, seed=24))
    one = MoEConfig(2, alpha=1.702, gate_softcap=0.5)
    cases.append(layer("softcap-of-the-gate-alone", "E1", says, one, dtype="float16", seed=25))
    other = MoEConfig(2, up_softcap=1.0, up_offset=1.0)
    cases.append(layer("softcap-of-the-up-half-alone", "E1", says, other, seed=26))
    return cases


def _exact() -> list[Case]:
    """Cases in which every step is representable."""
    wanted = {
        "clamp_at_equality": ("E1", ("float32", "bfloat16", "float16", "float64")),
        "late_clamp_at_equality": ("E1", ("float32", "bfloat16", "float16")),
        "wide_combine": ("C1 E2", ("bfloat16", "float16", "float32")),
        "long_sums": ("E2", ("bfloat16",)),
        "many_rows": ("E2 D1", ("float16",)),
    }
    cases = []
    for name, (clauses, dtypes) in wanted.items():
        for dtype in dtypes:
            problem, arrays, _ = exact.CASES[name](dtype)
            says = " ".join((exact.CASES[name].__doc__ or "").split())
            cases.append(of(f"{name.replace('_', '-')}-{dtype}", clauses, says, Layer(problem, arrays)))
    return cases


def _sizes() -> list[Case]:
    cases = []
    sizes = {
        "no-tokens": "0 3 8 5",
        "one-token": "1 4 8 5",
        "one-of-everything": "1 1 1 1",
        "one-expert": "5 1 8 5",
        "one-feature": "4 3 1 7",
        "one-inner-feature": "4 3 7 1",
        "odd": "7 5 17 3",
        "one-past-eight": "3 3 9 9",
    }
    for number, (name, size) in enumerate(sizes.items()):
        top_k = min(2, int(size.split()[1]))
        says = f"T, E, H and I are {', '.join(size.split())}."
        cases.append(layer(name, "E3", says, MoEConfig(top_k), size, **BOTH, seed=30 + number))
    for scoring in ("softmax", "topk_softmax"):
        config = MoEConfig(5, scoring=scoring)
        cases.append(layer(f"all-experts-{scoring}", "E3 R2", "K = E.", config, "4 5 6 3", logits="ties", seed=40))
    cases.append(layer("many-experts", "E3 D2", "Most experts have no token.", TWO, "3 33 3 2", seed=41))
    return cases


def _strides() -> list[Case]:
    says = "The same numbers in other strides: {}."
    wanted: dict[str, dict[str, Any]] = {
        "x-sliced": {"x_layout": "sliced", "routing_layout": "sliced"},
        "x-transposed": {"x_layout": "transposed", "dy_layout": "sliced"},
        "x-expanded": {"x_layout": "expanded", "tokens": 4},
        "weights-transposed": {"weights_layout": "transposed", **BOTH},
        "weights-sliced": {"weights_layout": "sliced", "gate_up_rank": 2},
        "dy-expanded": {"dy_layout": "scalar"},
        "leading-dimensions": {"batch": True, "tokens": 6},
        "no-leading-dimension": {"batch": True, "tokens": 1},
    }
    cases = []
    for number, (name, fields) in enumerate(wanted.items()):
        tokens = fields.pop("tokens", 5)
        said = says.format(name.replace("-", " "))
        cases.append(layer(name, "E4", said, TWO, f"{tokens} 4 8 5", **fields, seed=50 + number))
    return cases


def _adapters() -> list[Case]:
    says = "Adapters of ranks r and q with scalings of their own, before the biases."
    both: dict[str, Any] = {"gate_up_rank": 3, "down_rank": 2}
    return [
        layer("adapters", "E6", says, TWO, **BOTH, **both, seed=60),
        layer("adapters-gpt-oss", "E6", says, replace(GPT_OSS, top_k=2), **BOTH, **both, seed=61),
        layer("adapter-of-gate-and-up-alone", "E6", says, TWO, gate_up_rank=1, lora_dtype="bfloat16", seed=62),
        layer("adapter-of-down-alone", "E6", says, MoEConfig(2, activation="relu2"), down_rank=4, seed=63),
        layer("adapters-fp32-beside-bf16", "E6 T1", says, TWO, dtype="bfloat16", **both, seed=64),
    ]


def _combined() -> list[Case]:
    says = "The weight multiplies the expert's input."
    llama = MoEConfig(1, scoring="sigmoid", scale_input=True)
    cases = [
        layer("scale-input", "C3 D3", says, llama, **BOTH, seed=70),
        layer("scale-input-two-experts", "C3 D3", says, replace(llama, top_k=2, activation="gelu"), **BOTH, seed=71),
        layer("scale-input-adapters", "C3 E6", says, llama, gate_up_rank=2, down_rank=2, dtype="bfloat16", seed=72),
        layer("scale-input-empty", "C3 R7", says, replace(llama, top_k=2), entry="experts", empty_slots=True, seed=73),
    ]
    for number, (name, dtype) in enumerate({"batch": "float32", "batch-in-bf16": "bfloat16"}.items()):
        problem = Problem(9, 4, 8, 5, TWO, dtype, **BOTH, seed=80 + number)
        whole, some = build(problem), (7, 2, 3)
        says = "Nine tokens, and three of them: in a batch-invariant executor these have the same bits in both."
        cases.append(of(name, "C2 C1", says, Layer(problem)))
        rows = [*some]
        arrays = replace(
            whole,
            x=whole.x[rows],
            dy=whole.dy[rows],
            topk_ids=whole.topk_ids[rows],
            router_logits=whole.router_logits[rows],  # type: ignore[index]
        )
        part = Layer(replace(problem, tokens=3), arrays, part_of=name, tokens=some)
        cases.append(of(f"{name}-part", "C2 C1", says, part))
    return cases


def cases() -> list[Case]:
    """All of them."""
    return [*_exact(), *_sizes(), *_activations(), *_strides(), *_adapters(), *_combined()]
