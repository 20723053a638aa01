"""The algorithms of docs/spec.md, as functions: its blocks of Python without ``>>>``, and the table of activations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from moe_ref.nf4 import CODES
from moe_ref.numerics import round_to_nearest
from moe_ref.types import MoEConfig

PAGE = Path(__file__).parents[2] / "docs" / "spec.md"
NAMES = {name: getattr(np, name) for name in ("exp", "sqrt", "tanh", "maximum", "pi")}
ROW = re.compile(r"^\| (\".*\")( with `gate_softcap` c)? \| `(.*)` \| `(.*)` \|$", flags=re.MULTILINE)
LETTERS = re.compile(r"`(s|t|phi|q) = ([^`]*)`")


def read() -> SimpleNamespace:
    """What the page defines, by name. Its code sees NumPy, `math`, and what the page says in words."""
    text = PAGE.read_text()
    found: dict[str, Any] = {"np": np, "math": math, "CODES": CODES, "rounded": rounded, **activations(text)}
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if ">>>" not in block:
            exec(block, found)
    return SimpleNamespace(**found)


def rounded(value: Any, dtype: str) -> np.float32:
    """To nearest even."""
    return np.float32(round_to_nearest(np.float64(value), dtype))


def activations(text: str) -> dict[str, Callable[[np.ndarray, MoEConfig], np.ndarray]]:
    """act and its derivative, by the table under E1 and the sentence after it."""
    rows = {(name, bool(capped)): cells for names, capped, *cells in ROW.findall(text) for name in names.split(", ")}
    letters = dict(LETTERS.findall(text))

    def evaluated(column: int) -> Callable[[np.ndarray, MoEConfig], np.ndarray]:
        def function(v: np.ndarray, c: MoEConfig) -> np.ndarray:
            names = NAMES | {"erf": np.vectorize(math.erf, otypes=[float]), "sigmoid": lambda x: 1 / (1 + np.exp(-x))}
            names |= {"v": v, "alpha": c.alpha, "c": c.gate_softcap}
            for letter, formula in letters.items():
                if letter != "t" or c.gate_softcap is not None:
                    names[letter] = eval(formula, dict(names))
            return eval(rows[f'"{c.activation}"', c.gate_softcap is not None][column], names)

        return function

    return {"act": evaluated(0), "act_derivative": evaluated(1)}
