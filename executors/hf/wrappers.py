"""PEFT's wrappers of experts' parameters, changed so that an executor gets A and B instead of W + B A.

PEFT wraps an experts module once for each adapted parameter, and a call of the module passes through all wrappers. Here
each one hands itself on to what it wraps, as an argument. So the call alone says what adapters add: wrappers that were
unloaded, merged or disabled hand on nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import layer
from torch import Tensor, nn

from executors._protocol import Unsupported
from executors.hf.adapters import DOWN, PREFIX, check_wrapper
from executors.hf.module import is_experts
from executors.hf.parameters import parametrization_of, up_name


class ParamWrapper(layer.ParamWrapper):
    """PEFT's wrapper, which forms no W + B A where the experts run on an executor; PEFT knows it by this name."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's, which gets the wrapper if its adapters are to be added."""
        module: Any = self.get_base_layer()
        if not str(module.config._experts_implementation).startswith(PREFIX):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not (self.disable_adapters or self.merged):
            self._check_there(x)
            kwargs["adapters"] = (*kwargs.get("adapters", ()), self)
        wrapped: Any = self.base_layer
        return wrapped(x, *args, **kwargs)

    def _check_there(self, x: Tensor) -> None:
        """Refuses adapters that are offloaded: nothing brings them, as nobody calls them."""
        own = [self.lora_A[name].weight for name in self.active_adapters if name in self.lora_A]
        if any(value.is_meta for value in own) and not x.is_meta:
            raise Unsupported(
                f"{self.parameter_name}: its adapter is on the meta device (offloaded?): must stay on a device"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, which has no effect on experts in 4 bits: it adds to what it has decoded, and then says merged."""
        if parametrization_of(self.get_base_layer(), self.parameter_name):
            raise Unsupported(f"{self.parameter_name} is in 4 bits: must be dense to have its adapter merged")
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """PEFT's, which has no effect on experts in 4 bits: their codes keep what was merged before they were made."""
        if self.merged and parametrization_of(self.get_base_layer(), self.parameter_name):
            raise Unsupported(f"{self.parameter_name} is in 4 bits, with its adapter merged: cannot be had without it")
        super().unmerge()

    def _activate_lora(self, active_adapters: list[str]) -> Any:
        """PEFT's, which goes wrong with experts in 4 bits: one adapter is ignored, and calls change the next ones."""
        own = any(adapter in self.lora_A for adapter in active_adapters)
        if own and parametrization_of(self.get_base_layer(), self.parameter_name):
            raise Unsupported(
                f"{self.parameter_name} is in 4 bits and has an adapter: must run on an executor: see executors.hf.use"
            )
        return super()._activate_lora(active_adapters)


def separate(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Changes PEFT's wrappers of a model's experts, all or none.

    Wrappers of experts in 4 bits are nested as PEFT nests those of dense experts, up inside of down: an adapter's file
    has one form for both.

    Returns:
        The names of the parameters that have adapters, for each experts module that is wrapped.

    Raises:
        Unsupported: an adapter does more than `executors.hf.adapters.lora_of` takes.
        ValueError: an adapter is meant for experts, and PEFT has not found them.
    """
    chains = list(_chains(model))
    _check_found(model)
    for _parent, _name, chain in chains:
        for wrapper in chain:
            for adapter in wrapper.lora_A:
                check_wrapper(wrapper, adapter)
    for parent, name, chain in chains:
        _nest(parent, name, chain)
        for wrapper in chain:
            wrapper.__class__ = ParamWrapper
    return {chain[0].get_base_layer(): tuple(each.parameter_name for each in reversed(chain)) for *_, chain in chains}


def _check_found(model: nn.Module) -> None:
    """Refuses an adapter whose ``target_parameters`` PEFT has not found, which it says in a warning alone.

    It finds no experts in 4 bits outside of `executors.hf.peft`.
    """
    wrapped = [module for module in model.modules() if isinstance(module, layer.ParamWrapper)]
    of_experts = {name for module in model.modules() if is_experts(module) for name in (up_name(module), DOWN)}
    configs: dict[str, Any] = next(
        (own for module in model.modules() if (own := getattr(module, "peft_config", None))), {}
    )
    for adapter, config in configs.items():
        targets = getattr(config, "target_parameters", None) or []
        found = {wrapper.parameter_name for wrapper in wrapped if adapter in wrapper.lora_A}
        missing = {name for name in (target.rpartition(".")[2] for target in targets) if name not in found}
        if targets and (not found or missing & of_experts):
            raise ValueError(
                f"adapter {adapter!r}: target_parameters={targets!r}: must be parameters that PEFT finds, here of "
                f"{' and '.join(sorted(of_experts))}; experts in 4 bits it finds within executors.hf.peft alone"
            )


def chain_of(wrapper: nn.Module) -> list[Any]:
    """The wrappers of one module, from the outermost inwards."""
    chain: list[Any] = [wrapper]
    while isinstance(chain[-1].base_layer, layer.ParamWrapper):
        chain.append(chain[-1].base_layer)
    return chain


def _chains(model: nn.Module) -> Iterator[tuple[nn.Module, str, list[Any]]]:
    """The wrappers of each experts module, with their parent and their name there."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, layer.ParamWrapper) and not isinstance(parent, layer.ParamWrapper):
                chain = chain_of(child)
                if is_experts(chain[-1].base_layer):
                    yield parent, name, chain


def _nest(parent: nn.Module, name: str, chain: list[Any]) -> None:
    module = chain[0].get_base_layer()
    if any(parametrization_of(module, wrapper.parameter_name) for wrapper in chain):
        chain.sort(key=lambda wrapper: wrapper.parameter_name != DOWN)
        setattr(parent, name, chain[0])
        for outer, inner in zip(chain, [*chain[1:], module], strict=True):
            outer.base_layer = inner
