"""Draws docs/images/allclose.png: a wrong kernel that passes a published tolerance, and what error bars say of it.

python docs/images/allclose.py

Sizes, scales and tolerance are those of vLLM's test of its fused kernel (tests/kernels/moe/test_moe.py: x and weights
are normal numbers divided by 10, atol=2e-2, rtol=0). The wrong kernel is a mutant of the suite.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

import executors
from executors._compare.judge import exact_answer, judge_executor
from executors.layer_file import Layer
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.judgement.gates import MAX_Z
from moe_ref.conformance.mutants import mutants

mpl.use("Agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).with_suffix(".png")
TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 222, 8, 2, 128, 128
ATOL = 2e-2
MUTANT = "wrong_expert_for_one_slot"
NAMES = {"native": "right: native in bf16", MUTANT: "wrong: a token's slot goes to the next expert"}
COLORS = {"native": "#0072b2", MUTANT: "#d55e00"}
EDGES = np.linspace(-60, 60, 121)


def main() -> None:
    """Writes the picture, and prints what it shows."""
    layer = published()
    truth = exact_answer(layer, 0)
    exact = np.asarray(truth.bars["y"].exact)
    native = executors.get("native")
    contenders = {"native": native, MUTANT: mutants(native)[MUTANT]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), dpi=130, layout="constrained")
    for name in reversed(contenders):
        with torch.no_grad():
            y = contenders[name](layer.x, layer.router_logits, layer.weights).double().numpy()
        judgement = judge_executor(contenders[name], truth)
        z = judgement.z["y"]
        passes = bool(np.allclose(y, exact, atol=ATOL, rtol=0))
        verdict = "rejects it" if judgement.failure else "accepts it"
        error, worst = np.abs(y - exact).max(), np.abs(z).max()
        print(f"{name}: max error {error:.4f}, allclose {passes}, max z {worst:.0f}, the suite {verdict}")
        left.plot(exact.ravel(), y.ravel(), ".", ms=2, color=COLORS[name], label=NAMES[name])
        right.hist(np.clip(z, EDGES[0], EDGES[-1]), EDGES, color=COLORS[name], histtype="step", lw=1.6)
    limit = 1.1 * max(float(np.abs(exact).max()), ATOL)
    line = np.array([-limit, limit])
    band = {"color": "#999999", "alpha": 0.25, "lw": 0}
    left.fill_between(line, line - ATOL, line + ATOL, label=f"allclose, atol={ATOL:g}: both pass", **band)
    left.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel="y, exact", ylabel="y of the kernel")
    left.set(xticks=[-ATOL, -ATOL / 2, 0, ATOL / 2, ATOL], yticks=[-ATOL, -ATOL / 2, 0, ATOL / 2, ATOL])
    left.set_title("a published tolerance", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    left.legend(
        [handles[i] for i in (1, 0, 2)], [labels[i] for i in (1, 0, 2)], fontsize=8, loc="upper left", markerscale=4
    )
    right.axvspan(-MAX_Z, MAX_Z, **band)
    right.set_yscale("log")
    right.set(xlabel="error of each element, in error bars", ylabel="elements")
    right.set_xticks([-60, -30, -6, 6, 30, 60], ["≤ -60", "-30", "-6", "6", "30", "≥ 60"])
    right.set_title("the same outputs in error bars: limit 6", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT)


def published() -> Layer:
    """The layer of the published test."""
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float32).bfloat16()

    x = normal(TOKENS, HIDDEN) / 10
    gate_up, down = normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / 10, normal(EXPERTS, HIDDEN, INTERMEDIATE) / 10
    weights = MoEWeights(gate_up, down, config=MoEConfig(TOP_K))
    return Layer(OUT, "", "drawn", x, normal(TOKENS, EXPERTS), weights)


if __name__ == "__main__":
    main()
