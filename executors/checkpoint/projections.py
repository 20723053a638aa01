"""One projection from a checkpoint: dense, in MXFP4, or in bitsandbytes' 4 bits; stacked, or one tensor per expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from executors import mxfp4, nf4
from executors.checkpoint.errors import BadCheckpoint
from executors.checkpoint.names import Block
from executors.checkpoint.shards import Reader
from executors.nf4.convert import join
from executors.nf4.state_dict import of_expert
from moe_ref.types import NF4Tensor, PackedTensor

DENSE = ("F64", "F32", "BF16", "F16")
Tell = Callable[[], object]


@dataclass(frozen=True)
class Source:
    """Where projections are read from.

    Attributes:
        reader: of the checkpoint's files.
        block: the layer's keys.
        packed_dtype: gives the name of the dtype that MXFP4 decodes to.
        tell: called after each tensor that was read.
    """

    reader: Reader
    block: Block
    packed_dtype: Callable[[], str]
    tell: Tell

    def key(self, name: str, expert: int | None = None) -> str:
        """The key of a name after the layer's prefix; "../" leaves the block."""
        prefix = self.block.prefix
        if name.startswith("../"):
            prefix, name = prefix.rstrip(".").rpartition(".")[0] + ".", name.removeprefix("../")
        return prefix + of_expert(name, expert)

    def tensor(self, key: str) -> Tensor:
        """One dense tensor.

        Raises:
            BadCheckpoint: it is missing, or in a dtype that no executor takes.
        """
        self.check_dense(key)
        found = self.reader.tensor(key)
        self.tell()
        return found

    def check_dense(self, key: str) -> None:
        """Refuses a dtype that no executor takes, by the header alone."""
        dtype = self.reader.dtype(key)
        if dtype not in DENSE:
            allowed = f"must be {', '.join(DENSE)}, or in 4 bits as MXFP4 or bitsandbytes store them"
            raise BadCheckpoint(f"{self.reader.file_of(key)}: {key} is {dtype}: {allowed}")


def storage(block: Block, name: str) -> str:
    """How a projection is stored: "dense", "mxfp4", "nf4" or "fp4"."""
    endings = block.endings.get(name, set())
    if endings & {"blocks", "scales"}:
        return "mxfp4"
    for quant_type in ("nf4", "fp4"):
        if f"quant_state.bitsandbytes__{quant_type}" in endings:
            return quant_type
    return "dense" if endings == {""} or not endings else "nf4"  # whose reader says what is missing


def stack(source: Source, name: str, *, columns: bool) -> Tensor | PackedTensor:
    """[E, rows, k] A projection that is one tensor on disk; a view, where it is stored by columns.

    Args:
        source: where it is read from.
        name: after the layer's prefix.
        columns: whether it is stored (E, k, rows). MXFP4 never is.

    Raises:
        BadCheckpoint: it cannot be read exactly.
    """
    key, kind = source.key(name), storage(source.block, name)
    if kind == "dense":
        found = source.tensor(key)
        if found.ndim != 3:
            raise BadCheckpoint(
                f"{source.reader.file_of(key)}: {key} has shape {tuple(found.shape)}: must have 3 dimensions"
            )
        return found.transpose(1, 2) if columns else found
    try:
        if kind == "mxfp4":
            parts = [source.reader.tensor(f"{key}_{part}") for part in ("blocks", "scales")]
            source.tell()
            return mxfp4.from_blocks(parts[0], parts[1], dtype=source.packed_dtype())
        return _four_bit(source, name, None, columns=columns)
    except (ValueError, TypeError) as error:
        raise _told(source, key, error) from error


def stack_shape(source: Source, name: str) -> tuple[int, ...]:
    """The shape of a stack as it is stored, without reading its numbers; MXFP4 as what it decodes to."""
    key, kind = source.key(name), storage(source.block, name)
    if kind == "dense":
        return source.reader.shape(key)
    if kind == "mxfp4":
        *rows, groups = source.reader.shape(f"{key}_scales")
        return (*rows, 32 * groups)
    try:
        return _four_bit(source, name, None, columns=False).shape
    except (ValueError, TypeError) as error:
        raise _told(source, key, error) from error


def experts(source: Source, names: Sequence[str], count: int) -> Tensor | PackedTensor:
    """[E, rows, k] A projection of which each expert has tensors of its own, one under the other.

    Args:
        source: where it is read from.
        names: of the parts after the layer's prefix, gate before up; "{}" is the expert's number.
        count: E.

    Raises:
        BadCheckpoint: it cannot be read exactly; among others, the experts are not alike.
    """
    kinds = {storage(source.block, name) for name in names}
    if kinds == {"dense"}:
        return _dense_experts(source, names, count)
    key = source.key(names[0], 0)
    if len(kinds) > 1 or "mxfp4" in kinds:
        found = ", ".join(sorted(kinds))
        raise BadCheckpoint(f"{source.reader.file_of(key)}: {key} and its like are {found}: must be stored alike")
    try:
        parts = [(name, expert) for expert in range(count) for name in names]
        tensors = [_four_bit(source, name, expert, columns=False) for name, expert in parts]
        joined = join(tensors, lambda index: source.key(*parts[index]))
        if len(names) == 1:
            return joined
        joined = nf4.unnest(joined)  # exact; nested statistics go with experts, not with parts of them
        return replace(joined, shape=(count, len(names) * joined.shape[1], *joined.shape[2:]))
    except (ValueError, TypeError) as error:
        raise _told(source, key, error) from error


def vectors(source: Source, name: str, count: int) -> Tensor:
    """[E, n] A bias of which each expert has a tensor of its own."""
    return torch.stack([source.tensor(source.key(name, expert)) for expert in range(count)])


def _dense_experts(source: Source, names: Sequence[str], count: int) -> Tensor:
    """[E, rows, k] Filled expert by expert, so that nothing is held twice."""
    first = source.key(names[0], 0)
    shape, dtype = source.reader.shape(first), source.reader.dtype(first)
    if len(shape) != 2:
        raise BadCheckpoint(f"{source.reader.file_of(first)}: {first} has shape {shape}: must have 2 dimensions")
    out: Tensor | None = None
    for expert in range(count):
        for part, name in enumerate(names):
            key = source.key(name, expert)
            found = source.tensor(key)
            if found.shape != shape or source.reader.dtype(key) != dtype:
                own = f"{source.reader.dtype(key)} {tuple(found.shape)}"
                allowed = f"must be {dtype} {shape}, as {first} is"
                raise BadCheckpoint(f"{source.reader.file_of(key)}: {key} is {own}: {allowed}")
            if out is None:
                out = found.new_empty(count, len(names) * shape[0], shape[1])
            out[expert, part * shape[0] : (part + 1) * shape[0]] = found
    assert out is not None
    return out


def _four_bit(source: Source, name: str, expert: int | None, *, columns: bool) -> NF4Tensor:
    """A tensor in bitsandbytes' form, with its bytes as they are."""
    key = source.key(name, expert)
    endings = source.block.endings[name]
    keys = [f"{key}.{ending}" if ending else key for ending in endings]
    state = {each: source.reader.tensor(each) for each in keys if each in source.reader.shards.where}
    found = nf4.from_state_dict(state, key, transposed=columns)
    source.tell()
    return found


def _told(source: Source, key: str, error: Exception) -> BadCheckpoint:
    """The error of a reader of 4 bits, with the file in front."""
    if isinstance(error, BadCheckpoint):
        return error
    where = source.reader.shards.where.get(key) or source.reader.shards.folder
    return BadCheckpoint(f"{where}: {error}")
