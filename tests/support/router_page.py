"""The source of docs/routers.md, which ``python tests/support/router_page.py`` rewrites."""

import inspect
from pathlib import Path

from executors import Unsupported
from executors.hf import config_of
from executors.hf.router_rules import ZEROED
from executors.hf.router_table import CHECKED, REFUSED, RULES
from router_cases import cases, made
from router_walk import BESIDES, Place, places

PAGE = Path(__file__).parents[2] / "docs" / "routers.md"
HEAD = """# Routers of transformers

`executors.hf.config_of` gives the rule by which a router of transformers chooses experts and weighs them. From the
router's own logits, `moe_ref.route` then gives the same experts and weights:

```python
block = model.model.layers[0].mlp  # or the router, where it holds its own selection bias
rule = executors.hf.config_of(block)
logits, topk_weights, topk_ids = block.gate(hidden_states)  # the order differs from router to router
exact = moe_ref.route(logits, rule.config, rule.selection_bias, expert_scale=rule.expert_scale)
```

- `rule.selection_bias` is the module's own tensor, or a view of it. Where the block holds it, `config_of` must be given
  the block.
- `rule.output_scale` is the factor by which the block multiplies the sum of the routed experts after the router. To
  have it in the weights, multiply `routed_scaling_factor` by it.
- `rule.expert_scale` is the learned scale of each expert's weights, the module's own tensor, or None. In a layer it is
  `MoEWeights.expert_scale`.
- `rule.returns` is "logits", or "probabilities" for routers that return those instead. Their logarithms, in float64,
  then serve as logits. They differ from the router's logits by a number for each token, which changes nothing.
- `rule.note` is the condition under which the rule is exact, or "".
- Numbers come from the module's attributes. The rule comes from a table, by the name of the class. A class that is not
  in the table is refused by name.

`python tests/support/router_page.py` makes this page. The tests run each router of transformers {version} in float32,
as its block calls it. They give it random and adversarial logits: large, tiny, tied, nearly tied, with negative keys.
The experts must be the rule's. Where keys are equal within a few bits of float32, the specification takes the lower id,
and a router any. The weights must lie within error bars.

Three things are not compared:

- Below about -87 a sigmoid or softplus underflows in float32. A router that divides by the plain sum of such scores
  returns NaN, and one that adds an epsilon may return 0. The specification gives the weights of the exact scores. So it
  is with a softmax's scores that a bias chooses, where a router divides them by max(sum, epsilon).
- Many routers leave the order of a token's experts open.
- In bf16 models, some routers round logits, scores or weights to bf16. The specification starts from the logits that
  the router returns, and rounds no score.

## Rules

| rule | what it computes |
|---|---|
"""


def page() -> str:
    """The whole page."""
    rules = {rule.__name__: inspect.cleandoc(rule.__doc__ or "").replace("\n", " ") for rule in RULES.values()}
    lines = [f"| `{name}` | {text} |" for name, text in rules.items()]
    rows = ["", "## Routers", "", "| family | router | rule | verdict |", "|---|---|---|---|"]
    rows += [row(place) for place in places()]
    besides = ", ".join(place.family for place in BESIDES)
    rows += ["", f"transformers dispatches the experts of all these families but {besides}.", ""]
    rows += [f"*Equal while keys are positive*: {ZEROED}."]
    return "\n".join([HEAD.format(version=CHECKED) + "\n".join(lines), *rows]) + "\n"


def row(place: Place) -> str:
    """One router's line."""
    rule = RULES.get(place.router)
    name = f"`{rule.__name__}`" if rule else ""
    return f"| {place.family} | `{place.router}` | {name} | {verdict(place)} |"


def verdict(place: Place) -> str:
    """Whether the rule is equal to the router, with what any setting of its options adds."""
    if place.router in REFUSED:
        return f"refused: {REFUSED[place.router]}"
    notes = {config_of(case.block).note for case in cases(place)}
    condition = " while keys are positive" if any(ZEROED in note for note in notes) else ""
    try:
        config_of(made(place)[0])
    except Unsupported as refusal:
        return f"refused by default: {str(refusal).split(': ', 1)[1]}; else equal{condition}"
    return f"equal{condition}"


if __name__ == "__main__":
    PAGE.write_text(page())
