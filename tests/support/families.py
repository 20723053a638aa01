"""The experts classes of the installed transformers, and a tiny random model for each."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import __file__ as transformers_file

from family_sizes import CLASSES, EXCEPTIONS, SIZES

DISPATCHED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\n(?:@.*\n)*class (\w+)", flags=re.MULTILINE)
REFUSALS = (
    *(AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)
GATE_UP_SCALE, DOWN_SCALE, BIAS_SCALE = 1.0, 0.1, 0.5  # gates reach past the clamps at 7 and 10


@dataclass(frozen=True)
class Family:
    """An experts class that transformers dispatches.

    Attributes:
        name: the folder of transformers/models.
        experts: the class.
    """

    name: str
    experts: str

    def __str__(self) -> str:
        return f"{self.name}-{self.experts}"


class NoTinyModel(Exception):
    """A family that nothing here builds: `family_sizes` wants a line for it."""


@cache
def families() -> tuple[Family, ...]:
    """All of the installed transformers, in the order of its folders. Nothing is imported: the sources are read."""
    found = []
    for file in sorted((Path(transformers_file).parent / "models").glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        names = DISPATCHED.findall(source)
        if len(names) != source.count("\n@use_experts_implementation"):
            raise NoTinyModel(f"{file.parent.name}: a use of @use_experts_implementation that is not understood")
        found += [Family(file.parent.name, name) for name in names]
    return tuple(found)


def modeling(family: Family) -> Any:
    """The family's module."""
    return importlib.import_module(f"transformers.models.{family.name}.modeling_{family.name}")


def model_class(family: Family) -> type[PreTrainedModel]:
    """The smallest model that has the experts: of the text alone, with a head where there is one."""
    module = modeling(family)
    if family.experts in CLASSES:
        return getattr(module, CLASSES[family.experts])
    stem = family.experts.removesuffix("Experts")
    shorter = stem.removesuffix("Moe").removesuffix("Text")
    for name in (f"{stem}ForCausalLM", f"{shorter}ForCausalLM", f"{stem}Model", f"{shorter}TextModel"):
        found = getattr(module, name, None)
        if found is not None and not found.config_class.sub_configs:
            return found
    raise NoTinyModel(f"{family}: no model class of text alone: name one in family_sizes.CLASSES")


def tiny_config(family: Family) -> PreTrainedConfig:
    """The family's configuration, small."""
    kind = model_class(family).config_class
    known = kind.__dataclass_fields__.keys() | kind.attribute_map.keys()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    return kind(**sizes | EXCEPTIONS.get(family.name, {}))


def build(family: Family, seed: int = 0) -> PreTrainedModel:
    """A random model in fp32 on the CPU, on transformers' own loop, in evaluation mode.

    Raises:
        NoTinyModel: the family is new, and the common sizes do not do.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            config = tiny_config(family)
            config._attn_implementation = "eager"
            config._experts_implementation = "eager"
            model = model_class(family)(config).eval()
        except REFUSALS as error:
            raise NoTinyModel(f"{family}: {type(error).__name__}: {error}: see family_sizes.EXCEPTIONS") from error
        found = experts_of(model, family)
        if not found:
            raise NoTinyModel(f"{family}: {type(model).__name__} has no {family.experts}: see family_sizes")
        for parameter in model.parameters():
            if not parameter.any():  # zero at first: it would hide what it multiplies
                nn.init.normal_(parameter, std=BIAS_SCALE / 5)
        for module in found.values():
            for name, parameter in module.named_parameters():
                scale = BIAS_SCALE if "bias" in name else DOWN_SCALE if "down" in name else GATE_UP_SCALE
                nn.init.normal_(parameter, std=scale)
    return model


def experts_of(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The family's experts modules in a model, by name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ == family.experts}


def named(name: str) -> Family:
    """The only class of a family."""
    (found,) = (family for family in families() if family.name == name)
    return found
