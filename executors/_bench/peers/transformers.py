"""The experts functions of transformers, on the benchmark's own tensors.

A module of the model's own class is built without memory, and the layer's parameters are put in their place. The class'
own loop is "eager"; the others are entries of its ExpertsInterface. Routing is outside all of them.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from executors._bench.contenders import Contender
from executors._bench.layers import BenchLayer, Shape
from executors._bench.routing import Batch
from executors._compare.report import version_of
from moe_ref.types import PackedTensor

PREFIX = "hf:"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
GIB = 2**30
BATCHED_LIMIT = {"cpu": 2 * GIB, "cuda": 32 * GIB}  # for the weights that batched_mm gathers slot by slot
EAGER_LIMIT = {"cpu": 16 * GIB}  # for what eager writes in backward; on a GPU there is none

# For each layer: the module under transformers.models, the experts class by its names since 5.2, the config class, and
# what the config calls our sizes.
CLASSES = {
    "gpt-oss-20b": (
        "gpt_oss",
        ("GptOssExperts",),
        "GptOssConfig",
        {"num_local_experts": "experts", "hidden_size": "hidden", "intermediate_size": "intermediate"},
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        ("Qwen3MoeExperts",),
        "Qwen3MoeConfig",
        {"num_experts": "experts", "hidden_size": "hidden", "moe_intermediate_size": "intermediate"},
    ),
    "mixtral-8x7b": (
        "mixtral",
        ("MixtralExperts",),
        "MixtralConfig",
        {"num_local_experts": "experts", "hidden_size": "hidden", "intermediate_size": "intermediate"},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        ("DeepseekV3Experts", "DeepseekV3NaiveMoe"),
        "DeepseekV3Config",
        {"n_routed_experts": "experts", "hidden_size": "hidden", "moe_intermediate_size": "intermediate"},
    ),
}

peers_version = partial(version_of, "transformers")  # None where it is not installed


def peers(layer: BenchLayer) -> list[Contender]:
    """Transformers' experts functions on this layer; none where transformers is not installed."""
    if peers_version() is None:
        return []
    found = []
    for implementation in IMPLEMENTATIONS:
        try:
            module = experts_module(layer, implementation)
        except (ImportError, AttributeError) as error:
            said = " ".join(str(error).split())
            found.append(Contender(PREFIX + implementation, False, reason=f"not in this transformers: {said}"))
        else:
            found.append(_peer(layer.shape, implementation, module))
    return found


def experts_module(layer: BenchLayer, implementation: str) -> Any:
    """The model's experts module, with the layer's own parameters and no copy of them; those in 4 bits are left out.

    Raises:
        ImportError, AttributeError: this version of transformers has no such module or class.
    """
    shape = layer.shape
    folder, class_names, config_name, sizes = CLASSES[shape.name]
    package = f"transformers.models.{folder}"
    config_class = getattr(import_module(f"{package}.configuration_{folder}"), config_name)
    modeling = import_module(f"{package}.modeling_{folder}")
    name = next((n for n in class_names if hasattr(modeling, n)), class_names[0])
    config = config_class(num_hidden_layers=1, **{theirs: getattr(shape, ours) for theirs, ours in sizes.items()})
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = getattr(modeling, name)(config)
    _put(module, layer)
    return module


def _put(module: Any, layer: BenchLayer) -> None:
    theirs = {name: tuple(value.shape) for name, value in module.named_parameters()}
    values = layer.frozen | layer.parameters
    ours = {name: tuple(value.shape) for name, value in values.items()}
    if theirs != ours:
        raise AttributeError(f"{type(module).__name__} has parameters {theirs}, but must have {ours}")
    for name, value in values.items():
        if not isinstance(value, PackedTensor):
            leaf = isinstance(value, torch.nn.Parameter)
            setattr(module, name, value if leaf else torch.nn.Parameter(value, requires_grad=False))


def _peer(shape: Shape, implementation: str, module: Any) -> Contender:
    def call(batch: Batch) -> Tensor:
        return module(batch.x, batch.topk_ids, batch.topk_weights)

    def refusal(tokens: int, backward: bool) -> str:
        return _refusal(implementation, shape, next(module.parameters()).device.type, tokens, backward)

    return Contender(PREFIX + implementation, False, call, refusal=refusal)


def _refusal(implementation: str, shape: Shape, device: str, tokens: int, backward: bool) -> str:
    """What would fill the memory or take minutes a call."""
    slots = tokens * shape.top_k
    if implementation == "batched_mm":  # for backward it holds the gathered weights and their gradients
        gathered = 2 * slots * shape.expert_weights * (2 if backward else 1)
        return _beyond("it gathers the weights of every slot", gathered, BATCHED_LIMIT.get(device))
    if implementation == "eager" and backward:
        written = 2 * min(shape.experts, slots) * shape.experts * shape.expert_weights
        return _beyond("backward, it writes a whole stack for each expert", written, EAGER_LIMIT.get(device))
    return ""


def _beyond(what: str, size: int, limit: int | None) -> str:
    if limit is None or size <= limit:
        return ""
    return f"{what}: up to {size / GIB:.1f} GiB, limit {limit / GIB:.0f}"
