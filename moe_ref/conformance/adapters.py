"""Executors of other frameworks: who computes on other arrays than torch's can be judged all the same.

A subclass of `ForeignExecutor` gives two functions on arrays of its framework, `forward` and `backward`. It becomes an
executor: torch tensors in and out, autograd between them, refusals in the specification's words. The suite, the test
vectors and ``python -m executors compare`` take it like any other. docs/adding-an-executor.md has an example.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import executors
from moe_ref.conformance.declared import refuse_undeclared, refuse_undeclared_routing, refuse_undeclared_slots
from moe_ref.types import MoEConfig, MoEWeights, Routing
from moe_ref.validation import check_experts_inputs, check_inputs, check_router_logits, check_weights, dtype_name

if TYPE_CHECKING:
    from executors import Capabilities

Arrays = Mapping[str, Any]  # of the framework, by the names of `Layer`


@dataclass(frozen=True)
class Layer:
    """The static part of a call: hashable, so that a framework may compile once for it.

    The arrays beside it have these names: ``x`` [T, H]; ``router_logits`` [T, E], or ``topk_ids`` int64 [T, K] and
    ``topk_weights`` [T, K]; and what the layer has of the fields of `MoEWeights` and `moe_ref.ExpertLoRA`, in their
    shapes. The dtypes are those of T1. Where routing is given, there is no ``selection_bias`` and no ``expert_scale``.

    Attributes:
        config: the layer's configuration.
        dtype: the name of the dtype of x and the projections.
        gate_up_scaling, down_scaling: of the adapters (E6).
    """

    config: MoEConfig
    dtype: str
    gate_up_scaling: float = 1.0
    down_scaling: float = 1.0


class ForeignExecutor(ABC):
    """An executor that computes in another framework. A subclass has a name, capabilities, and the two functions.

    Tensors of no tokens never reach the framework: y has no rows then, and gradients are 0.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    survives_fork: ClassVar[bool] = True  # with False, a process that is forked after a call is refused: it may hang
    _process: ClassVar[int | None] = None  # the one that called first

    @abstractmethod
    def forward(self, arrays: Arrays, layer: Layer) -> Any:
        """y [T, H], in x's dtype or a wider one. Arrays may share memory with the caller's: none may be changed."""

    def backward(self, arrays: Arrays, layer: Layer, dy: Any, wanted: Sequence[str]) -> Arrays:
        """The gradients of <dy, y> for the arrays named in ``wanted``, each in its array's shape.

        Their dtypes, as that of y, are rounded to those of their owners here (T2).

        An executor that declares ``backward=False`` needs none.
        """
        raise NotImplementedError(f"{self.name} declares a backward pass, and must have one")

    def array(self, tensor: Tensor) -> Any:
        """The framework's array of a contiguous tensor without gradient; `numpy_of` it, unless a subclass differs."""
        return numpy_of(tensor)

    def tensor(self, array: Any) -> Tensor:
        """A tensor of the framework's array, in memory of its own; `tensor_of` it, unless a subclass differs."""
        return tensor_of(np.asarray(array))

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """The layer: y, of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
            Unsupported: right input that this executor cannot take.
        """
        check_inputs(x, router_logits, weights)
        self.check(x, weights)
        self._check_routing(router_logits, weights)
        flat = {"x": _rows(x), "router_logits": _rows(router_logits)} | weights.parameters()
        if weights.selection_bias is not None:
            flat["selection_bias"] = weights.selection_bias.detach()
        return self._run(flat, weights).reshape(x.shape)

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """The layer with routing done elsewhere: y, of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
            Unsupported: right input that this executor cannot take.
        """
        check_experts_inputs(x, topk_ids, topk_weights, weights)
        self.check(x, weights)
        refuse_undeclared_slots(self.name, self.capabilities, x, topk_ids, topk_weights, weights)
        flat = {"x": _rows(x), "topk_ids": _rows(topk_ids).long(), "topk_weights": _rows(topk_weights)}
        own = {name: value for name, value in weights.parameters().items() if name != "expert_scale"}
        return self._run(flat | own, weights).reshape(x.shape)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for what the capabilities leave out of the experts."""
        check_weights(weights)
        if not isinstance(x, Tensor):
            raise executors.Unsupported(f"x is a {type(x).__name__}: must be a torch.Tensor")
        if weights.packed():
            name, packed = next(iter(weights.packed().items()))
            raise executors.Unsupported(f"{name} is {packed.quant_type}: must be dense for {self.name}")
        refuse_undeclared(self.name, self.capabilities, x, weights)

    def _check_routing(self, router_logits: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for what the capabilities leave out of routing."""
        of_x = dtype_name(weights.gate_up_proj)
        refuse_undeclared_routing(self.name, self.capabilities, of_x, router_logits, weights)

    def _run(self, tensors: dict[str, Tensor], weights: MoEWeights) -> Tensor:
        return _Call.apply(self, layer_of(weights), tuple(tensors), *tensors.values())  # type: ignore[no-untyped-call]

    def _arrays(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        own, here = type(self), os.getpid()
        if own._process not in (None, here) and not own.survives_fork:
            raise RuntimeError(f"{self.name} was called before a fork: must be called in a process that is spawned")
        own._process = here
        return {name: self.array(value.detach().contiguous()) for name, value in tensors.items()}


class ForeignRouter(ForeignExecutor):
    """A `ForeignExecutor` that tells which experts it chooses, and is then judged on its own ids."""

    @abstractmethod
    def choose(self, arrays: Arrays, layer: Layer) -> tuple[Any, Any]:
        """topk_ids [T, K] and topk_weights [T, K], as `forward` uses them; of the arrays, those of routing alone."""

    def route(self, router_logits: Tensor, weights: MoEWeights) -> Routing:
        """topk_ids int64 (T1) and topk_weights, [..., K], for router_logits [..., E]; without gradients.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
            Unsupported: right input that this executor cannot take.
        """
        check_router_logits(router_logits, weights)
        self._check_routing(router_logits, weights)
        given = {"router_logits": _rows(router_logits)}
        for name in ("selection_bias", "expert_scale"):
            if getattr(weights, name) is not None:
                given[name] = getattr(weights, name)
        shape = (*router_logits.shape[:-1], weights.config.top_k)
        if not given["router_logits"].shape[0]:
            return Routing(router_logits.new_zeros(shape, dtype=torch.int64), router_logits.new_zeros(shape).float())
        found = [self.tensor(array) for array in self.choose(self._arrays(given), layer_of(weights))]
        ids, slot_weights = (value.to(router_logits.device).reshape(shape) for value in found)
        return Routing(ids.long(), slot_weights)


def layer_of(weights: MoEWeights) -> Layer:
    """The static part of a layer."""
    lora = weights.lora
    scalings = () if lora is None else (lora.gate_up_scaling, lora.down_scaling)
    return Layer(weights.config, dtype_name(weights.gate_up_proj), *scalings)


def numpy_of(tensor: Tensor, bfloat16: Any = None) -> np.ndarray:
    """A NumPy array of a tensor; of one on the CPU, its memory.

    Args:
        tensor: of any dtype that NumPy has, or bf16.
        bfloat16: NumPy's dtype of that name, such as ``ml_dtypes.bfloat16``, as which bf16's bits are read. Without it,
            bf16 is copied to fp32, which holds its numbers exactly.
    """
    tensor = tensor.detach().cpu()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.float().numpy() if bfloat16 is None else tensor.contiguous().view(torch.int16).numpy().view(bfloat16)


def tensor_of(array: np.ndarray) -> Tensor:
    """A tensor of a NumPy array, in memory of its own; an array whose dtype is named bfloat16 gives bf16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class _Call(torch.autograd.Function):
    """One call: tensors by name through the framework, forward and backward."""

    @staticmethod
    def forward(ctx: Any, executor: ForeignExecutor, layer: Layer, names: tuple[str, ...], *tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        ctx.save_for_backward(*tensors)
        ctx.call = executor, layer, names
        x = given["x"]
        if not x.shape[0]:
            return x.new_zeros(x.shape)
        return _returned("y", executor.tensor(executor.forward(executor._arrays(given), layer)), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, _, names = ctx.call
        wanted = tuple(name for name, needed in zip(names, ctx.needs_input_grad[3:], strict=True) if needed)
        found = _Gradients.apply(*ctx.call, wanted, dy, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        gradients = dict(zip(wanted, found, strict=True))
        return None, None, None, *(gradients.get(name) for name in names)


class _Gradients(torch.autograd.Function):
    """The backward pass, which has no derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        executor: ForeignExecutor,
        layer: Layer,
        names: tuple[str, ...],
        wanted: tuple[str, ...],
        dy: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.name = executor.name
        given = dict(zip(names, tensors, strict=True))
        if not given["x"].shape[0]:
            return tuple(torch.zeros_like(given[name], memory_format=torch.contiguous_format) for name in wanted)
        upstream = executor.array(dy.detach().contiguous())
        found = executor.backward(executor._arrays(given), layer, upstream, wanted)
        if missing := [name for name in wanted if name not in found]:
            raise RuntimeError(f"{executor.name}.backward gives no gradient of {missing[0]}: must give all of {wanted}")
        return tuple(_returned(f"the gradient of {name}", executor.tensor(found[name]), given[name]) for name in wanted)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"{ctx.name}: double backward is not supported; use create_graph=False")


def _returned(what: str, value: Tensor, owner: Tensor) -> Tensor:
    """What a framework gave, in its owner's dtype and on its device (T2)."""
    if value.shape != owner.shape or not value.is_floating_point():
        form = f"{dtype_name(value)} {tuple(value.shape)}"
        raise RuntimeError(f"{what} is {form}: must be of a float dtype, and {tuple(owner.shape)}")
    return value.to(owner)
