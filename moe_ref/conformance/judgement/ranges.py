"""Clause E7: layers in fp16 in which intermediate values pass fp16's range, but every result is within it.

The cases are whole numbers through squared ReLU, times powers of two. Each step is representable except for its size,
so an implementation that rounds at every site and overflows at none gives the specification's numbers to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, result_arrays
from moe_ref.conformance.judgement.exact import forms_of, held
from moe_ref.conformance.problems.build import Arrays
from moe_ref.conformance.problems.declared import undeclared
from moe_ref.conformance.problems.poison import modes
from moe_ref.conformance.problems.problem import Problem
from moe_ref.error_bars import named
from moe_ref.layer import layer_vjp
from moe_ref.numerics import EXACT, Rounding, round_to_nearest
from moe_ref.types import Clamp, ExpertLoRA, MoEConfig, MoEWeights

if TYPE_CHECKING:
    from executors import Executor

DTYPE = "float16"
TOKENS, SIZE, RANK = 6, 32, 4  # H = I = SIZE
NORM_EPS = 2.0**-20
OPPOSITE = -0.75  # what the second expert's down projection is of the first one's, where the two cancel


@dataclass(frozen=True)
class Range:
    """A case: exponents of the powers of two that multiply small whole numbers in the inputs.

    Attributes:
        sites: sites of clause E2 whose values pass fp16's range; none where only dh without the weight does (D3).
        x, gate_up, down, weights, dy: exponents of the inputs.
        gate: exponent of the gates' rows alone, added to those of gate_up.
        first: exponent of the first token alone, added to x's.
        cancel: every token goes to two experts that are equal, but for the down projection, which is `OPPOSITE`.
        norm: E8, of outputs that are 0, so that only the epsilon counts: columns of the down projection cancel out.
        scale_input: C3.
        lora_a: exponents of A, for adapters of both projections; B makes an adapter count as much as its projection.
        alpha: of swiglu, whose sigmoid is 0, 1/2 or 1: steep, or of gates of 0 or 64 and more; None: squared ReLU.
        limit: of swiglu.
        clamp: where the limit clamps the gate, before its activation or after it.
    """

    sites: tuple[str, ...]
    x: int = 0
    gate_up: int = 0
    down: int = 0
    weights: int = 0
    dy: int = 0
    gate: int = 0
    first: int = 0
    cancel: bool = False
    norm: bool = False
    scale_input: bool = False
    lora_a: tuple[int, int] | None = None
    alpha: float | None = None
    limit: float | None = None
    clamp: Clamp = "before"


RANGES = {
    "preactivations": Range(("z", "h", "o"), x=2, gate_up=13, weights=-21),
    "clamped preactivations": Range(("z",), x=9, gate_up=8, dy=-4, alpha=1000.0, limit=4.0),
    "clamped activations": Range(("z",), x=9, gate_up=8, dy=-4, alpha=1000.0, limit=4.0, clamp="after"),
    "gates": Range(("z", "act", "h"), x=2, gate_up=13, weights=-20, alpha=1000.0, limit=2.0**30),
    "activations": Range(("h",), gate_up=7, down=-3, weights=-2, dy=-3),
    "outputs": Range(("o",), gate_up=6, weights=-4),
    "activations of one token": Range(("h",), x=-6, gate_up=6, down=-6, dy=-6, first=8),
    "outputs of one token": Range(("h", "o"), x=-6, gate_up=6, weights=-4, first=8),
    "weighted outputs": Range(("weighted_o",), gate_up=3, down=2, weights=4, dy=-1, cancel=True),
    "weighted upstream gradients": Range(("weighted_dy",), x=-3, gate_up=-2, weights=12, dy=4),
    "gradients of activations": Range(("dh",), x=-3, gate_up=-1, down=1, dy=13),
    "gradients of activations without weights": Range((), down=8, weights=-10, dy=8),
    "gradients of outputs": Range(("d_o",), x=-5, down=-6, weights=1, dy=6, norm=True),
    "gradients of preactivations": Range(("dz",), x=-3, gate_up=-3, down=4, weights=12, dy=2),
    "gradients of slots": Range(("dx_slot",), gate_up=4, down=3, dy=1, cancel=True),
    "scaled inputs": Range(("weighted_x",), x=4, gate_up=-14, down=-10, weights=12, scale_input=True),
    "gradients of scaled inputs": Range(("dx_slot",), gate_up=7, weights=-4, dy=1, scale_input=True),
    "scaled gradients of slots": Range(
        ("dx_slot_weighted",), x=-1, gate_up=1, down=2, weights=4, dy=1, cancel=True, scale_input=True
    ),
    "between factors": Range(
        ("gate_up_lora_inner", "gate_up_lora_inner_scaled", "down_lora_inner", "down_lora_inner_scaled"),
        x=9,
        gate_up=-8,
        dy=-10,
        lora_a=(7, 12),
    ),
    "gradients of adapters": Range(
        ("dh_lora", "dh_lora_scaled", "dx_slot_lora", "dx_slot_lora_scaled"),
        x=-10,
        gate_up=6,
        dy=3,
        lora_a=(-7, -14),
    ),
}
# Those above for an executor without squared ReLU: SwiGLU without clamps, whose gates are 0 or at least 64.
PLAIN = {
    "preactivations": Range(("z", "act", "h", "o"), x=3, gate_up=11, weights=-18, dy=-3, alpha=1.0),
    "activations": Range(("h",), x=1, gate_up=6, down=-1, weights=-1, dy=-6, alpha=1.0),
    "outputs": Range(("o",), x=1, gate_up=5, down=3, weights=-5, alpha=1.0),
    "weighted outputs": Range(("weighted_o",), x=3, gate_up=3, down=3, weights=-1, dy=-1, cancel=True, alpha=1.0),
    "weighted upstream gradients": Range(
        ("weighted_dy",), x=-1, gate_up=-10, gate=17, down=-10, weights=3, dy=12, alpha=1.0
    ),
    "gradients of activations": Range(("dh",), x=-9, gate_up=-8, gate=23, down=6, weights=3, dy=4, alpha=1.0),
    "gradients of preactivations": Range(("dz",), x=-4, gate_up=-1, gate=13, down=1, weights=2, dy=1, alpha=1.0),
    "gradients of slots": Range(("dx_slot",), x=-3, gate_up=9, down=-1, weights=2, dy=-2, cancel=True, alpha=1.0),
}


def check_range(executor: Executor, case: str, kind: str, device: str = "cpu") -> str:
    """Checks one of `RANGES`, or its form in `PLAIN`: y and all gradients equal the specification's, rounded once.

    Args:
        executor: the executor to check.
        case: name of the case.
        kind: kind of the projections: "dense", "nf4", "fp4" or "mxfp4".
        device: the device to run on.

    Returns:
        The reason why the case does not apply to the executor, or "".

    Raises:
        ConformanceError: if a number differs.
    """
    able = executor.capabilities
    scale = RANGES[case] if "relu2" in able.activations else PLAIN.get(case, RANGES[case])
    forms = forms_of(*case_of(scale), kind, able)
    lacking = undeclared(forms[0][0], able)
    if lacking:
        return f"{executor.name} does not declare {lacking}"
    found = [(form, replace(a, weights=w)) for form, a in forms if (w := held(a.weights, form)) is not None]
    if not found:
        return f"{kind} does not hold these weights exactly"
    problem, arrays = found[0]
    exact = exact_results(arrays)
    inputs = to_torch(problem, arrays, device)
    results: list[tuple[str, np.ndarray]] = []
    for mode in modes(executor):
        with mode():
            results += result_arrays(run(executor, inputs, executor.capabilities.backward)).items()
            with torch.no_grad():  # inference may take another path
                results += result_arrays(run(executor, inputs, backward=False)).items()
    for name, actual in results:
        expected = round_to_nearest(exact[name], problem.dtype_of(name))
        wrong = actual != expected
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            message = f"{name}{where}={actual[where]}, but must be exactly {expected[where]} ({case})"
            raise ConformanceError(executor, problem, "E7", message, name, arrays)
    return ""


def exact_results(arrays: Arrays, rounding: Rounding = EXACT) -> dict[str, np.ndarray]:
    """The results "y" and every gradient, in float64."""
    y, gradients = layer_vjp(arrays.x, None, arrays.topk_ids, arrays.topk_weights, arrays.weights, arrays.dy, rounding)
    return named(y, gradients)


def case_of(scale: Range) -> tuple[Problem, Arrays]:
    """The problem of a case, in dense weights, and its numbers."""
    rng = np.random.default_rng(0)
    experts = 2 if scale.cancel else 3
    if scale.alpha is None:
        config = MoEConfig(2, activation="relu2", scale_input=scale.scale_input, post_expert_norm_eps=NORM_EPS)
    else:
        config = MoEConfig(2, alpha=scale.alpha, limit=scale.limit, clamp=scale.clamp, scale_input=scale.scale_input)
    both = 2 * SIZE if config.gated else SIZE
    rank = 0 if scale.lora_a is None else RANK

    def sparse(rows: int, columns: int, exponent: int, each: int = 4) -> np.ndarray:
        """[E, rows, columns], with ``each`` nonzero elements in each row and column, all +-2**exponent."""
        wide, tall = max(rows, columns), min(rows, columns)
        places = np.sum([np.roll(np.eye(wide), 5 * shift, axis=1) for shift in range(each)], axis=0)[:, :tall]
        places = places if rows == wide else places.T
        return 2.0**exponent * places * rng.choice([-1.0, 1.0], (experts, rows, columns))

    gate_up, down = sparse(both, SIZE, scale.gate_up), sparse(SIZE, SIZE, scale.down)
    if scale.alpha == 1.0:  # no gate is negative, so that no sigmoid is small
        gate_up[:, :SIZE] = 2.0**scale.gate * np.abs(gate_up[:, :SIZE])
    lora = None
    if scale.lora_a is not None:
        a, b = scale.lora_a
        factors = (
            sparse(RANK, SIZE, a, 1),
            sparse(both, RANK, scale.gate_up - a, 1),
            sparse(RANK, SIZE, b, 1),
            sparse(SIZE, RANK, scale.down - b, 1),
        )
        lora = ExpertLoRA(*factors, 2.0, 0.5)
    if scale.cancel:
        gate_up[1], down[1] = gate_up[0], OPPOSITE * down[0]
    if scale.norm:
        gate_up[:, 1::2], down[:, :, 1::2] = gate_up[:, ::2], -down[:, :, ::2]
    ids = np.tile([0, 1], (TOKENS, 1)) if scale.cancel else np.argsort(rng.random((TOKENS, experts)), axis=1)[:, :2]
    x = 2.0**scale.x * rng.choice([0.0, 1.0], (TOKENS, SIZE))
    x[0] *= 2.0**scale.first
    dy = 2.0**scale.dy * rng.choice([-1.0, 0.0, 1.0], (TOKENS, SIZE))
    topk_weights = 2.0**scale.weights * np.tile([1.0, 1.0 if scale.cancel else 2.0], (TOKENS, 1))
    problem = Problem(
        TOKENS,
        experts,
        SIZE,
        SIZE,
        config,
        DTYPE,
        entry="experts",
        gate_up_rank=rank,
        down_rank=rank,
        lora_dtype=DTYPE,
        post_expert_norm=scale.norm,
    )
    norm = np.ones(SIZE) if scale.norm else None
    weights = MoEWeights(gate_up, down, lora=lora, config=config, post_expert_norm=norm)
    return problem, Arrays(x, dy, ids, None, topk_weights, weights)
