"""What the fields of `Capabilities` may hold, and their refusals in one line. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

# The literals of moe_ref.types.Activation, which a test compares: importing them here would import NumPy.
ACTIVATIONS = frozenset({"swiglu", "geglu", "geglu_tanh", "silu", "gelu", "gelu_tanh", "relu2"})
# Likewise of Scoring, RenormalizeForm, SelectionKey and GateUpLayout.
SCORINGS = frozenset({"softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"})
RENORMALIZE_FORMS = frozenset({"add", "max"})
SELECTION_KEYS = frozenset({"score", "logit"})
GATE_UP_LAYOUTS = frozenset({"concatenated", "interleaved"})
DTYPES = frozenset({"float64", "float32", "bfloat16", "float16"})
OWN_DTYPE = "x"  # in a set of dtypes of other arguments: that of x
ID_DTYPES = frozenset({"int32", "int64"})
STRIDED = frozenset({"x", "routing", "weights"})
WEIGHTS = frozenset({"dense", "nf4", "fp4", "mxfp4"})
BLOCKSIZES = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})  # of moe_ref.validation.nf4
NESTED = frozenset({"one", "per expert"})

OTHER_DTYPES = DTYPES | {OWN_DTYPE}
SETS: dict[str, frozenset[Any]] = {  # by field, all that it may have
    "dtypes": DTYPES,
    "bias_dtypes": OTHER_DTYPES,
    "router_logits_dtypes": OTHER_DTYPES,
    "topk_weights_dtypes": OTHER_DTYPES,
    "topk_ids_dtypes": ID_DTYPES,
    "lora_dtypes": OTHER_DTYPES,
    "strided": STRIDED,
    "activations": ACTIVATIONS,
    "gate_up_layouts": GATE_UP_LAYOUTS,
    "scorings": SCORINGS,
    "renormalize_forms": RENORMALIZE_FORMS,
    "selection_keys": SELECTION_KEYS,
    "weights": WEIGHTS,
    "blocksizes": BLOCKSIZES,
    "nested": NESTED,
}
NUMBERS = ("alphas", "limits", "up_offsets")
SIZES = ("align_hidden", "align_intermediate")
DEVICE = re.compile(r"[a-z][a-z0-9_]*")

Values = Mapping[str, Any]
# Sets that must not be empty, and where: nothing could be drawn for the suite.
NEEDED: dict[str, Callable[[Values], bool]] = {
    **dict.fromkeys(("dtypes", "activations", "weights", "topk_ids_dtypes", "topk_weights_dtypes"), lambda _: True),
    **dict.fromkeys(
        ("scorings", "renormalize_forms", "selection_keys", "router_logits_dtypes"), lambda own: own["routing"]
    ),
    "bias_dtypes": lambda own: own["biases"],
    "lora_dtypes": lambda own: own["lora"],
    "gate_up_layouts": lambda own: bool(own["activations"] & {"swiglu", "geglu", "geglu_tanh"}),
    "blocksizes": lambda own: bool(own["weights"] & {"nf4", "fp4"}),
}


def refuse_wrong(values: Values) -> None:
    """Refuses a field whose value no executor can mean, such as a name that is misspelt.

    Args:
        values: of all fields of `Capabilities`, by name.

    Raises:
        ValueError: a value that is not allowed, in one line with what is.
        TypeError: likewise a value of another type.
    """
    for name, value in values.items():
        if name in SETS or name == "devices":
            _refuse_names(name, value)
        elif name in NUMBERS:
            _refuse_numbers(name, value)
        elif name in SIZES:
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
        elif type(value) is not bool:
            raise TypeError(f"{name}={value!r}: must be True or False")
    for name, needed in NEEDED.items():
        if not values[name] and needed(values):
            raise ValueError(f"{name}={{}}: must have at least one of {_listed(SETS[name])}")
    packed = values["weights"] - {"dense"}
    if packed and values["dtypes"] <= {"float64"}:
        allowed = _listed(DTYPES - {"float64"})
        raise ValueError(f"weights has {min(packed)!r}: must stand beside dtypes that 4 bits decode to, of {allowed}")


def _refuse_names(name: str, value: Any) -> None:
    _refuse_no_set(name, value)
    for own in sorted(value, key=repr):
        if name == "devices":
            if not isinstance(own, str) or not DEVICE.fullmatch(own):
                raise ValueError(f"devices has {own!r}: must be types of devices, such as 'cpu' and 'cuda'")
        elif own not in SETS[name]:
            raise ValueError(f"{name} has {own!r}: must be of {_listed(SETS[name])}")


def _refuse_numbers(name: str, value: Any) -> None:
    if value is None:
        return
    _refuse_no_set(name, value, ", or None for any")
    limits = name == "limits"
    allowed = "finite numbers above 0, or None for none" if limits else "finite numbers"
    if not value:
        raise ValueError(f"{name}={{}}: must have {allowed}")
    for own in value:
        if own is None and limits:
            continue
        if type(own) not in (int, float) or not math.isfinite(own) or (limits and own <= 0):
            raise ValueError(f"{name} has {own!r}: must be {allowed}")


def _refuse_no_set(name: str, value: Any, otherwise: str = "") -> None:
    if not isinstance(value, (set, frozenset)):
        raise TypeError(f"{name}={value!r:.60}: must be a set, as frozenset({{...}}){otherwise}")


def _listed(allowed: frozenset[Any]) -> str:
    return ", ".join(map(repr, sorted(allowed)))
