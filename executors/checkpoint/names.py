"""How checkpoints call the projections of a layer, and which layers a set of keys holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from executors.nf4.state_dict import of_expert

QUANT_FIELDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # of bitsandbytes, beside quant_state.*
PARTS = ("blocks", "scales")  # of MXFP4
PACKED = re.compile(
    rf"(.+)(?:_({'|'.join(PARTS)})|\.({'|'.join(QUANT_FIELDS)})|\.(quant_state\.bitsandbytes__(?:nf4|fp4)))"
)
SPLIT = re.compile(r"((?:.*?\.)??)(experts\..+)|(.*\.block_sparse_moe\.)((?:input|output)_linear\..+)")
OTHER_TOWERS = re.compile(r"(?:^|\.)(?:vision_\w+|visual|vit|audio_\w+)\.")  # their experts have routers of their own


@dataclass(frozen=True)
class Naming:
    """The names of a layer's projections after its prefix; "{}" stands for the number of an expert.

    Attributes:
        up: up projections, of which each is one part of the rows of gate_up_proj: (gate, up), or one that holds both,
            or one up projection of a layer without gates.
        down: the down projection.
        gated: whether there are gates.
        joined: whether one tensor holds gate and up, so that the family says in which layout.
        up_bias, down_bias: biases, where layers of this naming may have them.
    """

    up: tuple[str, ...]
    down: str
    gated: bool = True
    joined: bool = False
    up_bias: str | None = None
    down_bias: str | None = None

    @property
    def per_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        return "{}" in self.down

    @property
    def names(self) -> set[str]:
        """All names of projections and biases."""
        return {*self.up, self.down, *filter(None, (self.up_bias, self.down_bias))}


NAMINGS = (
    Naming(("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight"), "experts.{}.down_proj.weight"),
    Naming(("experts.{}.w1.weight", "experts.{}.w3.weight"), "experts.{}.w2.weight"),
    Naming(("experts.{}.up_proj.weight",), "experts.{}.down_proj.weight", gated=False),
    Naming(
        ("experts.gate_up_projs.{}.weight",),
        "experts.down_projs.{}.weight",
        joined=True,
        up_bias="experts.gate_up_projs.{}.bias",
        down_bias="experts.down_projs.{}.bias",
    ),
    Naming(
        ("experts.gate_up_proj",),
        "experts.down_proj",
        joined=True,
        up_bias="experts.gate_up_proj_bias",
        down_bias="experts.down_proj_bias",
    ),
    Naming(("experts.up_proj",), "experts.down_proj", gated=False),
    Naming(("experts.fc1.weight",), "experts.fc2.weight", joined=True),
    Naming(("experts.w13_weight",), "experts.w2_weight", joined=True),
    Naming(("input_linear.weight",), "output_linear.weight", joined=True),
)


@dataclass
class Block:
    """The keys of one layer.

    Attributes:
        prefix: what stands before all of them, such as "model.layers.3.mlp.".
        keys: for each name after the prefix (with "{}" for an expert's number, without the ending of a packed part),
            the experts that have it; {None} for names without a number.
        endings: for each such name, the endings of its packed parts: "blocks", "absmax", ...; "" is the name itself.
    """

    prefix: str
    keys: dict[str, set[int | None]] = field(default_factory=dict)
    endings: dict[str, set[str]] = field(default_factory=dict)

    @property
    def index(self) -> int:
        """The last number in the prefix: the layer's."""
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.)", self.prefix)
        return int(numbers[-1]) if numbers else 0

    @property
    def naming(self) -> Naming:
        """The naming whose projections are all there, or else the one that has most of them."""

        def fit(naming: Naming) -> tuple[bool, int]:
            there = [name in self.keys for name in (*naming.up, naming.down)]
            return all(there), sum(there)

        return max(NAMINGS, key=fit)

    def keys_of(self, names: set[str]) -> Iterator[str]:
        """The keys of some names, with those of packed parts."""
        for name in names & self.keys.keys():
            for expert in self.keys[name]:
                key = self.prefix + of_expert(name, expert)
                for ending in self.endings[name]:
                    yield key + ("" if not ending else f"_{ending}" if ending in PARTS else f".{ending}")

    def unknown(self, known: set[str]) -> str | None:
        """A key below the experts that no name explains."""
        for name in sorted(self.keys.keys() - self.naming.names - known):
            expert = min((number for number in self.keys[name] if number is not None), default=None)
            return f"{self.prefix}{name if expert is None else name.replace('{}', str(expert))}"
        return None


def blocks_of(keys: Iterable[str]) -> list[Block]:
    """The layers with experts, in the order of their numbers and prefixes."""
    found: dict[str, Block] = {}
    for key in keys:
        if (split := _split(key)) is None or OTHER_TOWERS.search(key):
            continue
        prefix, rest = split
        name, ending = _unpacked(rest)
        name, expert = _counted(name)
        block = found.setdefault(prefix, Block(prefix))
        block.keys.setdefault(name, set()).add(expert)
        block.endings.setdefault(name, set()).add(ending)
    downs = {naming.down for naming in NAMINGS}
    layers = [block for block in found.values() if downs & block.keys.keys()]
    return sorted(layers, key=lambda block: (block.index, block.prefix))


def _split(key: str) -> tuple[str, str] | None:
    """Prefix and rest of a key that belongs to experts."""
    match = SPLIT.fullmatch(key)
    if match is None:
        return None
    return (match[1], match[2]) if match[2] else (match[3], match[4])


def _unpacked(rest: str) -> tuple[str, str]:
    """The name without the ending of a packed part, and that ending."""
    match = PACKED.fullmatch(rest)
    return (match[1], match[2] or match[3] or match[4]) if match else (rest, "")


def _counted(name: str) -> tuple[str, int | None]:
    """The name with "{}" for the expert's number, and that number."""
    match = re.search(r"(?<=\.)\d+(?=\.|$)", name)
    if match is None:
        return name, None
    return f"{name[: match.start()]}{{}}{name[match.end() :]}", int(match[0])
