"""The names that a checkpoint has for a model's parameters: one for each expert, where it keeps them apart.

transformers knows how to write its stacks back into the form of a family's checkpoints. It is asked with stacks of tiny
experts whose numbers say which is which, so that no pattern of its names is read here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from executors._protocol import Unsupported

WEIGHT = ".weight"


def name_of(model: Any, module: str) -> str:
    """A module with a weight, by the checkpoint's name.

    Args:
        model: of transformers.
        module: its name in the model.
    """
    (found,) = revert_weight_conversion(model, {module + WEIGHT: torch.zeros(1, 1)})
    return found.removesuffix(WEIGHT)


def names_of_experts(model: Any, path: str, module: nn.Module, name: str, experts: int) -> list[tuple[str, ...]]:
    """The names of each expert's matrices in one projection: (gate, up), (up,) or (down,).

    They are the checkpoint's. Where its experts are stacked, they are gate_proj, up_proj and down_proj of a numbered
    expert.

    Args:
        model: of transformers.
        path: the name of the experts module in the model, without wrappers.
        module: the experts module.
        name: "gate_up_proj", "up_proj" or "down_proj".
        experts: E.

    Raises:
        Unsupported: transformers' conversion gives something else than one matrix for each.
    """
    parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
    marks = torch.arange(experts * len(parts)).reshape(experts, len(parts), 1)
    key = f"{path}.{name}"
    found = revert_weight_conversion(model, {key: marks.transpose(1, 2) if module.is_transposed else marks})
    (first, *others) = found.values()
    if not others and first.ndim == 3:
        return [tuple(name_of(model, f"{path}.{expert}.{part}") for part in parts) for expert in range(experts)]
    names = {int(value): each.removesuffix(WEIGHT) for each, value in found.items() if value.numel() == 1}
    if len(found) != marks.numel() or sorted(names) != list(range(marks.numel())):
        raise Unsupported(
            f"{key}: transformers writes {len(found)} tensors: must be {marks.numel()}, one for each matrix"
        )
    return [tuple(names[int(mark)] for mark in own) for own in marks]
