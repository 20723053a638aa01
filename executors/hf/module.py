"""An experts module of transformers as `MoEWeights`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn

from executors._protocol import Unsupported
from executors.hf.gate import as_config, gate_of, plain_of
from executors.hf.norm import eps_of, factor_of
from executors.hf.parameters import class_name, projection_of, up_name
from moe_ref.types import MoEConfig, MoEWeights, PackedTensor
from moe_ref.validation import dtype_name
from moe_ref.validation.arrays import short

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # set by transformers' decorator
FOUND = "_moe_ref_config"  # of a module: what was found for it, once
OWN_LOOPS = {  # classes that hold experts, which transformers does not dispatch
    "DbrxExperts",
    "DogeCDMoE",
    "JetMoeParallelExperts",
    "Llama4TextExperts",
    "LongcatFlashExperts",
    "NllbMoeExperts",
    "Step3p7Experts",
    "SwitchTransformersExperts",
    "VitPoseNaiveMoe",
    "FP8Experts",
    "Mxfp4GptOssExperts",
    "FbgemmFp8Llama4TextExperts",
    "SequentialLlama4TextExperts",
}


def check_module(name: str, module: object) -> None:
    """Refuses what is no module, in one line."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}={short(module)}: must be a torch.nn.Module")


def is_experts(module: nn.Module) -> bool:
    """Whether the module's class is one that transformers dispatches (``use_experts_implementation``)."""
    return all(hasattr(module, flag) for flag in FLAGS) and hasattr(type(module), "_apply_gate")


def experts_in(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of a model by name, in the model's order; at least one.

    Raises:
        TypeError: the model is no torch.nn.Module.
        Unsupported: there is none that transformers dispatches, or one has a loop of its own.
    """
    check_module("model", model)
    found = {name: module for name, module in model.named_modules() if is_experts(module)}
    others = sorted({class_name(module) for module in model.modules()} & OWN_LOOPS)
    if others or not found:
        has = f"has {', '.join(others)}, with a loop of its own" if others else "has no experts"
        raise Unsupported(f"model={class_name(model)}: {has}: must have experts that transformers dispatches")
    return found


def weights_of(module: nn.Module) -> MoEWeights:
    """The module's parameters as the layer's, without a copy: a view, made anew at each call.

    Parameters in 4 bits are `moe_ref.NF4Tensor` (bitsandbytes' parametrization) or `moe_ref.MXFP4Tensor`. Their bytes
    are read where they lie, and no stack is decoded.
    The factor of a norm after each expert is computed anew, 1 + weight: [H] numbers.

    Args:
        module: an experts module, such as ``model.model.layers[0].mlp.experts``.

    Returns:
        MoEWeights, whose configuration has no ``top_k``: the router is another module. E is what the parameters have,
        which under expert parallelism is the local number.

    Raises:
        Unsupported: no `MoEConfig` says what the module computes; or it is no experts module.
        ValueError, TypeError: bytes or statistics in 4 bits are not what bitsandbytes makes.
    """
    config, own = config_of_experts(module), cast("Any", module)
    up = up_name(own)
    gate_up, down = _alike(projection_of(own, up), projection_of(own, "down_proj"))
    gate_up_bias = getattr(own, f"{up}_bias") if own.has_bias else None
    down_bias = own.down_proj_bias if own.has_bias else None
    norm = factor_of(own.post_expert_norm) if has_norm(own) else None
    return MoEWeights(gate_up, down, gate_up_bias, down_bias, config=config, post_expert_norm=norm)


def _alike(gate_up: Tensor | PackedTensor, down: Tensor | PackedTensor) -> list[Tensor | PackedTensor]:
    """Both projections; one in 4 bits beside a dense one decodes to its dtype, whoever has cast it."""
    dense = [dtype_name(value) for value in (gate_up, down) if isinstance(value, Tensor)]
    dtype = dense[0] if dense else None
    return [value.to(dtype=dtype) if isinstance(value, PackedTensor) else value for value in (gate_up, down)]


def has_norm(module: nn.Module) -> bool:
    """Whether the module normalises each expert's output, as its class declares."""
    return bool(getattr(module, "has_post_expert_norm", False))


def config_of_experts(module: nn.Module) -> MoEConfig:
    """What the module computes, found at the first call and kept by the module.

    Raises:
        Unsupported: as `weights_of`.
    """
    found = getattr(module, FOUND, None)
    return find_config(module) if found is None else found


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="executors.hf finds what a gate computes before it is traced: call the model once before it is compiled "
    "or exported, or switch it by executors.hf.use(model)"
)
def find_config(module: Any) -> MoEConfig:
    """What the module computes, found anew: its gate may be another than at the first call.

    Raises:
        Unsupported: as `weights_of`.
    """
    check_module("module", module)
    vars(module).pop(FOUND, None)
    with ThreadPoolExecutor(1) as other:  # in a thread of its own no mode is on: no device, no tracer, no autocast
        config = other.submit(_probed, module).result()
    for name in (up_name(module), "down_proj"):
        projection_of(module, name)  # is checked at its first use
    setattr(module, FOUND, config)
    return config


def _probed(module: Any) -> MoEConfig:
    name = class_name(module)
    if not is_experts(module):
        raise Unsupported(f"module is a {name}: must be an experts module that transformers dispatches")
    eps = eps_of(module.post_expert_norm) if has_norm(module) else MoEConfig.post_expert_norm_eps
    if eps is None:
        norm = type(module.post_expert_norm).__name__
        rule = "n = (1 + weight) * x, then n / sqrt(mean(n**2) + eps)"
        raise Unsupported(f"{name}: post_expert_norm is a {norm}: must compute {rule}")
    probe = gate_of if module.has_gate else plain_of
    apply = module._apply_gate if module.has_gate else module.act_fn
    activation = probe(apply)
    if activation is None:
        kind = "gate" if module.has_gate else "activation"
        raise Unsupported(f"{name}: its {kind} is none of MoEConfig's: see docs/families.md")
    declared = "concatenated" if module.is_concatenated else "interleaved"
    if activation.layout not in ("", declared):
        raise Unsupported(f"{name}: is_concatenated={module.is_concatenated}: but its gate is {activation.layout}")
    return MoEConfig(None, **as_config(activation), post_expert_norm_eps=eps)
