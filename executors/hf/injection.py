"""Shows PEFT experts in 4 bits as if they were dense, while it puts adapters on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from executors.hf.interface import separate
from executors.hf.module import check_module, is_experts
from executors.hf.parameters import parametrization_of, projection_of, up_name
from moe_ref.validation import dtype_name


@contextmanager
def peft(model: nn.Module) -> Iterator[None]:
    """Within it, PEFT takes experts in 4 bits for dense ones; what it wraps runs separately afterwards.

        with executors.hf.peft(model):
            model = get_peft_model(model, LoraConfig(target_parameters=["mlp.experts.gate_up_proj"], ...))

    PEFT finds no parameter in 4 bits, or wraps it wrongly. Here each such parameter has a stand-in of its shape, dtype
    and device, all NaN, which takes the memory of one number; afterwards its bytes are as they were.
    ``get_peft_model``, ``PeftModel.from_pretrained``, ``add_adapter`` and ``load_adapter`` may be called within it, but
    not the model. A model whose experts are dense needs it only where it is on an executor already: `executors.hf.use`
    does the same for adapters that are there.

    Args:
        model: of transformers, or a PeftModel that gets another adapter.

    Raises:
        TypeError: the model is no torch.nn.Module.
        Unsupported: an adapter does more than add ``scaling * B A`` to a projection.
        ValueError: an adapter has ``target_parameters`` that PEFT did not find: experts in 4 bits outside of `peft`.
    """
    check_module("model", model)
    hidden: list[_Hidden] = []
    try:
        for module in model.modules():
            if is_experts(module) and _packed(module):
                hidden.append(_Hidden(module))
        yield
    finally:
        for each in hidden:
            each.show()
    separate(model)


def _packed(module: Any) -> list[str]:
    """Its projections in 4 bits, up first: PEFT wraps in this order."""
    return [name for name in (up_name(module), "down_proj") if parametrization_of(module, name) is not None]


class _Hidden:
    """Parametrizations that are taken off a module, with stand-ins in their place, until they are shown again."""

    def __init__(self, module: Any) -> None:
        self.module, self.kind, self.names = module, type(module), _packed(module)
        self.order = list(module._parameters)
        tensors = [projection_of(module, name) for name in self.names]
        module.__class__ = type_before_parametrizations(module)
        self.parametrizations = module._modules.pop("parametrizations")
        for name, tensor in zip(self.names, tensors, strict=True):
            one = torch.full((), torch.nan, dtype=getattr(torch, dtype_name(tensor)), device=tensor.device)
            experts, rows, columns = tensor.shape
            shape = (experts, columns, rows) if module.is_transposed else (experts, rows, columns)
            module.register_parameter(name, nn.Parameter(one.expand(shape), requires_grad=False))
        self._sort((up_name(module), "down_proj"))  # PEFT wraps in this order, also where one of them is dense

    def show(self) -> None:
        for name in self.names:
            del self.module._parameters[name]
        self._sort(self.order)
        self.module._modules["parametrizations"] = self.parametrizations
        self.module.__class__ = self.kind

    def _sort(self, names: Iterable[str]) -> None:
        """Puts parameters last, in the order of their names."""
        for name in names:
            if name in self.module._parameters:
                self.module._parameters[name] = self.module._parameters.pop(name)
