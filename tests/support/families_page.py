"""Writes docs/families.md: what `executors.hf` makes of each family of the installed transformers.

python tests/support/families_page.py
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
import transformers

import executors.hf
import families
from executors.hf.interface import SwitchedLayer
from families import Family
from family_errors import Judgement, judge_experts, judge_model
from family_sizes import OWN_LOOPS

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
FORMS = {
    "dbrx": "weights of all experts in one matrix; weights normalised by a p-norm",
    "doge": "experts of rank one, retrieved by product keys",
    "jetmoe": "splits of sorted rows; a bias on the layer's output; experts in attention too",
    "llama4": "a batched product over all experts; the weight multiplies the input",
    "longcat_flash": "some experts are the identity",
    "nllb_moe": "a dictionary of dense MLPs, with a capacity",
    "step3p7": "clamps after the activation",
    "switch_transformers": "a dictionary of dense MLPs, with a capacity",
    "vitpose_backbone": "a Linear for each data set, chosen without a router",
}
TEXT = """\
# Families of transformers

`executors.hf` runs the experts of every family that transformers dispatches. `python tests/support/families_page.py`
makes the page from a tiny random model of each family on a CPU: transformers {transformers}, torch {torch}.

A number is an error against the same model in float64 on transformers' own loop: the 2-norm of the difference,
relative. "Logits" are those of the whole model in fp32 (its last hidden states, where it has no head). "Gradients" is
the largest error of a parameter's gradient there. "Experts in bf16" is the output of one experts module. The number in
brackets is that of transformers' own loop; for fp32 it is the largest of three runs, two of which were moved by an ulp.
The pair says whether the executor (`native`) adds anything to the error that the model has anyway: it does not. Where
gradients are far off in both, a sum cancels outside of the experts. The choice of experts and their weights is the
router's, which stays transformers' own.

{served}

{refused}## Loops of their own

Transformers does not dispatch these classes: `experts_implementation` changes nothing in them, silently.
`executors.hf.use` refuses them by name.

{loops}
"""

REFUSED = """\
## Refused

`executors.hf.use` raises `Unsupported`, and changes nothing.

{table}

"""


def page() -> str:
    """The page's text."""
    served, refused = [], []
    for family in families.families():
        try:
            model, experts = judge_model(family), judge_experts(family, torch.bfloat16)
        except executors.Unsupported as error:
            reason = str(error).removeprefix(f"{family.experts}: ").removesuffix(": see docs/families.md")
            refused.append((family.name, f"`{family.experts}`", reason))
        else:
            served.append(_row(family, model, experts))
    loops = [(name, f"`{experts}`", FORMS[name]) for name, (experts, _, _) in OWN_LOOPS.items()]
    return TEXT.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        served=_table(("family", "class", "computes", "logits", "gradients", "experts in bf16"), served),
        refused=REFUSED.format(table=_table(("family", "class", "why"), refused)) if refused else "",
        loops=_table(("family", "class", "what it does otherwise"), loops),
    )


def _row(family: Family, model: Judgement, experts: Judgement) -> tuple[str, ...]:
    def largest(errors: dict[str, float]) -> float:
        return max(error for name, error in errors.items() if name != "output")

    return (
        family.name,
        f"`{family.experts}`",
        in_short(model.layer),
        f"{model.ours['output']:.0e} ({model.own['output']:.0e})",
        f"{largest(model.ours):.0e} ({largest(model.own):.0e})",
        f"{experts.ours['output']:.0e} ({experts.own['output']:.0e})",
    )


def in_short(layer: SwitchedLayer) -> str:
    """What an expert computes, in a few words."""
    config = layer.config
    said = [config.activation]
    said += [f"alpha {config.alpha:g}"] if config.alpha != 1 else []
    said += [f"limit {config.limit:g}"] if config.limit is not None else []
    said += ["clamped after the activation"] if config.clamp == "after" else []
    said += [f"gate softcap {config.gate_softcap:g}"] if config.gate_softcap is not None else []
    said += [f"up softcap {config.up_softcap:g}"] if config.up_softcap is not None else []
    said += [f"offset {config.up_offset:g}"] if config.up_offset else []
    said += [config.gate_up_layout] if config.gate_up_layout != "concatenated" else []
    said += [f"output normalised, eps {config.post_expert_norm_eps:g}"] if layer.post_expert_norm else []
    return ", ".join(said)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def listed(text: str) -> dict[str, list[tuple[str, str]]]:
    """Families and classes of a page, by the title above them."""
    sections = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    titles, bodies = sections[1::2], sections[2::2]
    return {
        title: re.findall(r"^\| (\w+) \| `(\w+)` \|", body, flags=re.MULTILINE)
        for title, body in zip(titles, bodies, strict=True)
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    PAGE.write_text(page(), encoding="utf-8")
