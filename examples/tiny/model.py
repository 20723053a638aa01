"""The gpt-oss architecture in plain torch, small: pre-norm attention with sinks, then a Mixture-of-Experts layer.

Source: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b model card" (arXiv:2508.10925), section 2. Parameters have the names
and shapes that transformers gives them, so that state dicts go either way; experts are stored as (E, H, 2I) and
(E, I, H).

The layer's arithmetic is not here. `MoE` makes a `moe_ref.MoEWeights`, a view of its own parameters, and hands it to
whatever computes experts: with ``compute=executors.get("native")`` this is all that a model needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ref.types import MoEConfig, MoEWeights

Compute = Callable[[Tensor, Tensor, MoEWeights], Tensor]  # (x, router_logits, weights) -> y: an executor, or like one


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; by default those of the bundled one (data/README.md)."""

    vocabulary: int = 256
    layers: int = 3
    hidden: int = 160
    intermediate: int = 128
    experts: int = 32
    heads: int = 5
    key_value_heads: int = 1
    head_dim: int = 32
    window: int = 128  # of the even layers, which see only that many bytes back; the odd ones see all
    rope_base: float = 10000.0
    layer: MoEConfig = MoEConfig(  # noqa: RUF009  (frozen)
        top_k=4, scoring="topk_softmax", alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved"
    )


class Attention(nn.Module):
    """Causal attention with grouped keys, rotary positions, and a learned sink that takes probability from the past."""

    def __init__(self, shape: Shape, window: int | None) -> None:
        super().__init__()
        self.window, self.head_dim, self.rope_base = window, shape.head_dim, shape.rope_base
        queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, queries)
        self.k_proj = nn.Linear(shape.hidden, keys)
        self.v_proj = nn.Linear(shape.hidden, keys)
        self.o_proj = nn.Linear(queries, shape.hidden)
        self.sinks = nn.Parameter(torch.zeros(shape.heads))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] from x [B, T, H]."""
        batch, tokens, _ = x.shape
        q, k, v = (
            project(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # [B, heads, T, head_dim]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        turns = rotations(tokens, self.head_dim, self.rope_base, x)
        scores = rotated(q, turns) @ rotated(k, turns).mT / self.head_dim**0.5
        scores = scores.masked_fill(~visible(tokens, self.window, x.device), -torch.inf)
        sinks = self.sinks.view(1, -1, 1, 1).expand(batch, -1, tokens, 1)
        shares = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
        seen = (shares @ v).transpose(1, 2).flatten(2)
        return self.o_proj(seen)


class Experts(nn.Module):
    """The parameters of a layer's experts, as gpt-oss stores them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        experts, hidden, inner = shape.experts, shape.hidden, shape.intermediate
        self.config = shape.layer
        self.gate_up_proj = nn.Parameter(torch.randn(experts, hidden, 2 * inner) / hidden**0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * inner))
        self.down_proj = nn.Parameter(torch.randn(experts, inner, hidden) / inner**0.5)
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))

    def weights(self) -> MoEWeights:
        """A view for an executor: nothing is copied, and gradients go to the parameters."""
        return MoEWeights(
            self.gate_up_proj.transpose(1, 2),
            self.down_proj.transpose(1, 2),
            self.gate_up_proj_bias,
            self.down_proj_bias,
            config=self.config,
        )


class MoE(nn.Module):
    """Router and experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.router = nn.Linear(shape.hidden, shape.experts)
        self.experts = Experts(shape)

    def forward(self, x: Tensor, compute: Compute) -> Tensor:
        """[B, T, H] from x [B, T, H]."""
        return compute(x, self.router(x), self.experts.weights())


class Block(nn.Module):
    """A transformer layer."""

    def __init__(self, shape: Shape, window: int | None) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.self_attn = Attention(shape, window)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.mlp = MoE(shape)

    def forward(self, x: Tensor, compute: Compute) -> Tensor:
        """[B, T, H] from x [B, T, H]."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x), compute)


class Model(nn.Module):
    """The language model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        windows = [shape.window if number % 2 == 0 else None for number in range(shape.layers)]
        self.layers = nn.ModuleList(Block(shape, window) for window in windows)
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor, compute: Compute) -> Tensor:
        """Logits [B, T, vocabulary] from tokens [B, T]."""
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x, compute)
        return self.lm_head(self.norm(x))

    def loss(self, windows: Tensor, compute: Compute) -> Tensor:
        """Mean cross entropy, in nats per byte, of every byte but the first in windows [B, T + 1]."""
        logits = self(windows[:, :-1], compute)
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def visible(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """[T, T], whether a token (row) sees another (column): itself and those before it, ``window`` at the most."""
    back = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return (back >= 0) & (back < (window or tokens))


def rotations(tokens: int, head_dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, head_dim / 2] of the angle by which each pair of features turns at each place."""
    exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float64) / head_dim
    angles = torch.arange(tokens, device=like.device, dtype=torch.float64)[:, None] * base**-exponents
    return angles.cos().to(like), angles.sin().to(like)


def rotated(values: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Feature i and feature i + head_dim / 2 are a pair (Su et al. 2021, arXiv:2104.09864, with the halves apart)."""
    (cosines, sines), half = turns, values.shape[-1] // 2
    real, imaginary = values[..., :half], values[..., half:]
    return torch.cat([real * cosines - imaginary * sines, imaginary * cosines + real * sines], dim=-1)
