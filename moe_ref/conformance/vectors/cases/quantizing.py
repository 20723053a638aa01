"""Numbers and the bytes that quantising gives (Q4, M1): ties, zeros, partial blocks, nested statistics."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.vectors.cases.case import Case, of
from moe_ref.conformance.vectors.contents import Quantize
from moe_ref.nf4 import FP4_CODE, NF4_CODE


def cases() -> list[Case]:
    """All of them."""
    rng = np.random.default_rng(6)
    found = []

    def add(name: str, clauses: str, says: str, values: np.ndarray, kind: str, **form: Any) -> None:
        found.append(of(f"quantize-{name}", clauses, says, Quantize(values, kind, **form)))

    for kind, code in (("nf4", NF4_CODE), ("fp4", FP4_CODE)):
        table = np.array(sorted(set(code)), dtype=np.float32)
        middle = (table[1:] + table[:-1]) / np.float32(2)
        beside = [np.nextafter(middle, np.float32(to)) for to in (-2, 2)]
        ties = np.concatenate([[1.0], middle, *beside]).astype(np.float64)
        add(f"{kind}-ties", "Q4", "Every midpoint and its neighbours: a tie takes the lower number.", ties, kind)
        normal = rng.standard_normal(130).astype(np.float32).astype(np.float64)
        add(f"{kind}-normal", "Q4", "Two blocks and a partial one.", normal, kind, dtype="bfloat16")
        add(
            f"{kind}-zeros", "Q4", "A block of zeros, of both signs.", np.copysign(0.0, normal[:33]), kind, blocksize=32
        )
        nested = (normal * 4)[:128]
        add(f"{kind}-nested", "Q4", "Scales are quantised too.", nested, kind, blocksize=32, nested=True)
    tiny = np.array([1e-39, -5e-40, 1e-38, 0.0], dtype=np.float32).astype(np.float64)
    add("nf4-tiny", "Q4", "A block whose largest magnitude is below 1e-38, and one of 1e-38.", tiny, "nf4")
    bf16 = np.round(rng.standard_normal(64) * 64) / 64
    add("nf4-of-bf16", "Q4", "Numbers in bf16.", bf16, "nf4", values_dtype="bfloat16", dtype="bfloat16")
    values = np.array([-7.9, 2.5, 1.25, 0.75, 0.25, 0.26, -0.2, -0.0, *[0.0] * 24], dtype=np.float32).astype(np.float64)
    add(
        "mxfp4-ties",
        "M1",
        "Ties take the code with an even mantissa; beyond 6 is 6; what is not below 0 has no sign.",
        values,
        "mxfp4",
    )
    sizes = np.concatenate([np.ldexp(rng.standard_normal((4, 32)), [[-149], [-120], [0], [126]]), np.zeros((1, 32))])
    add(
        "mxfp4-sizes", "M1", "Subnormal blocks, huge ones, zeros.", sizes.astype(np.float32).astype(np.float64), "mxfp4"
    )
    return found
