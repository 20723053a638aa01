"""Layers for the tests of executors.nn: dense, in each kind of 4 bits, and one projection of each kind."""

from dataclasses import replace

import torch

from executors import mxfp4, nf4
from moe_ref import ExpertLoRA, MoEConfig, MoEWeights

EXPERTS, HIDDEN, INNER, TOKENS = 5, 32, 32, 9
KINDS = ("dense", "nf4", "mxfp4", "mixed")


def layer(kind: str, seed: int = 0, **more: object) -> MoEWeights:
    """A layer with all that one may have; of "mixed", gate_up_proj is in NF4 and down_proj dense."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(EXPERTS, *shape, generator=draw) / 4

    up, down = normal(2 * INNER, HIDDEN), normal(HIDDEN, INNER)
    lora = ExpertLoRA(normal(2, HIDDEN), normal(2 * INNER, 2), normal(3, INNER), normal(HIDDEN, 3), 2.0, 0.5)
    biases = normal(2 * INNER), normal(HIDDEN), 7 + normal() / 16
    config = MoEConfig(2, scoring="sigmoid", renormalize=True)
    learned = {"expert_scale": 1 + normal(), "post_expert_norm": 1 + torch.randn(HIDDEN, generator=draw) / 4}
    dense = replace(MoEWeights(up, down, *biases, lora, config=config, **learned), **more)
    if kind == "mixed":
        return replace(dense, gate_up_proj=nf4.quantize_tensor(up, nested=True))
    if kind == "dense":
        return dense
    return nf4.quantize(dense, nested=True) if kind == "nf4" else mxfp4.quantize(dense)


def inputs(
    tokens: int = TOKENS, dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HIDDEN, generator=draw).to(dtype), torch.randn(tokens, EXPERTS, generator=draw)


def slots() -> dict[str, torch.Tensor]:
    ids = torch.arange(2 * TOKENS).view(TOKENS, 2) % EXPERTS
    return {"topk_ids": ids, "topk_weights": torch.full((TOKENS, 2), 0.5)}
