"""Experts of a transformers model in 4 bits, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from executors import nf4
from executors._progress import Progress, check_progress, reporter
from executors._protocol import Unsupported
from executors.hf.interface import separate
from executors.hf.module import config_of_experts, experts_in
from executors.hf.parameters import class_name, parametrization_of, up_name
from executors.hf.storage import check_library, put
from moe_ref.types import NF4Tensor, QuantType
from moe_ref.validation import check_quantize, dtype_name


@dataclass(frozen=True)
class QuantizedLayer:
    """An experts module whose projections are in 4 bits now.

    Attributes:
        name: in the model, such as "model.layers.0.mlp.experts".
        kind: its class.
        parameters: the names of its projections.
        bytes_before, bytes_after: of these.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Quantized:
    """What `quantize_experts` did.

    Attributes:
        quant_type: "nf4" or "fp4".
        layers: the modules that were quantised, in the model's order.
    """

    quant_type: str
    layers: tuple[QuantizedLayer, ...]

    def __str__(self) -> str:
        kinds = ", ".join(sorted({layer.kind for layer in self.layers}))
        before, after = (sum(getattr(layer, name) for layer in self.layers) for name in ("bytes_before", "bytes_after"))
        return f"{len(self.layers)} layers of {kinds} are in {self.quant_type}: {_size(before)} became {_size(after)}"


def quantize_experts(
    model: nn.Module,
    quant_type: QuantType = "nf4",
    nested: bool = True,
    blocksize: int = 64,
    *,
    progress: Progress = None,
) -> Quantized:
    """Quantises the projections of a model's experts to 4 bits, in place, one after the other.

    The bits are those of clause Q4, in the order in which the class stores the parameter. They are kept by
    bitsandbytes' parametrization, with its keys in a state dict. Biases, routers and all else stay as they are. Beside
    the result it needs one projection in 4 bits, and tens of megabytes on a CPU and a few hundred elsewhere. A
    projection that is not contiguous is copied first. Modules that share a parameter share its 4 bits.

    Everything is checked before the first projection is changed. `executors.hf.use` works before and after. Adapters of
    PEFT that are there run on an executor from then on, and on nothing else; merged ones stay merged.

    Args:
        model: a transformers model, or any module that contains its experts modules; on a device, not on "meta".
        quant_type: "nf4" or "fp4".
        nested: whether the scales are quantised too: saves 0.37 bits per number at 64.
        blocksize: numbers that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        progress: None; a callable (done, total) that counts numbers; or True for a bar on stderr, which needs rich.

    Returns:
        What was quantised: at least one layer.

    Raises:
        TypeError: the model is no torch.nn.Module; a projection is in fp64 or another dtype that has no 4 bits.
        ValueError: an argument is none of those above; or a projection has NaN or infinite elements.
        Unsupported: nothing is quantised: there are no experts that transformers dispatches; no `MoEConfig` says what
            one computes; a projection is in 4 bits already, parametrized by something else, a DTensor, or on the
            meta device; an adapter of PEFT does more than add ``scaling * B A`` to a projection.
        ModuleNotFoundError: bitsandbytes is missing; or rich, with ``progress=True``.
    """
    found = experts_in(model)
    check_progress(progress)
    check_library()
    plan = {
        (name, own): _dense(f"{name}." if name else "", module, own)
        for name, module in found.items()
        for own in _projections(module)
    }
    for (name, own), value in plan.items():
        label = f"{name}.{own}" if name else own
        check_quantize(value, dtype_name(value), quant_type, blocksize, nested, label)
        if value.numel() and not all(torch.isfinite(end) for end in value.aminmax()):
            raise ValueError(f"{label} has NaN or infinite elements: must be finite")
    separate(model)
    total, before = sum(value.numel() for value in plan.values()), 0
    places = Counter(id(getattr(found[name], own)) for name, own in plan)
    del plan, value  # a reference would keep what is replaced
    layers = []
    tied: dict[int, tuple[Tensor, NF4Tensor]] = {}
    # Tensors made in inference mode could not be trained beside.
    with reporter(progress, total) as tell, torch.inference_mode(False), torch.no_grad():
        tell(0)
        for name, module in found.items():
            sizes = {}
            for own in _projections(module):
                parameter = getattr(module, own)
                _, tensor = tied.get(id(parameter), (None, None))
                if tensor is None:
                    tensor = quantized(parameter, quant_type, nested, blocksize, _from(before, tell))
                if (
                    places[id(parameter)] > 1
                ):  # of modules that share a parameter: it stays shared, and alive until then
                    tied[id(parameter)] = parameter, tensor
                sizes[own] = (parameter.nbytes, bytes_of(tensor))
                before += parameter.numel()
                put(module, own, tensor)
            was, now = (sum(size[side] for size in sizes.values()) for side in (0, 1))
            layers.append(QuantizedLayer(name, class_name(module), tuple(sizes), was, now))
    return Quantized(quant_type, tuple(layers))


def quantized(
    value: Tensor,
    quant_type: QuantType,
    nested: bool,
    blocksize: int,
    done: Callable[[int], object] = lambda done: None,
) -> NF4Tensor:
    """A stack in 4 bits, in its own logical order: the class says what a transposed one means, and not the bytes."""

    def tell(so_far: int, _total: int) -> None:
        if so_far:  # the start is told once, for all
            done(so_far)

    return nf4.quantize_tensor(value.detach().contiguous(), quant_type, blocksize, nested, progress=tell)


def bytes_of(tensor: NF4Tensor) -> int:
    """How many bytes its codes and statistics have."""
    return sum(array.nbytes for array in tensor.arrays().values())


def _projections(module: nn.Module) -> tuple[str, str]:
    return up_name(module), "down_proj"


def _dense(prefix: str, module: nn.Module, name: str) -> Tensor:
    """A projection that may be quantised."""
    config_of_experts(module)  # what no executor computes is refused by name
    if parametrization_of(module, name) is not None:
        raise Unsupported(f"{prefix}{name} is in 4 bits: must be dense: nothing is quantised twice")
    value = module._parameters.get(name)
    if value is None:
        raise Unsupported(f"{prefix}{name} is no parameter of its module: must be one, parametrized by nothing")
    if hasattr(value, "placements"):
        raise Unsupported(
            f"{prefix}{name} is a DTensor: must be a plain tensor; see executors.parallel for experts on ranks"
        )
    if value.is_meta:
        raise Unsupported(f"{prefix}{name} is on the meta device: must have its numbers (hf.load_quantized reads them)")
    return value.detach()


def _from(before: int, tell: Callable[[int], object]) -> Callable[[int], object]:
    return lambda done: tell(before + done)


def _size(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
