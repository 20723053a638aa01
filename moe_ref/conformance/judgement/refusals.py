"""The form of an error that refuses an argument, in whatever words: one line that names the argument and its value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moe_ref.packed_types import MXFP4Tensor, NF4Tensor
from moe_ref.types import ExpertLoRA, MoEConfig, MoEWeights
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from moe_ref.conformance.judgement.call import Inputs

CALL = ("x", "router_logits", "topk_ids", "topk_weights", "weights")
ABSENT = ("None", "missing", "without", "required")  # words for a value that is not there
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


def lacking_form(error: BaseException | None, expected: str, bad: Inputs) -> str:
    """What the error should be and is not, in a few words; or "".

    Args:
        error: what the executor raised.
        expected: the specification's message, such as "x.shape=(4, 7): must be (..., 8)": it names the argument first
            and may name others, one of which may be blamed as well.
        bad: the arguments of the call.
    """
    import executors

    if not isinstance(error, (ValueError, TypeError)):
        return "a ValueError or a TypeError"
    text = str(error)
    if "\n" in text or not text.strip():
        return "one line"
    about, _, allowed = expected.partition(": must be ")
    known = arguments()
    blamed = [name for name in known if _has_word(expected, name)]
    may_blame = known if isinstance(error, executors.Unsupported) else blamed  # who lacks something may see that first
    named = [name for name in may_blame if _has_word(text, name)]
    if not named:
        return f"an error that names {about.partition('=')[0]}"
    where, _, value = about.partition("=")
    aspect = where.rpartition(".")[2]
    wrong = {value.strip("'")}
    if aspect == "shape":  # one of its sizes is enough
        wrong |= set(re.findall(r"\d+", value)) - set(re.findall(r"\d+", allowed))
    if any(_has_word(text, own) for own in wrong):
        return ""
    if any(_says(text, value, aspect) for name in named for value in _values(name, bad)):
        return ""
    return f"an error that gives the value of {named[0]}"


def arguments() -> list[str]:
    """The names of all arguments, fields of the configuration and parts of projections in 4 bits."""
    classes = (MoEWeights, MoEConfig, ExpertLoRA, NF4Tensor, MXFP4Tensor)
    names = [*CALL, *(field.name for own in classes for field in fields(own))]
    return [name for name in dict.fromkeys(names) if name not in ("shape", "dtype")]  # which any array has


def _values(name: str, bad: Inputs) -> Iterator[Any]:
    """The values that an argument of this name has in a call."""
    weights = bad.weights
    packed = weights.packed().values() if isinstance(weights, MoEWeights) else ()
    for owner in (bad, weights, getattr(weights, "config", None), getattr(weights, "lora", None), *packed):
        if owner is not None and hasattr(owner, name):
            yield getattr(owner, name)


def _says(text: str, value: Any, aspect: str) -> bool:
    """Whether a text has a value: of an array its shape or its dtype, of another object that or its type."""
    if value is None:
        return any(_has_word(text, word) for word in ABSENT)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        sizes = [str(size) for size in value.shape]
        dtype = dtype_name(value)
        shape = r"\D{1,4}".join(sizes)
        if aspect != "dtype" and sizes and re.search(rf"(?<![\w.]){shape}(?![\w.])", text):
            return True
        return aspect != "shape" and any(_has_word(text.lower(), word) for word in (dtype, SHORT.get(dtype, dtype)))
    if isinstance(value, (str, int, float)):
        return _has_word(text, str(value))
    return _has_word(text, type(value).__name__) or repr(value) in text


def _has_word(text: str, word: str) -> bool:
    """Whether a word stands in a text, and not as a part of another word or number."""
    return re.search(rf"(?<![\w-])(?<!\w\.){re.escape(word)}(?!\w|\.\d)", text.replace("torch.", "")) is not None
