"""From config.json to a layer's family and its `MoEConfig`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executors.checkpoint.errors import BadCheckpoint, short
from executors.checkpoint.family import MISSING, Family, Key
from executors.checkpoint.table import FAMILIES, REFUSED
from moe_ref.types import Activation, MoEConfig
from moe_ref.validation import check_config

NAME = "config.json"
TEXT_SECTIONS = ("text_config", "language_config", "llm_config")
TANH = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")
GATED: dict[str, Activation] = {
    **dict.fromkeys(("silu", "swish"), "swiglu"),
    **dict.fromkeys(("gelu", "gelu_python"), "geglu"),
    **dict.fromkeys(TANH, "geglu_tanh"),
}
PLAIN: dict[str, Activation] = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(TANH, "gelu_tanh"),
    "relu2": "relu2",
}
ABSENT = {"num_groups": 1, "topk_groups": 1, "routed_scaling_factor": 1.0}  # what null stands for


@dataclass(frozen=True)
class Section:
    """The part of config.json that a family reads.

    Attributes:
        file: config.json.
        path: the names of the objects around it, such as ("thinker_config", "text_config").
        values: its entries.
        name: of the family.
    """

    file: Path
    path: tuple[str, ...]
    values: dict[str, Any]
    name: str

    @property
    def family(self) -> Family:
        """What the family fixes.

        Raises:
            BadCheckpoint: it is one of those that are refused.
        """
        if self.name in REFUSED:
            raise BadCheckpoint(f"{self.file}: model_type={self.name!r} is not read: {REFUSED[self.name]}")
        return FAMILIES[self.name]


def check_family(name: str) -> None:
    """Refuses a family that is in neither table.

    Raises:
        BadCheckpoint: one line with the families that are understood.
    """
    if name not in FAMILIES and name not in REFUSED:
        raise BadCheckpoint(f"family={name!r}: must be one of {', '.join(sorted(FAMILIES))}")


def section_of(file: Path, config: dict[str, Any], prefix: str, family: str | None) -> Section:
    """The part of config.json that belongs to a layer.

    Args:
        file: config.json.
        config: what it holds.
        prefix: of the layer's keys; where several parts have experts, its first name says which ("thinker.").
        family: the family that the caller named, or None.

    Raises:
        BadCheckpoint: no part is of a known family, or several are and the prefix does not tell.
    """
    if family is not None:
        return _innermost(file, config, family)
    known = [section for section in _sections(file, config) if section.name in FAMILIES or section.name in REFUSED]
    if len(known) > 1:
        begins = [s for s in known if s.path and prefix.startswith(f"{s.path[0].removesuffix('_config')}.")]
        known = begins or known
    if len(known) == 1:
        return known[0]
    found = config.get("model_type", "missing") if not known else ", ".join(section.name for section in known)
    allowed = f"must be one family, or family= must be given, one of {', '.join(sorted(FAMILIES))}"
    raise BadCheckpoint(f"{file}: model_type={short(found)} does not tell how {prefix}experts is to be read: {allowed}")


def config_of(section: Section, index: int, *, joined: bool) -> tuple[MoEConfig, bool]:
    """A layer's configuration, and whether it has a selection bias.

    Args:
        section: of config.json.
        index: the layer's number, for entries that are lists, one for each layer.
        joined: whether gate and up rows are stored in one tensor, whose layout the family fixes.

    Raises:
        BadCheckpoint: an entry is missing, or has a value that the family's table does not understand.
    """
    family = section.family
    fields = dict(family.fields)
    for entry, cases in family.cases.items():
        value = _value(section, entry, index)
        matching = [changes for known, changes in cases.items() if known == value]
        if not matching:
            allowed = f"must be {' or '.join(repr(known) for known in cases)}: {section.name} has no other here"
            raise BadCheckpoint(f"{section.file}: {entry.names[0]}={short(value)}: {allowed}")
        fields |= matching[0]
    values = {name: _value(section, v, index) if isinstance(v, Key) else v for name, v in fields.items()}
    biased = bool(values.pop("selection_bias", True)) and bool(family.selection_bias)
    values |= {name: absent for name, absent in ABSENT.items() if name in values and values[name] is None}
    values["activation"] = _activation(section, values["activation"])
    values["gate_up_layout"] = "interleaved" if family.interleaved and joined else "concatenated"
    config = MoEConfig(**values)
    if config.top_k is None:
        names = fields["top_k"].names if isinstance(fields["top_k"], Key) else ("top_k",)
        raise BadCheckpoint(f"{section.file}: {names[0]}=null: must be a number of experts")
    try:
        check_config(config)
    except (ValueError, TypeError) as error:
        raise BadCheckpoint(f"{section.file}: {error}") from error
    return config, biased


def _value(section: Section, entry: Key, index: int) -> Any:
    for name in entry.names:
        if name in section.values:
            value = section.values[name]
            return value[index] if isinstance(value, list) and index < len(value) else value
    if entry.default is MISSING:
        where = ".".join(section.path) or "it"
        allowed = f"must be there, for a model of family {section.name}"
        raise BadCheckpoint(f"{section.file}: {' or '.join(entry.names)} is missing in {where}: {allowed}")
    return entry.default


def _activation(section: Section, name: Any) -> Activation:
    known = GATED if section.family.gated else PLAIN
    if not isinstance(name, str) or name not in known:
        raise BadCheckpoint(f"{section.file}: activation {short(name)}: must be one of {', '.join(known)}")
    return known[name]


def _sections(file: Path, values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[Section]:
    """config.json itself, and the objects in it that are configurations too."""
    yield Section(file, path, values, str(values.get("model_type")))
    for name, value in values.items():
        if isinstance(value, dict) and re.fullmatch(r"\w+_config", name):
            yield from _sections(file, value, (*path, name))


def _innermost(file: Path, config: dict[str, Any], family: str) -> Section:
    """The part whose model_type is the family; else the text model's part, where there is one."""
    for section in _sections(file, config):
        if section.name == family:
            return section
    path: tuple[str, ...] = ()
    while found := [name for name in TEXT_SECTIONS if isinstance(config.get(name), dict)]:
        path, config = (*path, found[0]), config[found[0]]
    return Section(file, path, config, family)
