"""The experts of a layer as a module: what learns is a parameter, what is in 4 bits a buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from executors._protocol import check_norm
from executors._registry import get
from executors.nn.packed_buffers import Form, entries, held, hold, loaded, not_held, saved
from moe_ref.types import LEARNED, LORA_FACTORS, PROJECTIONS, ExpertLoRA, MoEWeights, NF4Tensor, PackedTensor
from moe_ref.validation import DECODED_DTYPES, check_weights, dtype_name
from moe_ref.validation.arrays import check_bool


class Experts(nn.Module):
    """A layer's experts on any executor.

    Parameters have the names of `MoEWeights`: dense projections, biases, learned scales, the factor of a norm, and the
    factors of adapters. The selection bias is a buffer. So are the arrays of projections in 4 bits, which a state dict
    has under bitsandbytes' keys (NF4, FP4) or gpt-oss' (MXFP4). The configuration, the scalings of adapters and the
    executor are attributes, and not in a state dict.

    ``module.to(dtype)`` casts parameters. It changes neither the selection bias (R3) nor codes and scales, which then
    decode to the dtype. Source of the keys: bitsandbytes 0.50.2, ``nn/parametrize.py``; openai/gpt-oss-20b.

    Attributes:
        config: the layer's configuration.
        executor_name: the executor's name.
        options: the executor's options.
        gate_up_scaling, down_scaling: of adapters.

    Args:
        weights: the layer, in torch. Contiguous tensors are shared with it, others are copied.
        executor: a name of `executors.names`.
        frozen: whether all but adapters is frozen: dense projections, biases, learned scales,
            the norm's factor.
        **options: the executor's own, as for `executors.get`.

    Raises:
        UnknownExecutor, Unavailable: as `executors.get`.
        Unsupported: the layer has a norm after each expert, which the executor does not declare.
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.

    Example:
        >>> experts = executors.nn.Experts(weights, "native")
        >>> y = experts(x, router_logits)
    """

    def __init__(self, weights: MoEWeights, executor: str = "auto", *, frozen: bool = False, **options: Any) -> None:
        super().__init__()
        check_weights(weights)
        check_bool("frozen", frozen)
        first: Any = weights.gate_up_proj
        first = first.codes if isinstance(first, PackedTensor) else first
        if not isinstance(first, Tensor):
            kind = type(first)
            raise TypeError(f"weights.gate_up_proj is a {kind.__module__}.{kind.__name__}: must be a torch.Tensor")
        self._executor = get(executor, **options)
        check_norm(self._executor, weights)
        self.config, self.executor_name, self.options = weights.config, executor, options
        lora, bias = weights.lora or ExpertLoRA(), weights.selection_bias
        self.gate_up_scaling, self.down_scaling = float(lora.gate_up_scaling), float(lora.down_scaling)
        parameters, packed = weights.parameters(), weights.packed()
        for name in LEARNED:
            if name in packed:
                continue
            own, learns = parameters.get(name), name in LORA_FACTORS or not frozen
            self.register_parameter(name, None if own is None else nn.Parameter(_apart(own), requires_grad=learns))
        self.register_buffer("selection_bias", None if bias is None else _apart(bias))
        self._forms: dict[str, Form] = {name: hold(self, name, tensor) for name, tensor in packed.items()}

    @property
    def weights(self) -> MoEWeights:
        """The layer as it is now: a thin view of parameters and buffers, made anew at each call."""
        factors = {name: getattr(self, name) for name in LORA_FACTORS}
        scalings = {"gate_up_scaling": self.gate_up_scaling, "down_scaling": self.down_scaling}
        adapted = any(value is not None for value in factors.values())
        others = {name: getattr(self, name) for name in LEARNED if name not in (*LORA_FACTORS, *self._forms)}
        return MoEWeights(
            **others,
            **self._packed(),
            selection_bias=self.selection_bias,
            lora=ExpertLoRA(**factors, **scalings) if adapted else None,
            config=self.config,
        )

    def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
        """The layer: y, of x's shape, dtype and device.

        Args:
            x: [..., H], the dtype of the projections.
            router_logits: [..., E], any float dtype.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
            Unsupported: right input that the executor cannot take.
        """
        return self._executor(x, router_logits, self.weights)

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The layer with routing done elsewhere; ids outside [0, E) are empty slots (R7).

        FSDP2 gathers parameters for it only after ``register_fsdp_forward_method(module, "experts")``.

        Args:
            x: [..., H], the dtype of the projections.
            topk_ids: [..., K], int32 or int64.
            topk_weights: [..., K], any float dtype.

        Raises:
            ValueError, TypeError, Unsupported: as `forward`.
        """
        return self._executor.experts(x, topk_ids=topk_ids, topk_weights=topk_weights, weights=self.weights)

    def extra_repr(self) -> str:
        """The executor and the sizes."""
        weights = self.weights
        kinds = ", ".join(f"{name} in {tensor.quant_type}" for name, tensor in weights.packed().items())
        sizes = f"E={weights.num_experts}, H={weights.hidden_size}, I={weights.intermediate_size}"
        return ", ".join(filter(None, [repr(self.executor_name), sizes, kinds]))

    def _packed(self) -> dict[str, PackedTensor]:
        """The projections in 4 bits. Beside a dense one they decode to its dtype, whoever has cast it."""
        dense = [getattr(self, name) for name in PROJECTIONS if name not in self._forms]
        dtype = dtype_name(dense[0]) if dense else None
        return {name: held(self, name, form).to(dtype=dtype) for name, form in self._forms.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        """Moves and casts as every module does, but never casts a buffer; 4 bits decode to the new dtype."""
        kept = {id(buffer) for buffer in self.buffers(recurse=False)}
        decoded = {name: _cast_by(fn, static["dtype"], name) for name, (_, static) in self._forms.items()}

        def change(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if id(tensor) in kept and changed.dtype != tensor.dtype else changed

        super()._apply(change, recurse)  # type: ignore[no-untyped-call]
        self._forms = {n: (own, static | {"dtype": decoded[n]}) for n, (own, static) in self._forms.items()}
        return self

    def __getattr__(self, name: str) -> Any:
        """The entries of a projection in NF4 or FP4, for who looks for what a state dict has."""
        if name in vars(self).get("_forms", ()):
            tensor = self._packed()[name]
            if isinstance(tensor, NF4Tensor):
                return entries(tensor)
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._packed().items():
            if isinstance(tensor, NF4Tensor):
                destination.update(saved(tensor, prefix + name))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest, assign = dict(state_dict), local_metadata.get("assign_to_params_buffers", False)
        for name, before in self._packed().items():
            key = prefix + name
            own = [k for k in state_dict if k == key or k.startswith(f"{key}.")]
            if not isinstance(before, NF4Tensor):
                continue
            if not own and strict:
                missing_keys.append(key)
            for k in own:
                del rest[k]
            try:
                tensor = loaded(state_dict, key, before, assign=assign) if own else before
            except (ValueError, TypeError) as error:
                error_msgs.append(str(error))
            else:
                self._forms[name] = hold(self, name, tensor)
        for name, buffer in self._buffers.items():
            said = "" if buffer is None else not_held(prefix + name, rest.get(prefix + name), buffer)
            if said and not (assign and buffer is not None and buffer.is_floating_point()):
                error_msgs.append(said)
                rest[prefix + name] = buffer
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def __getstate__(self) -> dict[str, Any]:
        """All but the executor, which is made anew from its name and options."""
        return {name: value for name, value in vars(self).items() if name != "_executor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Makes the executor.

        Raises:
            Unavailable: it cannot be had on this machine.
        """
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._executor = get(self.executor_name, **self.options)


def _apart(value: Tensor) -> Tensor:
    """The tensor without its history, contiguous: FSDP2 and safetensors take no other."""
    return value.detach().contiguous()


def _cast_by(fn: Callable[[Tensor], Tensor], dtype: str, name: str) -> str:
    """The dtype that a module's conversion makes of another one.

    Raises:
        TypeError: 4 bits do not decode to it.
    """
    found = dtype_name(fn(torch.empty(0, dtype=getattr(torch, dtype))))
    if found not in DECODED_DTYPES:
        raise TypeError(f"dtype={found}: must be one of {', '.join(DECODED_DTYPES)}, since {name} is in 4 bits")
    return found
