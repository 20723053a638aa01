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
    return [*_routing(able), *_numbers(able), *_dtypes(able), *_sizes(able), *_four_bits(able), *_experts(able)]


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


def _dtypes(able: Capabilities) -> list[Lack]:
    """Of other arguments than x, in one line each."""
    from executors import Capabilities

    whole = Capabilities()
    says = {"bias_dtypes": "biases", "topk_weights_dtypes": "topk_weights", "topk_ids_dtypes": "topk_ids"}
    if able.routing:
        says["router_logits_dtypes"] = "router_logits"
    if able.lora:
        says["lora_dtypes"] = "adapters"
    if not able.biases:
        del says["bias_dtypes"]
    out = []
    for name, argument in says.items():
        declared = getattr(able, name)
        if not getattr(whole, name) <= declared:
            own = ", ".join("x's dtype" if dtype == "x" else dtype for dtype in sorted(declared))
            out.append(Lack(f"{argument} in {own} alone; that part of T1 is not applicable"))
    return out


def _sizes(able: Capabilities) -> list[Lack]:
    """What tensors may be beside their dtypes."""
    out = []
    for name, size in (("H", able.align_hidden), ("I", able.align_intermediate)):
        if size != 1:
            out.append(Lack(f"{name} in multiples of {size} alone; that part of E3 is not applicable"))
    if not able.empty_batch:
        out.append(Lack("at least one token; that part of E3 is not applicable"))
    rest = [name for name in ("x", "routing", "weights") if name not in able.strided]
    if rest:
        out.append(Lack(f"contiguous {', '.join(rest)} alone; that part of E4 is not applicable"))
    parts = {"empty slots": able.empty_slots, "duplicate ids in a row": able.duplicate_ids}
    missing = [name for name, has in parts.items() if not has]
    if missing:
        which, whole = ("clause R7 is", ("R7",)) if len(missing) == len(parts) else ("that part of R7 is", ())
        out.append(Lack(f"no {' and no '.join(missing)}; {which} not applicable", whole))
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
    if able.weights & {"nf4", "fp4"}:
        out += _blocks(able)
    return out


def _blocks(able: Capabilities) -> list[Lack]:
    """The blocks of NF4 and FP4 that are declared."""
    from executors import Capabilities

    out, whole = [], Capabilities()
    if not whole.blocksizes <= able.blocksizes:
        own = ", ".join(map(str, sorted(able.blocksizes)))
        out.append(Lack(f"blocksize {own} alone; that part of Q1 is not applicable"))
    if not able.nested:
        out.append(Lack("no nested statistics; clauses Q3 and Q5 are not applicable", ("Q3", "Q5")))
    elif not whole.nested <= able.nested:
        out.append(Lack(f"nested statistics {min(able.nested)} alone; that part of Q5 is not applicable"))
    return out


def _swiglu(able: Capabilities) -> list[Lack]:
    """The numbers of "swiglu" that are declared."""
    out = []
    for name, plain, none in (("alpha", 1.0, "alpha"), ("limit", None, "limit"), ("up_offset", 0.0, "offset of ups")):
        declared = getattr(able, f"{name}s")
        if declared is not None:
            own = ", ".join(str(value) for value in sorted(declared, key=lambda value: (value is not None, value)))
            says = f"no {none}" if declared == {plain} else f"{name} {own} alone"
            out.append(Lack(f"{says}; that part of E1 is not applicable"))
    return out


def _experts(able: Capabilities) -> list[Lack]:
    from executors._declared import ACTIVATIONS
    from moe_ref.types import GATED

    out = []
    missing = sorted(ACTIVATIONS - able.activations)
    if missing:
        out.append(Lack(f"no {', '.join(missing)}; those parts of E1 are not applicable"))
    if "swiglu" in able.activations:
        if not able.late_clamp:
            out.append(Lack("no clamp after the activation; that part of E1 is not applicable"))
        if not able.softcap:
            out.append(Lack("no softcaps; that part of E1 is not applicable"))
        out += _swiglu(able)
    if able.activations & {*GATED} and len(able.gate_up_layouts) == 1:
        says = f"gate and up {min(able.gate_up_layouts)} alone; that part of E1 is not applicable"
        out.append(Lack(says))
    if not able.biases:
        out.append(Lack("no biases of projections; those parts of E1 and D3 are not applicable"))
    if not able.post_expert_norm:
        out.append(Lack("no norm after each expert; clause E8 is not applicable", ("E8",)))
    if not able.scale_input:
        out.append(Lack("no scale_input; clause C3 is not applicable", ("C3",)))
    if not able.lora:
        out.append(Lack("no adapters; clause E6 is not applicable", ("E6",)))
    if not able.batch_invariant:
        out.append(Lack("batch invariance is not declared; clause C2 is not applicable", ("C2",)))
    return out
