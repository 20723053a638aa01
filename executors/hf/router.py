"""A router of transformers as a `MoEConfig`."""

from __future__ import annotations

from dataclasses import replace

import transformers
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from executors._protocol import Unsupported
from executors.hf.module import check_module
from executors.hf.router_rules import RouterRule
from executors.hf.router_table import CHECKED, REFUSED, RULES


def config_of(module: nn.Module) -> RouterRule:
    """How a router chooses experts and weighs them, such that `moe_ref.route` gives the same from the same logits.

    The logits [T, E] are those that the router itself returns, or the logarithms of the probabilities that it returns:
    `RouterRule.returns` says which. Numbers come from the module's attributes, the rule from
    a table by the name of its class: docs/routers.md lists it. The order of a token's experts is the specification's,
    which many routers leave open; equal keys go to the lower id.

    Args:
        module: a router, such as ``model.model.layers[0].mlp.gate``; or the block that contains it, which is needed
            where the block holds the selection bias.

    Returns:
        RouterRule: the configuration, the selection bias, the learned scales of experts, and under which condition they
            are exact.

    Raises:
        TypeError: it is no torch.nn.Module.
        Unsupported: the class is unknown, or is one that no `MoEConfig` expresses; or the selection bias is the block's
            and only the router was given; or there is not one router in the module.
    """
    check_module("module", module)
    router, block = _find(module)
    name = _name(router)
    if name in REFUSED:
        raise Unsupported(f"{name}: {REFUSED[name]}: no MoEConfig says that")
    rule = RULES[name](router, block)
    if transformers.__version__ == CHECKED:
        return rule
    said = f"the rule was compared with transformers {CHECKED}, this is {transformers.__version__}"
    return replace(rule, note="; ".join(filter(None, (rule.note, said))))


def _find(module: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The router and the module that contains it, None where the router itself is given."""
    if _is_known(module):
        return module, None
    found = [(child, parent) for parent in module.modules() for child in parent.children() if _is_known(child)]
    if len(found) == 1:
        return found[0]
    name = type(module).__name__
    if found:
        raise Unsupported(f"{name}: has {len(found)} routers: give one of them, or the block that contains it")
    within = ", ".join(sorted({type(child).__name__ for child in module.children()})) or "nothing"
    raise Unsupported(f"{name}: is no router of transformers that is known, and contains none: it contains {within}")


def _is_known(module: nn.Module) -> bool:
    """Whether the class is in the table; a class of the same name elsewhere may compute anything."""
    ours = type_before_parametrizations(module).__module__.startswith("transformers.models.")
    return ours and _name(module) in RULES.keys() | REFUSED.keys()


def _name(module: nn.Module) -> str:
    return type_before_parametrizations(module).__name__
