"""A layer in a safetensors file: weights, hidden states and router logits (docs/layer-file.md)."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from executors._files.arguments import path_of, place_of
from executors._files.tensors import opened, write
from executors._files.text import one_line, parse_json
from moe_ref.types import PROJECTIONS, MoEConfig, MoEWeights
from moe_ref.validation import check_inputs
from moe_ref.validation.arrays import check_bool

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "moe-ref layer 1"
REQUIRED = ("x", "router_logits", *PROJECTIONS)
OPTIONAL = ("gate_up_proj_bias", "down_proj_bias", "selection_bias", "expert_scale", "post_expert_norm")
BUNDLED = "tiny_gpt_oss_layer.safetensors"


class BadLayerFile(ValueError):
    """A file that is not a layer. The message is one line: the file, what is wrong, and what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer with an input.

    Attributes:
        path: the file.
        sha256: hash of the file.
        source: one sentence on the origin of the layer.
        x: [T, H] hidden states, in the projections' dtype.
        router_logits: [T, E].
        weights: projections in canonical shapes; views if the file stores them transposed.
    """

    path: Path
    sha256: str
    source: str
    x: Tensor
    router_logits: Tensor
    weights: MoEWeights


def bundled_layer() -> Path:
    """The path of the bundled layer: inside the package in a wheel, in data/ in a checkout.

    Raises:
        BadLayerFile: the layer is in neither place.
    """
    package = Path(__file__).parent
    candidates = (package / "data" / BUNDLED, package.parent / "data" / BUNDLED)
    for path in candidates:
        if path.exists():
            return path
    raise BadLayerFile(f"{BUNDLED}: must lie in {' or '.join(str(c.parent) for c in candidates)}; or name a FILE")


def load_layer(path: str | os.PathLike[str], device: torch.device | str = "cpu", *, verify: bool = True) -> Layer:
    """Reads and checks a layer file.

    Args:
        path: a safetensors file of the documented form.
        device: the device for the tensors.
        verify: whether checksums are compared, where the file has them.

    Raises:
        BadLayerFile: the file does not have that form; one line says why.
        ValueError, TypeError: another argument is none of those above.
    """
    path, place = path_of("path", path), place_of(device)
    check_bool("verify", verify)
    with opened(path, BadLayerFile, verify=verify) as file:
        _check_names(path, file.names)
        metadata = file.metadata
        tensors: dict[str, Any] = {name: file.tensor(name).to(place) for name in file.names}
    config = _config(path, metadata)
    for name in _transposed(path, metadata):
        if tensors[name].ndim != 3:
            raise BadLayerFile(f"{path}: {name}.shape={tuple(tensors[name].shape)}: must have three dimensions")
        tensors[name] = tensors[name].transpose(1, 2)
    x, router_logits = tensors.pop("x"), tensors.pop("router_logits")
    weights = MoEWeights(**tensors, config=config)
    _check_layer(path, x, router_logits, weights)
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return Layer(path, digest, metadata.get("source", ""), x, router_logits, weights)


def first_tokens(layer: Layer, tokens: int | None) -> Layer:
    """The layer with only its first ``tokens`` tokens, or with all for None."""
    if tokens is None:
        return layer
    return replace(layer, x=layer.x[:tokens], router_logits=layer.router_logits[:tokens])


def save_layer(
    path: str | os.PathLike[str],
    x: Tensor,
    router_logits: Tensor,
    weights: MoEWeights,
    source: str = "",
    transposed: tuple[str, ...] = (),
) -> None:
    """Writes a layer file, whole or not at all.

    Args:
        path: the file.
        x: [T, H].
        router_logits: [T, E].
        weights: the layer's parameters and configuration.
        source: one sentence on the origin of the layer.
        transposed: projections to store with their last two axes swapped.

    Raises:
        ValueError, TypeError: the arguments do not make a layer.
        OSError: the file cannot be written.
    """
    check_inputs(x, router_logits, weights)
    if x.ndim != 2:
        raise ValueError(f"x.shape={tuple(x.shape)}: must be (T, H)")
    if weights.packed():
        raise ValueError(f"{min(weights.packed())} is in 4 bits: must be dense; executors.nf4.save writes 4 bits")
    if isinstance(transposed, str) or not set(transposed) <= set(PROJECTIONS):
        raise ValueError(f"transposed={transposed!r:.60}: must be a tuple out of {', '.join(PROJECTIONS)}")
    tensors: dict[str, Tensor] = {"x": x, "router_logits": router_logits}
    for name in (*PROJECTIONS, *OPTIONAL):
        value = getattr(weights, name)
        if value is not None:
            tensors[name] = value.transpose(1, 2) if name in transposed else value
    metadata = {
        "format": FORMAT,
        "config": json.dumps(asdict(weights.config)),
        "transposed": json.dumps(list(transposed)),
        "source": source,
    }
    write(path_of("path", path), tensors, metadata)


def _check_names(path: Path, names: set[str]) -> None:
    allowed = (*REQUIRED, *OPTIONAL)
    missing, unknown = [n for n in REQUIRED if n not in names], sorted(names - set(allowed))
    packed = sorted(name for name in names if name.endswith(".absmax"))
    if packed:
        raise BadLayerFile(f"{path}: tensor {_shown(packed[0])} belongs to 4 bits: must be dense, decoded if need be")
    if missing:
        raise BadLayerFile(f"{path}: tensor {missing[0]} is missing: must have {', '.join(REQUIRED)}")
    if unknown:
        raise BadLayerFile(f"{path}: tensor {_shown(unknown[0])} is unknown: must be one of {', '.join(allowed)}")


def _metadata(path: Path, metadata: dict[str, str], key: str) -> Any:
    text = metadata.get(key, "")
    try:
        return parse_json(text)
    except ValueError:
        raise BadLayerFile(f"{path}: metadata {key}={text!r:.60}: must be JSON") from None


def _config(path: Path, metadata: dict[str, str]) -> MoEConfig:
    said = metadata.get("format")
    if said != FORMAT:
        raise BadLayerFile(f"{path}: metadata format={said!r}: must be {FORMAT!r}")
    found = _metadata(path, metadata, "config")
    known = [f.name for f in fields(MoEConfig)]
    if not isinstance(found, dict) or "top_k" not in found:
        raise BadLayerFile(f"{path}: metadata config={found!r:.60}: must be an object with top_k")
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise BadLayerFile(f"{path}: metadata config has {_shown(unknown[0])}: must be one of {', '.join(known)}")
    return MoEConfig(**found)


def _transposed(path: Path, metadata: dict[str, str]) -> list[str]:
    found = _metadata(path, metadata, "transposed") if "transposed" in metadata else []
    names = found if isinstance(found, list) else [None]
    if any(name not in PROJECTIONS or names.count(name) > 1 for name in names):
        allowed = f"must be a list out of {', '.join(PROJECTIONS)}, each at most once"
        raise BadLayerFile(f"{path}: metadata transposed={found!r:.60}: {allowed}")
    return found


def _check_layer(path: Path, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> None:
    if x.ndim != 2:
        raise BadLayerFile(f"{path}: x.shape={tuple(x.shape)}: must be (T, H)")
    try:
        check_inputs(x, router_logits, weights)
    except (ValueError, TypeError) as error:
        raise BadLayerFile(f"{path}: {error}") from error
    if not len(x):
        raise BadLayerFile(f"{path}: x.shape={tuple(x.shape)}: must have at least one token")
    for name, value in {"x": x, **{n: getattr(weights, n) for n in (*PROJECTIONS, *OPTIONAL)}}.items():
        if value is not None and not torch.isfinite(value).all():
            raise BadLayerFile(f"{path}: {name} has NaN or infinite elements: must be finite")
    if torch.isnan(router_logits).any() or (router_logits == torch.inf).any():
        raise BadLayerFile(f"{path}: router_logits has NaN or +inf elements: must be finite or -inf")
    if weights.config.scoring.endswith("softmax") and (router_logits == -torch.inf).all(dim=1).any():
        raise BadLayerFile(f"{path}: router_logits has a row of nothing but -inf: must have a finite element")


def _shown(name: str) -> str:
    """A name from a file for a message: one line, cut if it is long."""
    return name if name.isidentifier() and len(name) <= 60 else f"{name!r:.60}"
