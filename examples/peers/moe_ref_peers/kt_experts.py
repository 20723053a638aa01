"""kt-kernel's experts in bf16 on a CPU, through its extension: for inference alone.

Its class `KTMoEWrapper` wants an accelerator beside the CPU (its memory is pinned), so this calls what it calls.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from kt_kernel import kt_kernel_ext

from executors import Capabilities
from moe_ref_peers._peer import Peer, plain_swiglu

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights

LOCK = Lock()


@dataclass(frozen=True)
class KT(Peer):
    """``kt_kernel``: loads the weights anew for each call."""

    name: ClassVar[str] = "kt_kernel"

    @property
    def capabilities(self) -> Capabilities:
        """bf16, without gradients, in whole blocks of 32; ids below 0 are empty slots."""
        return plain_swiglu(
            devices=frozenset({"cpu"}),
            dtypes=frozenset({"bfloat16"}),
            backward=False,
            empty_batch=False,
            align_hidden=32,
            align_intermediate=32,
            topk_weights_dtypes=frozenset({"float32"}),
        )

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, layer: MoEWeights) -> Tensor:
        """y [T, H]."""
        with LOCK:  # its queue is one for all
            return self._compute(x, ids, weights, layer)

    def _compute(self, x: Tensor, ids: Tensor, weights: Tensor, layer: MoEWeights) -> Tensor:
        experts, hidden, inner = layer.down_proj.shape
        gate, up = (half.contiguous() for half in layer.gate_up_proj.chunk(2, dim=1))
        stacks = {"gate": gate, "up": up, "down": layer.down_proj.contiguous()}
        on_gpu, order = torch.zeros(experts, dtype=torch.bool, device=x.device), torch.arange(experts, device=x.device)
        config = kt_kernel_ext.moe.MOEConfig(experts, ids.shape[1], hidden, inner, on_gpu.data_ptr())
        config.pool, config.max_len = _cpu().backend_, max(len(x), 1)
        for name, stack in stacks.items():
            setattr(config, f"{name}_projs", [[expert.data_ptr() for expert in stack]])
            setattr(config, f"{name}_scales", [[0] * experts])
        moe = kt_kernel_ext.moe.AMXBF16_MOE(config)
        _run(moe.load_weights_task(order.data_ptr()))
        x, ids, weights = (tensor.contiguous() for tensor in (x, torch.where(ids < experts, ids, -1), weights))
        tokens, y = torch.tensor([len(x)], dtype=torch.int32, device=x.device), torch.zeros_like(x)
        pointers = (tensor.data_ptr() for tensor in (ids, weights, x, y))
        _run(moe.forward_task(tokens.data_ptr(), ids.shape[1], *pointers, False))
        return y


def _cpu() -> Any:
    """The pool of this process; its threads do not survive a fork, and a call would hang."""
    owner, cpu = _pool()
    if owner != os.getpid():
        raise RuntimeError("kt_kernel was called before a fork: must be called in a process that is spawned")
    return cpu


@cache
def _pool() -> tuple[int, Any]:
    """The process, and its one pool of one thread."""
    pool = kt_kernel_ext.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [1]
    return os.getpid(), kt_kernel_ext.CPUInfer(pool)


def _run(task: Any) -> None:
    _cpu().submit(task)
    _cpu().sync()
