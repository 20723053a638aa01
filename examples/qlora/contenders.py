"""Three ways to compute the same adapted experts in 4 bits, as experts functions of transformers.

``loop``: one expert after the other is decoded by bitsandbytes, multiplied, and its adapter added: what people run. As
in bitsandbytes' own product (``MatMul4Bit``) the backward pass decodes again and nothing decoded is kept.
``stack``: transformers' grouped_mm on bitsandbytes' parametrization, which decodes the whole stack; PEFT's way to adapt
a stack adds B A to it. An executor of this project reads the 4 bits as they are and keeps adapters apart.

All of them read the same bytes and the same adapters, and autograd is left to do what it does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from executors import hf
from executors._bench.peers.bitsandbytes import own_bytes
from executors._bench.peers.loops import Decode, Expert, FourBitLinear, loop
from executors._bench.quantised import quant_state
from executors._bench.routing import Batch
from executors.hf.adapters import PREFIX, lora_of
from moe_ref.types import ExpertLoRA, MoEWeights, NF4Tensor

LOOP, STACK = "loop", "stack"
PEERS = (LOOP, STACK)
_decoders: WeakKeyDictionary[nn.Module, tuple[list[Decode], list[Decode]]] = WeakKeyDictionary()


def switch(model: Any, name: str) -> None:
    """Runs the experts of an adapted model on a peer, or on an executor.

    Args:
        model: whose experts `executors.hf.quantize_experts` packed, with adapters.
        name: of `PEERS`, or of an executor.
    """
    if name not in PEERS:
        hf.use(model, name)
        return
    hf.use(model, "auto")  # adapters go to the experts function, and not around it
    ALL_EXPERTS_FUNCTIONS.register(PREFIX + name, {LOOP: _loop, STACK: _stack}[name])
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = PREFIX + name


def _loop(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapters: Any = ()
) -> Tensor:
    weights = hf.weights_of(module)
    lora = lora_of(adapters) or ExpertLoRA()
    if module not in _decoders:
        _decoders[module] = _decoders_of(weights.gate_up_proj), _decoders_of(weights.down_proj)
    up, down = _decoders[module]
    up_bias, down_bias = _parts(weights.gate_up_proj_bias), _parts(weights.down_proj_bias)
    up_a, up_b = _parts(lora.gate_up_lora_a), _parts(lora.gate_up_lora_b)
    down_a, down_b = _parts(lora.down_lora_a), _parts(lora.down_lora_b)
    experts: list[Expert] = [
        (
            _Linear(up[e], up_bias[e], up_a[e], up_b[e], lora.gate_up_scaling),
            _Linear(down[e], down_bias[e], down_a[e], down_b[e], lora.down_scaling),
        )
        for e in range(weights.num_experts)
    ]
    given = Batch(hidden_states, hidden_states, top_k_index, top_k_weights, top_k_index[:0])
    return loop(given, experts, weights.config)


class _Linear(FourBitLinear):
    def product(self, rows: Tensor) -> Tensor:
        product: Tensor = _DecodedTwice.apply(rows, self.bias, self.decode)  # type: ignore[no-untyped-call]
        return product


class _DecodedTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor | None, decode: Decode) -> Tensor:
        ctx.decode = decode
        return F.linear(rows, decode(), bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        return d_out @ ctx.decode(), None, None


def _parts(stack: Tensor | None) -> Any:
    """A view for each expert, or None for each."""
    return _Nothing() if stack is None else stack.unbind()


class _Nothing:
    def __getitem__(self, expert: int) -> None:
        return None


def _decoders_of(stack: Any) -> list[Decode]:
    assert isinstance(stack, NF4Tensor)
    stored = replace(stack, shape=stack.stored_shape, transposed=False)
    return [_decoder(packed, state, stack.transposed) for packed, state in own_bytes(stored)]


def _decoder(packed: Tensor, state: Any, transposed: bool) -> Decode:
    """Gives a decoded matrix or stack, as it is read.

    bitsandbytes 0.50 decodes on a CPU wrongly where a row is no multiple of a block (docs/known-differences.md). So it
    decodes rows of one block here, which are the same bytes.
    """
    shape = state.shape
    state.shape = torch.Size([shape.numel() // state.blocksize, state.blocksize])

    def decode() -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        value = dequantize_4bit(packed, state).view(shape)
        return value.mT if transposed else value

    return decode


def _stack(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapters: Any = ()
) -> Tensor:
    adapted: Any = _Adapted(module, hf.weights_of(module), lora_of(adapters) or ExpertLoRA())
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](adapted, hidden_states, top_k_index, top_k_weights)


class _Adapted:
    """An experts module whose projections are decoded stacks, with adapters added to them."""

    def __init__(self, module: Any, weights: MoEWeights, lora: ExpertLoRA) -> None:
        self._module = module
        swap = module.is_transposed
        self.gate_up_proj = _added(
            _decoded(weights.gate_up_proj), lora.gate_up_lora_a, lora.gate_up_lora_b, lora.gate_up_scaling, swap
        )
        self.down_proj = _added(
            _decoded(weights.down_proj), lora.down_lora_a, lora.down_lora_b, lora.down_scaling, swap
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _decoded(stack: Any) -> Tensor:
    """The whole stack as it is stored, as bitsandbytes' parametrization decodes it at every access."""
    assert isinstance(stack, NF4Tensor)
    stored = replace(stack, shape=stack.stored_shape, transposed=False)
    return _decoder(stored.packed[:, None], quant_state(stored), False)()


def _added(stack: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, transposed: bool) -> Tensor:
    if a is None or b is None:
        return stack
    delta = scaling * torch.bmm(b, a)  # [E, m, k]
    return stack + (delta.mT if transposed else delta).to(stack.dtype)
