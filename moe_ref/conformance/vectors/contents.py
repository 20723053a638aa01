"""What routing alone and tensors in 4 bits hold: what goes in, and every answer. `layers` has the other kinds."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np

from moe_ref import mxfp4, nf4
from moe_ref.conformance.judgement.choices import admissible
from moe_ref.conformance.vectors.layout import Stored, stored, stored_text
from moe_ref.conformance.vectors.options import config_arrays, packed_arrays
from moe_ref.packed import decode
from moe_ref.routing import choose, keys_are_rounded, undefined_rows, weigh
from moe_ref.types import MoEConfig, NF4Tensor, PackedTensor

Contents = dict[str, Stored]


@dataclass(frozen=True, eq=False)
class Route:
    """Routing alone, with every choice that is right (kind "route")."""

    logits: np.ndarray
    config: MoEConfig
    dtype: str = "float32"
    selection_bias: np.ndarray | None = None
    expert_scale: np.ndarray | None = None
    kind: str = field(default="route", init=False)

    def inputs(self) -> Contents:
        """What goes in."""
        found = config_arrays(self.config) | {"in.router_logits": stored(self.logits, self.dtype)}
        for name in ("selection_bias", "expert_scale"):
            if getattr(self, name) is not None:
                found[f"in.{name}"] = stored(getattr(self, name), "float32")
        return found

    def exact(self) -> Contents:
        """The specification's ids, and all right choices of each row; an undefined row has none, and any will do."""
        choices, offsets = self._choices()
        return {
            "out.topk_ids": stored(choose(self.logits, self.config, self.selection_bias), "int64"),
            "out.choices": stored(choices, "int64"),
            "out.choice_offsets": stored(offsets, "int64"),
        }

    def _choices(self) -> tuple[np.ndarray, np.ndarray]:
        ids = choose(self.logits, self.config, self.selection_bias)
        assert self.config.top_k is not None
        every = np.array([*permutations(range(self.logits.shape[1]), self.config.top_k)])
        rounded = keys_are_rounded(self.config, self.selection_bias)
        found, offsets = [], [0]
        for t, broken in enumerate(undefined_rows(self.logits, ids, self.config)):
            if not broken and rounded:
                row = np.repeat(self.logits[t : t + 1], len(every), axis=0)
                found += [*every[admissible(every, row, self.config, self.selection_bias)]]
            elif not broken:
                found.append(ids[t])
            offsets.append(len(found))
        return np.array(found, dtype=np.int64).reshape(-1, self.config.top_k), np.array(offsets)

    def floats(self) -> Contents:
        """The weights, also of every right choice."""
        ids = choose(self.logits, self.config, self.selection_bias)
        choices, offsets = self._choices()
        rows = np.repeat(self.logits, np.diff(offsets), axis=0)
        return {
            "out.topk_weights": stored(weigh(self.logits, ids, self.config, expert_scale=self.expert_scale), "float64"),
            "out.choice_weights": stored(weigh(rows, choices, self.config, expert_scale=self.expert_scale), "float64"),
        }

    def answers(self) -> Contents:
        """All answers."""
        return self.exact() | self.floats()


@dataclass(frozen=True, eq=False)
class Decode:
    """A tensor in 4 bits and its numbers (kind "decode")."""

    tensor: PackedTensor
    kind: str = field(default="decode", init=False)

    def inputs(self) -> Contents:
        """What goes in."""
        return packed_arrays("in.tensor", self.tensor)

    def exact(self) -> Contents:
        """Each number, in fp32, which holds those of every dtype; and the scales, where blocks are flat."""
        found = {"out.tensor": stored(decode(self.tensor), "float32")}
        if isinstance(self.tensor, NF4Tensor):
            found["out.absmax"] = stored(nf4.absmax_of(self.tensor), "float32")
        return found

    def floats(self) -> Contents:
        """None."""
        return {}

    def answers(self) -> Contents:
        """All answers."""
        return self.exact()


@dataclass(frozen=True, eq=False)
class Quantize:
    """Numbers, and the bytes that quantising gives (kind "quantize")."""

    values: np.ndarray
    quant_type: str
    values_dtype: str = "float32"
    dtype: str = "float32"
    blocksize: int = 64
    nested: bool = False
    kind: str = field(default="quantize", init=False)

    def inputs(self) -> Contents:
        """What goes in: numbers, and the form that is wanted."""
        found = {
            "in.values": stored(self.values, self.values_dtype),
            "in.quant_type": stored_text(self.quant_type),
            "in.dtype": stored_text(self.dtype),
        }
        if self.quant_type != "mxfp4":
            found["in.blocksize"] = stored(self.blocksize, "int64")
            found["in.nested"] = stored(int(self.nested), "int64")
        return found

    def exact(self) -> Contents:
        """The bytes and scales, and what they decode to."""
        values: Any = self.values.astype(np.float32)
        if self.quant_type == "mxfp4":
            tensor: PackedTensor = mxfp4.quantize(values, dtype=self.dtype)
        else:
            form: Any = {"quant_type": self.quant_type, "blocksize": self.blocksize, "nested": self.nested}
            tensor = nf4.quantize(values, dtype=self.dtype, **form)
        return packed_arrays("out.tensor", tensor) | {"out.values": stored(decode(tensor), "float32")}

    def floats(self) -> Contents:
        """None."""
        return {}

    def answers(self) -> Contents:
        """All answers."""
        return self.exact()
