"""The tables of fields in docs/spec.md, from the dataclasses: ``python tests/support/spec_tables.py`` rewrites them.

What the dataclasses do not tell stands here: bounds, with values on either side that a test tries, and clauses.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from moe_ref import types
from moe_ref.types import ExpertLoRA, MoEConfig, MoEWeights, MXFP4Tensor, NF4Tensor
from moe_ref.validation.nf4 import BLOCKSIZES, DECODED_DTYPES

PAGE = Path(__file__).parents[2] / "docs" / "spec.md"
INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Bound:
    """What a field may be.

    Attributes:
        text: as the page says it; where it is empty, the names that the field's type allows.
        allowed, refused: values on either side of the bound.
        beside: other fields that the allowed values need.
        refused_beside: pairs of other fields, and a value that they do not go with.
    """

    text: str = ""
    allowed: tuple[Any, ...] = ()
    refused: tuple[Any, ...] = ()
    beside: dict[str, Any] = field(default_factory=dict)
    refused_beside: tuple[tuple[dict[str, Any], Any], ...] = ()


GEGLU = {"activation": "geglu"}
POSITIVE = ((None, 1e-30, 1e30), (0.0, -1.0, INF, NAN))
CONFIG: dict[str, tuple[str, Bound]] = {
    "top_k": ("R2, R7", Bound("1 to E; None where ids are given", (None, 1, 4), (0, 5, 1.5))),
    "scoring": ("R2", Bound(refused=("relu",))),
    "renormalize": ("R5", Bound(refused=(1,))),
    "renormalize_eps": ("R5", Bound("at least 0, finite", (0.0, 1e-30), (-1e-30, INF, NAN))),
    "renormalize_form": ("R5", Bound(refused=("mean",))),
    "routed_scaling_factor": ("R2", Bound("finite", (-1.0, 0.0), (INF, NAN))),
    "num_groups": ("R2", Bound("a divisor of E; 1 is no groups", (1, 2, 4), (0, 3))),
    "topk_groups": ("R2", Bound("1 to `num_groups`, with K ≤ `topk_groups` · E / `num_groups`", (1,), (0, 2))),
    "group_score": (
        "R2",
        Bound(
            '"max", "top2_sum" where E / `num_groups` is at least 2',
            ("max", "top2_sum"),
            ("sum",),
            {},
            (({"num_groups": 4}, "top2_sum"),),
        ),
    ),
    "selection_key": ("R3", Bound(refused=("weight",))),
    "scale_input": ("C3", Bound(refused=(0,))),
    "activation": ("E1", Bound(refused=("relu",))),
    "alpha": ("E1", Bound('finite; 1 unless "swiglu"', (-1.0, 1.702), (INF, NAN), {}, ((GEGLU, 2.0),))),
    "limit": ("E1", Bound('None, or positive and finite; None unless "swiglu"', *POSITIVE, {}, ((GEGLU, 1.0),))),
    "up_offset": ("E1", Bound('finite; 0 unless "swiglu"', (-1.0, 1.0), (INF, NAN), {}, ((GEGLU, 1.0),))),
    "clamp": (
        "E1",
        Bound(
            '"before", "after" where there is a `limit`',
            ("before", "after"),
            ("both",),
            {"limit": 1.0},
            (({"limit": None}, "after"),),
        ),
    ),
    **dict.fromkeys(
        ("gate_softcap", "up_softcap"),
        (
            "E1",
            Bound(
                'None, or positive and finite; None with a `limit`, and unless "swiglu"',
                *POSITIVE,
                {},
                ((GEGLU, 1.0), ({"limit": 1.0}, 1.0)),
            ),
        ),
    ),
    "gate_up_layout": (
        "E1",
        Bound(
            '"concatenated", "interleaved" where gated',
            ("concatenated", "interleaved"),
            ("mixed",),
            {},
            (({"activation": "silu"}, "interleaved"),),
        ),
    ),
    "post_expert_norm_eps": ("E8", Bound("at least 2⁻¹²⁶, finite", (2.0**-126, 1.0), (0.0, 2.0**-127, INF, NAN))),
}
WEIGHTS = {
    "gate_up_proj": "E1",
    "down_proj": "E1",
    "gate_up_proj_bias": "E1",
    "down_proj_bias": "E1",
    "selection_bias": "R3",
    "lora": "E6",
    "config": "",
    "expert_scale": "R9",
    "post_expert_norm": "E8",
}
NF4 = {
    "packed": ("uint8 [ceil(n / 2)]", "Q1"),
    "absmax": ("fp32 [B]; with nested statistics uint8 [B]", "Q1, Q3"),
    "nested_absmax": ("fp32 [ceil(B / `nested_blocksize`)], and so for each segment of Q5", "Q3, Q5"),
    "nested_code": ("fp32 [256]", "Q3"),
    "nested_offset": ("fp32, of shape () or, in segments, (E,)", "Q3, Q5"),
    "shape": ("as it is read, n numbers; B = ceil(n / `blocksize`)", "Q1"),
    "dtype": (", ".join(f'"{name}"' for name in DECODED_DTYPES), "Q2"),
    "quant_type": (", ".join(f'"{name}"' for name in get_args(types.QuantType)), "Q1"),
    "blocksize": (", ".join(map(str, BLOCKSIZES)), "Q1"),
    "nested_blocksize": ("at least 1", "Q3"),
    "transposed": ("True, False", "Q1"),
}
MXFP4 = {
    "blocks": ("uint8 [..., k / 32, 16]", "M1"),
    "scales": ("uint8 [..., k / 32]", "M1"),
    "dtype": NF4["dtype"],
    "transposed": ("True, False", "M1"),
}


def tables() -> dict[str, str]:
    """Each table by the name in its mark."""
    lora = {f.name: "E6" for f in fields(ExpertLoRA)}
    return {
        "MoEConfig": table("allowed", MoEConfig, {n: (bound_text(n), c) for n, (c, _) in CONFIG.items()}),
        "MoEWeights": table("shape", MoEWeights, {n: (shape(MoEWeights, n), c) for n, c in WEIGHTS.items()}),
        "ExpertLoRA": table("shape", ExpertLoRA, {n: (shape(ExpertLoRA, n), c) for n, c in lora.items()}),
        "NF4Tensor": table("dtype and shape, or allowed", NF4Tensor, NF4),
        "MXFP4Tensor": table("dtype and shape, or allowed", MXFP4Tensor, MXFP4),
    }


def table(meaning: str, kind: type, rows: dict[str, tuple[str, str]]) -> str:
    """Every field of a dataclass: what it may be, its default, its clauses."""
    names = [f.name for f in fields(kind)]
    if names != list(rows):
        raise AssertionError(f"{kind.__name__} has the fields {names}: spec_tables.py must describe them in this order")
    lines = [f"| `{kind.__name__}` | {meaning} | default | clause |", "|---|---|---|---|"]
    for f in fields(kind):
        allowed, clause = rows[f.name]
        lines.append(f"| `{f.name}` | {allowed} | {default(f.default)} | {clause} |")
    return "\n".join(lines)


def default(value: Any) -> str:
    """A default as the page shows it; nothing for what must be given."""
    if value is MISSING:
        return ""
    return f'"{value}"' if isinstance(value, str) else f"{value}"


def bound_text(name: str) -> str:
    """What a field of the configuration may be."""
    _, bound = CONFIG[name]
    hint = get_type_hints(MoEConfig)[name]
    names = ", ".join(f'"{value}"' for value in get_args(hint))
    return bound.text or ("True, False" if hint is bool else names)


def shape(kind: type, name: str) -> str:
    """The shape in a field's annotation, such as [E, J, H]."""
    annotation = str(kind.__annotations__[name])
    found = re.search(r"[\"'](.*)[\"']", annotation)
    return f"[{', '.join(found[1].split())}]" if found else annotation.replace(" | None", "").replace("float", "finite")


def with_tables(text: str) -> str:
    """The page with its tables made anew."""
    for name, made in tables().items():
        mark, end = f"<!-- {name}: python tests/support/spec_tables.py -->\n", "<!-- end -->"
        if text.count(mark) != 1:
            raise AssertionError(f"spec.md must have the mark {mark.strip()} once")
        before, _, rest = text.partition(mark)
        text = before + mark + made + "\n" + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
