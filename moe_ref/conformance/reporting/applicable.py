"""What an executor does not declare, and the clauses that do not apply because of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from executors import Capabilities


class Lack(NamedTuple):
    """Something that is not declared.

    Attributes:
        says: it, in a line.
        clauses: that do not apply at all.
    """

    says: str
    clauses: tuple[str, ...] = ()


def lacks(able: Capabilities) -> list[Lack]:
    """All that an executor does not declare."""
    return [*_routing(able), *_numbers(able), *_four_bits(able), *_experts(able)]


def _routing(able: Capabilities) -> list[Lack]:
    out = []
    if able.interpreted:
        out.append(Lack("its kernels were interpreted, not run on a device"))
    if not able.routing:
        says = "routing is done elsewhere; clauses R1-R5 and R9 are not applicable"
        out.append(Lack(says, ("R1", "R2", "R3", "R4", "R5", "R9")))
    elif not able.selection:
        out.append(Lack("no selection bias and no groups; clause R3 and those parts of R2 are not applicable", ("R3",)))
    if able.routing and not able.expert_scale:
        out.append(Lack("no learned scales; clause R9 is not applicable", ("R9",)))
    return out


def _numbers(able: Capabilities) -> list[Lack]:
    from moe_ref.validation import FLOAT_DTYPES

    out = []
    if not able.backward:
        out.append(Lack("no backward pass; clauses D1-D5 are not applicable", ("D1", "D2", "D3", "D4", "D5")))
    missing = [dtype for dtype in FLOAT_DTYPES if dtype not in able.dtypes]
    if "float16" in missing:
        out.append(Lack(f"not judged in {', '.join(missing)}; clause E7 is not applicable", ("E7",)))
    elif missing:
        out.append(Lack(f"not judged in {', '.join(missing)}"))
    return out


def _four_bits(able: Capabilities) -> list[Lack]:
    out = []
    if "dense" not in able.weights:
        beside = "gradients of projections are judged beside one in 4 bits" if able.mixed else ""
        out.append(Lack(f"no dense weights; {beside or 'gradients of projections are not applicable'}"))
    if len(able.weights) > 1 and not able.mixed:
        out.append(Lack("two kinds of projections in one layer are not declared, and not judged"))
    missing = [name for name in ("nf4", "fp4", "mxfp4") if name not in able.weights]
    flat = ("Q1", "Q2", "Q3", "Q5")
    if len(missing) == 3:
        says = "no weights in 4 bits; clauses Q1-Q3, Q5 and M1 are not applicable"
        out.append(Lack(says, (*flat, "M1")))
    elif missing[:2] == ["nf4", "fp4"]:
        out.append(Lack("no nf4 and no fp4 weights; clauses Q1-Q3 and Q5 are not applicable", flat))
    else:
        parts = {"nf4": "that part of Q1 is", "fp4": "that part of Q1 is", "mxfp4": "clause M1 is"}
        for name in missing:
            whole = ("M1",) if name == "mxfp4" else ()
            out.append(Lack(f"no {name} weights; {parts[name]} not applicable", whole))
    return out


def _experts(able: Capabilities) -> list[Lack]:
    from executors._protocol import ACTIVATIONS

    out = []
    missing = sorted(ACTIVATIONS - able.activations)
    if missing:
        out.append(Lack(f"no {', '.join(missing)}; those parts of E1 are not applicable"))
    if "swiglu" in able.activations:
        if not able.late_clamp:
            out.append(Lack("no clamp after the activation; that part of E1 is not applicable"))
        if not able.softcap:
            out.append(Lack("no softcaps; that part of E1 is not applicable"))
    if not able.post_expert_norm:
        out.append(Lack("no norm after each expert; clause E8 is not applicable", ("E8",)))
    if not able.scale_input:
        out.append(Lack("no scale_input; clause C3 is not applicable", ("C3",)))
    if not able.lora:
        out.append(Lack("no adapters; clause E6 is not applicable", ("E6",)))
    if not able.batch_invariant:
        out.append(Lack("batch invariance is not declared; clause C2 is not judged", ("C2",)))
    return out
