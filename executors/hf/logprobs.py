"""Log-probabilities of labels from hidden states, without the logits of the whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from executors._base.transforms import are_active
from moe_ref.validation.arrays import check_finite, short

IGNORED = -100  # the label of tokens that do not count, as torch's losses have it


class _Rule(NamedTuple):
    """From what the head gives to the logits: softcap * tanh(scale * z / softcap) / temperature."""

    scale: float
    softcap: float | None
    temperature: float

    def logits(self, z: Tensor) -> Tensor:
        z = z * self.scale
        if self.softcap is not None:
            z = torch.tanh(z / self.softcap) * self.softcap
        return z / self.temperature

    def back(self, d_logits: Tensor, logits: Tensor) -> Tensor:
        """dz, from the gradient of the logits and their values."""
        dz = d_logits * (self.scale / self.temperature)
        if self.softcap is not None:
            dz = dz * (1 - (logits * (self.temperature / self.softcap)).square())
        return dz


def chunked_logprobs(
    hidden: Tensor,
    head: Tensor | nn.Linear,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int = 4096,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log softmax(logits)[label] of each token, for losses as those of GRPO; forward and backward in chunks.

    The logits are ``hidden W^T + bias``, times ``scale``, then ``softcap * tanh(. / softcap)``, then divided by
    ``temperature``. No more of them than [tokens, chunk] are there at a time: the backward pass makes them anew. As in
    plain torch, products are in the dtype of ``hidden`` (under autocast, in autocast's), and what follows is in at
    least fp32. Labels are the token that each hidden state is to predict: shift them before.

    Args:
        hidden: [..., H], what the head gets.
        head: [V, H], the head's weight; or the ``torch.nn.Linear`` itself.
        labels: [...], int64: in [0, V), or -100 for tokens that do not count.
        bias: [V], the bias of a weight that is given alone.
        chunk: how much of the vocabulary is there at a time, at least 1.
        scale: multiplies what the head gives (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: of the logits (Gemma's final_logit_softcapping); None is none.
        temperature: divides the logits.

    Returns:
        [...] in fp32, or in fp64 if that is hidden's dtype; 0 where the label is -100. It has gradients for hidden, the
        weight and the bias; what is frozen costs nothing.

    Raises:
        TypeError, ValueError: in one line, with the argument, its value and what is allowed. Labels out of range are
            refused too, which waits for the device.
        RuntimeError: under a transform of torch.func, or in forward mode; in a graph of torch.compile for labels out of
            range, when it runs.
    """
    if are_active():
        raise RuntimeError("chunked_logprobs: torch.func and forward mode are not supported; use torch.autograd.grad")
    weight, bias = _head(head, bias)
    _check(hidden, weight, bias, labels)
    if not isinstance(chunk, int) or isinstance(chunk, bool):
        raise TypeError(f"chunk={short(chunk)}: must be an int")
    numbers = {"chunk": chunk, "scale": scale, "temperature": temperature}
    for name, value in (numbers if softcap is None else numbers | {"softcap": softcap}).items():
        check_finite(name, value)  # a tensor would get no gradient
        if name != "scale" and value <= 0:
            raise ValueError(f"{name}={value!r}: must be positive")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        hidden, weight = hidden.to(torch.get_autocast_dtype(kind)), weight.to(torch.get_autocast_dtype(kind))
    elif hidden.dtype != weight.dtype:
        raise TypeError(f"hidden.dtype={hidden.dtype}: must be {weight.dtype}, the head's")
    rows, rule = hidden.reshape(-1, hidden.shape[-1]), _Rule(scale, softcap, temperature)
    with torch.autocast(kind, enabled=False):
        found: Tensor = _LogProbs.apply(  # type: ignore[no-untyped-call]
            rows, weight, bias, labels.reshape(-1), chunk, rule
        )
    return found.reshape(labels.shape)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int, rule: _Rule
    ) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.full(labels.shape, -torch.inf, dtype=wide, device=rows.device)
        chosen = torch.zeros_like(total)
        for start, logits in _chunks(rows, weight, bias, chunk, rule):
            total = torch.logaddexp(total, logits.logsumexp(1))
            chosen += torch.where(_hits(labels, start, logits), logits, 0).sum(1)
        ctx.save_for_backward(rows, weight, bias, labels, total)
        ctx.chunk, ctx.rule = chunk, rule
        return torch.where(labels == IGNORED, 0, chosen - total)

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "chunked_logprobs: double backward is not supported; differentiate with create_graph=False"
            )
        with torch.autocast(d_found.device.type, enabled=False):  # the logits are those of the forward pass
            return _gradients(ctx, d_found)


def _gradients(ctx: Any, d_found: Tensor) -> tuple[Any, ...]:
    rows, weight, bias, labels, total = ctx.saved_tensors
    needs_rows, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    d_found = torch.where(labels == IGNORED, 0, d_found)[:, None]
    d_rows = torch.zeros(rows.shape, dtype=total.dtype, device=rows.device) if needs_rows else None
    d_weight = torch.empty_like(weight) if needs_weight else None
    d_bias = torch.empty_like(bias) if needs_bias else None
    for start, logits in _chunks(rows, weight, bias, ctx.chunk, ctx.rule):
        part = slice(start, start + logits.shape[1])
        d_logits = (_hits(labels, start, logits).to(total.dtype) - torch.exp(logits - total[:, None])) * d_found
        dz = ctx.rule.back(d_logits, logits).to(rows.dtype)
        if d_rows is not None:
            d_rows += dz @ weight[part]
        if d_weight is not None:
            d_weight[part] = dz.T @ rows
        if d_bias is not None:
            d_bias[part] = dz.sum(0, dtype=total.dtype)
    return None if d_rows is None else d_rows.to(rows.dtype), d_weight, d_bias, None, None, None


def _chunks(rows: Tensor, weight: Tensor, bias: Tensor | None, chunk: int, rule: _Rule) -> Iterator[tuple[int, Tensor]]:
    """The first token of each part of the vocabulary, and its logits [n, up to chunk]."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    for start in range(0, weight.shape[0], chunk):
        part = slice(start, start + chunk)
        own = None if bias is None else bias[part].to(rows.dtype)
        yield start, rule.logits(nn.functional.linear(rows, weight[part], own).to(wide))


def _hits(labels: Tensor, start: int, logits: Tensor) -> Tensor:
    """[n, chunk] Where the label is, in a part of the vocabulary."""
    return labels[:, None] == torch.arange(start, start + logits.shape[1], device=labels.device)


def _head(head: object, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if isinstance(head, Tensor):
        return head, bias
    if type(head) is not nn.Linear:
        raise TypeError(f"head is a {type(head).__name__}: must be a tensor [V, H] or a torch.nn.Linear, and no other")
    if bias is not None:
        raise ValueError("bias: must be None with a torch.nn.Linear, which has its own")
    return head.weight, head.bias


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    for name, value in (("hidden", hidden), ("labels", labels), ("bias", bias)):
        if not isinstance(value, Tensor) and not (value is None and name == "bias"):
            raise TypeError(f"{name}={short(value)}: must be a torch.Tensor")
    for name, value in (("head", weight), ("labels", labels), ("bias", bias)):
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name}.device={value.device}: must be {hidden.device}, hidden's")
    if weight.ndim != 2 or not weight.shape[0]:
        raise ValueError(f"head.shape={tuple(weight.shape)}: must be (V, H), V at least 1")
    vocabulary, width = weight.shape
    if not hidden.ndim or hidden.shape[-1] != width:
        raise ValueError(f"hidden.shape={tuple(hidden.shape)}: must be (..., {width}), as the head's columns")
    if bias is not None and tuple(bias.shape) != (vocabulary,):
        raise ValueError(f"bias.shape={tuple(bias.shape)}: must be ({vocabulary},), as the head's rows")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels.shape={tuple(labels.shape)}: must be {tuple(hidden.shape[:-1])}, hidden's but for H")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels.dtype={labels.dtype}: must be torch.int64")
    wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= vocabulary)
    allowed = f"must be in [0, {vocabulary}) or {IGNORED}"
    if torch.compiler.is_compiling():  # a graph cannot read a value: it is checked when the graph runs
        torch._assert_async(~wrong.any(), f"labels: {allowed}")
    elif wrong.any():
        raise ValueError(f"labels has {int(labels[wrong][0])}: {allowed}")
