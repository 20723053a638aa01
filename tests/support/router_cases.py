"""Routers of transformers in a small block, with logits that are chosen: what a rule is compared on.

A block is made without memory (torch's "meta" device) from a small configuration of its family. Its router gets memory
and random numbers. Everything else in it is replaced: experts by ones, shared experts by zeros, other modules by
nothing. So a router is called as its own block calls it.
"""

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import SqrtSoftplusActivation

from router_walk import Place

E, K, H = 16, 4, 16
SIZES = {  # by the names that configurations have for them
    "hidden_size": H,
    "n_shared_experts": 1,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), K),
}
COMMON = {"hidden_size": H, "num_experts_per_tok": K}
EXCEPTIONS: dict[str, dict[str, Any]] = {  # arguments of configurations that are not made so
    "Dots3NoteVisionConfig": COMMON | {"pyramid_num_routed": [E] * 42, "num_attention_heads": 1, "adapter_in_dim": H},
    "Qwen3OmniMoeTalkerTextConfig": COMMON | {"num_experts": E, "shared_expert_intermediate_size": 8},
}
ALONE = ("DiffusionGemmaEncoderTextLayer", "Gemma4TextDecoderLayer")  # whole layers: their routers are called alone
ARGUMENTS = {"layer_idx": 5, "intermediate_size": 8}  # of blocks, beside the configuration
OPTIONS: dict[
    str, tuple[dict[str, Any], ...]
] = {  # of routers that have the attribute: its settings, a usual one first
    "norm_topk_prob": ({"norm_topk_prob": True}, {"norm_topk_prob": False}),
    "routed_scaling_factor": ({"routed_scaling_factor": 1.0}, {"routed_scaling_factor": 2.5}),
    "router_scaling_factor": ({"router_scaling_factor": 1.0}, {"router_scaling_factor": 2.826}),
    "route_scale": ({"route_scale": 1.0}, {"route_scale": 0.375}),
    "num_group": tuple({"num_group": g, "topk_group": k} for g, k in ((4, 2), (1, 1), (2, 1), (8, 3), (4, 4))),
    "topk_method": (
        {"topk_method": "group_limited_greedy"},
        {"topk_method": "greedy"},
    ),
    "expert_selection_fn": (
        {"expert_selection_fn": "softmax"},
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": True},
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
    ),
    "use_expert_bias": ({"use_expert_bias": True}, {"use_expert_bias": False}),
    "score_fn": tuple({"score_fn": score()} for score in (SqrtSoftplusActivation, nn.Sigmoid, nn.Sigmoid, nn.Sigmoid)),
    "norm_min": tuple({"norm_min": least} for least in (1e-12, 0.5, 1e-3)),
    "per_expert_scale": tuple({"config": SimpleNamespace(top_k_experts=k)} for k in (K, 1, 2)),
    "router_logit_softcapping": ({"router_logit_softcapping": 0.0}, {"router_logit_softcapping": 5.0}),
    "output_multiplier": ({"output_multiplier": 1.0}, {"output_multiplier": 0.5}),
    "top_k": ({"top_k": K}, {"top_k": 1}, {"top_k": 2}),
}
BIASES = ("small", "negative", "none", "steps")


@dataclass(frozen=True, eq=False)
class Routed:
    """What a router returned, in float64 NumPy, and what its block made of experts that return ones."""

    logits: np.ndarray  # [T, E]
    ids: np.ndarray  # [T, K]
    weights: np.ndarray  # [T, K]
    output: float | None  # None where there is no block


@dataclass(frozen=True, eq=False)
class Case:
    """A block with its router, one setting of its options, and one kind of selection bias. Used before the next one."""

    block: nn.Module
    router: nn.Module
    name: str

    def run(self) -> Iterator[Routed]:
        """The router on random tokens, and on tokens of which the logits are chosen."""
        rng = np.random.default_rng(0)
        yield self._run(_normal(rng, E, H) / 4, _normal(rng, 48, H))
        yield self._run(torch.eye(E), torch.from_numpy(chosen_logits(rng)))

    def _run(self, matrix: Tensor, x: Tensor) -> Routed:
        returned: list[tuple[Tensor, ...]] = []
        hook = self.router.register_forward_hook(lambda _, __, result: returned.append(result))
        for name, parameter in self.router.named_parameters():
            if parameter.shape == matrix.shape:
                parameter.data.copy_(matrix)
            elif name == "bias":  # of the logits
                parameter.data.copy_(0.25 * torch.arange(E) * (matrix[0, 1] != 0))
        with torch.no_grad():
            output = self.block(x.float()[None])
        hook.remove()
        output = output[0] if isinstance(output, tuple) else output
        return routed(returned[0], float(output.flatten()[0]) if self.block is not self.router else None)


class Ones(nn.Module):
    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return torch.ones_like(x)


class Zeros(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def routed(returned: tuple[Tensor, ...], output: float | None) -> Routed:
    """Finds logits, ids and weights, which every router returns in an order of its own: by dtype and shape."""
    if len(returned) == 2:  # scores [T, E], with 0 for what is not chosen, and logits
        scores, logits = (tensor.double().numpy() for tensor in returned)
        count = int((scores[0] > 0).sum())
        chosen = np.argsort(-scores, axis=1)[:, :count]
        assert (np.sort(scores, axis=1)[:, :-count] == 0).all()
        return Routed(logits, chosen, np.take_along_axis(scores, chosen, axis=1), None)
    returned = tuple(tensor.flatten(0, -2) for tensor in returned)  # some keep the dimensions of their input
    (ids,) = [tensor for tensor in returned if not tensor.is_floating_point()]
    (weights,) = [tensor for tensor in returned if tensor.is_floating_point() and tensor.shape == ids.shape]
    (logits,) = [tensor for tensor in returned if tensor.is_floating_point() and tensor.shape == (len(ids), E)]
    return Routed(logits.double().numpy(), ids.numpy(), weights.double().numpy(), output)


def chosen_logits(rng: np.random.Generator) -> np.ndarray:
    """[T, E] usual, large, tiny; ties and near ties; sums around the epsilons 1e-20 and 1e-6; softmax that underflows.

    Sums of sigmoids come near 1e-20 at -46, sums of sqrt(softplus) at -83.

    None lies so low that a sigmoid in fp32 is subnormal, which costs it its precision.
    """
    spike = np.zeros((8, E))
    spike[np.arange(8), rng.integers(0, E, 8)] = 100
    rows = [
        3 * _normal(rng, 24, E).numpy(),
        rng.uniform(-80, 80, (16, E)),
        1e-4 * _normal(rng, 8, E).numpy(),
        rng.choice([-1.0, 0.0, 0.5, 1.0], (16, E)),
        np.zeros((1, E)),
        1 + rng.integers(0, 4, (8, E)) * 2.0**-23,
        -83 + _normal(rng, 12, E).numpy() / 2,
        -46 + _normal(rng, 12, E).numpy(),
        -34 + _normal(rng, 8, E).numpy(),
        -14 + _normal(rng, 12, E).numpy(),
        spike,
        spike + rng.uniform(0, 100, spike.shape),
    ]
    return np.concatenate(rows).astype(np.float32)


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def cases(place: Place) -> Iterator[Case]:
    """A case for each setting of each option, and one for each kind of bias."""
    block, router = made(place)
    if hasattr(block, "routed_scaling_factor") and not hasattr(router, "routed_scaling_factor"):
        block.routed_scaling_factor = 1.75
    has = [options for name, options in OPTIONS.items() if hasattr(router, name)]
    usual = {key: value for options in has for key, value in options[0].items()}
    settings = [usual | option for options in has for option in options[1:]] + [usual] * len(BIASES)
    for number, setting in enumerate(settings):
        for name, value in setting.items():
            setattr(router, name, value)
        kind = BIASES[number % len(BIASES)]
        has_bias = fill([block, router], kind, seed=number)
        yield Case(block, router, f"{place.router} with {setting}" + (f", selection bias: {kind}" if has_bias else ""))


def fill(holders: list[nn.Module], kind: str, seed: int) -> bool:
    """Puts a selection bias where the block or the router has one; whether there is one. So with scales of experts."""
    rng = np.random.default_rng(seed)
    values = {
        "small": 0.1 * rng.standard_normal(E),
        "negative": rng.uniform(-2.0, -0.1, E),
        "none": np.zeros(E),
        "steps": rng.choice([-0.25, 0.0, 0.25], E),
    }[kind]
    state = [item for holder in holders for item in (*holder.named_parameters(), *holder.named_buffers())]
    biases = [tensor for name, tensor in state if name.split(".")[-1] in ("e_score_correction_bias", "expert_bias")]
    scales = [tensor for name, tensor in state if name.split(".")[-1] == "per_expert_scale"]
    for tensor in biases:
        tensor.data.copy_(torch.from_numpy(values))
    for tensor in scales:
        tensor.data.copy_(torch.from_numpy(rng.uniform(-1.0, 2.0, E)))
    return bool(biases)


def made(place: Place) -> tuple[nn.Module, nn.Module]:
    """The block, and the router in it; the router twice where no block uses it, or one of `ALONE`.

    A router that norms its input gets no norm, and a scale that undoes its factor: the product is its logits.
    """
    alone = not place.block or place.block in ALONE
    with torch.device("meta"):
        block = _constructed(place.get(place.router if alone else place.block), place.family)
    router = block if alone else getattr(block, place.attribute)
    router.to_empty(device="cpu")
    for name, child in () if alone else block.named_children():
        if child is not router:
            setattr(block, name, Ones() if name == "experts" else Zeros() if "shared" in name else nn.Identity())
    block.to_empty(device="cpu", recurse=False)
    if hasattr(router, "scalar_root_size"):
        router.norm = nn.Identity()
        router.scale.data.fill_(1 / router.scalar_root_size)
    return block.eval(), router.eval()


def _constructed(kind: type, family: str) -> Any:
    """The module from the first configuration of its family that it accepts."""
    names = inspect.signature(kind.__init__).parameters
    arguments = {name: value for name, value in ARGUMENTS.items() if name in names}
    refusals = []
    for config in small_configs(family):
        try:
            return kind(config, **arguments)
        except (AttributeError, TypeError, KeyError) as refusal:
            refusals.append(f"{type(config).__name__}: {refusal}")
    raise AssertionError(f"{kind.__name__}: can be made from none of {refusals}")


@cache
def small_configs(family: str) -> tuple[PreTrainedConfig, ...]:
    """The family's configurations with small sizes, those of parts before those of the whole."""
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    kinds = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
    configs = [_small(kind) for kind in kinds if issubclass(kind, PreTrainedConfig)]
    return tuple(sorted(configs, key=lambda config: len(config.sub_configs)))


def _small(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    if kind.__name__ in EXCEPTIONS:
        return kind(**EXCEPTIONS[kind.__name__])
    config = kind()
    for name, size in SIZES.items():
        if hasattr(config, name):
            setattr(config, name, size)
    return config
