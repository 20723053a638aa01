"""A layer file from a checkpoint: one layer, hidden states for it, and its router's logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from executors._decode import decode_expert
from executors._files.tensors import opened
from executors.checkpoint.errors import BadCheckpoint
from executors.checkpoint.reader import Checkpoint, CheckpointLayer, Progress
from executors.layer_file import OPTIONAL, save_layer
from moe_ref.types import PROJECTIONS, MoEWeights, PackedTensor

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Extracted:
    """A layer with input for it, ready for a layer file.

    Attributes:
        x: [T, H] hidden states, in the projections' dtype.
        router_logits: [T, E] the router's own product of them.
        weights: dense.
        source: one sentence on where it comes from.
    """

    x: Tensor
    router_logits: Tensor
    weights: MoEWeights
    source: str

    def save(self, path: Path) -> None:
        """Writes a layer file, whole or not at all; projections keep the order in which they are stored.

        Raises:
            OSError: the file cannot be written.
        """
        transposed = tuple(name for name in PROJECTIONS if not getattr(self.weights, name).is_contiguous())
        save_layer(path, self.x, self.router_logits, self.weights, self.source, transposed)


def extract(
    checkpoint: Checkpoint,
    which: int | str | CheckpointLayer,
    *,
    tokens: int = 64,
    seed: int = 0,
    hidden: Path | None = None,
    dtype: str | None = None,
    decode: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """One layer of a checkpoint, with hidden states that are drawn or given.

    Args:
        checkpoint: of `executors.checkpoint.open`.
        which: one of its layers, its number or its prefix.
        tokens: T, where they are drawn: normal numbers, each token divided by its root mean square.
        seed: of the draw.
        hidden: a safetensors file with a tensor "x" [T, H] to take instead, rounded to the layer's dtype.
        dtype: one of `DTYPES`, to which projections and hidden states are rounded; None: the projections' own.
        decode: whether projections in 4 bits are decoded: a layer file holds none.
        progress: a callable (done, total), both in tensors.

    Raises:
        BadCheckpoint: the layer cannot be read, or a layer file cannot hold it.
    """
    layer = checkpoint.layer(which)
    name = checkpoint.section(layer).name
    router = checkpoint.router(layer)
    weights = checkpoint.weights(layer, progress)
    if packed := weights.packed():
        form = next(iter(packed.values())).quant_type
        if not decode:
            allowed = "must be dense in a layer file: decode it (--decode)"
            raise BadCheckpoint(f"{checkpoint.path}: layer {layer.index} is in 4 bits ({form}): {allowed}")
        weights = weights.with_parameters({name: _decoded(tensor) for name, tensor in packed.items()})
    if dtype is not None:
        cast = getattr(torch, dtype)
        weights = replace(weights, **{name: getattr(weights, name).to(cast) for name in PROJECTIONS})
    _check_finite(checkpoint, layer, weights)
    if (behind := router.weight.shape[1]) != weights.hidden_size:
        allowed = f"must be those of its router, H={behind}: a projection stands between them"
        raise BadCheckpoint(f"{checkpoint.path}: {layer.prefix}experts have H={weights.hidden_size}: {allowed}")
    own = weights.gate_up_proj.dtype
    x = drawn(tokens, weights.hidden_size, own, seed) if hidden is None else given(hidden, own)
    try:
        logits = router.logits(x)
    except ValueError as error:
        raise BadCheckpoint(f"{hidden}: {error}") from error
    origin = f"drawn with seed {seed}" if hidden is None else f"of {hidden.name}"
    where = f"layer {layer.index} ({layer.prefix.rstrip('.')}) of {checkpoint.path.resolve().name}"
    return Extracted(x, logits, weights, f"{where}, family {name}; hidden states {origin}")


def drawn(tokens: int, hidden_size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[T, H] Normal numbers, each token divided by its root mean square, as after a norm without weights."""
    x = torch.randn(tokens, hidden_size, generator=torch.Generator().manual_seed(seed))
    return (x / x.square().mean(dim=1, keepdim=True).sqrt()).to(dtype)


def given(path: Path, dtype: torch.dtype) -> Tensor:
    """[T, H] The hidden states in a safetensors file, rounded to ``dtype``.

    Raises:
        BadCheckpoint: it is no such file, or has no finite tensor "x" of two dimensions.
    """
    with opened(path, BadCheckpoint) as file:
        if "x" not in file.names:
            raise BadCheckpoint(f'{path}: must have a tensor "x", of hidden states')
        x = file.tensor("x")
    if x.ndim != 2 or not len(x) or not x.is_floating_point():
        raise BadCheckpoint(f"{path}: x is {x.dtype} {tuple(x.shape)}: must be floats of shape (T, H), T at least 1")
    x = x.to(dtype)
    if not torch.isfinite(x).all():
        raise BadCheckpoint(f"{path}: x has NaN or infinite elements in {dtype}: must be finite")
    return x


def _decoded(tensor: PackedTensor) -> Tensor:
    """[E, rows, k] All experts in the dtype that the tensor decodes to, one after the other."""
    out = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    for expert in range(tensor.shape[0]):
        out[expert] = decode_expert(tensor, expert)
    return out


def _check_finite(checkpoint: Checkpoint, layer: CheckpointLayer, weights: MoEWeights) -> None:
    for name in (*PROJECTIONS, *OPTIONAL):
        value = getattr(weights, name)
        if value is not None and not all(torch.isfinite(part).all() for part in value):
            where = f"{checkpoint.path}: {layer.prefix}: {name}"
            raise BadCheckpoint(f"{where} has NaN or infinite elements: must be finite in a layer file")
