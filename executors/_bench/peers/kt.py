"""kt-kernel's experts in bf16 on a CPU (KTransformers), through its compiled classes: a peer where it is installed.

It has swiglu without clamp and biases, on dense stacks that it lays out anew, so it holds the layer a second time; and
no gradients. Routing is outside. Its kernels come in variants for instruction sets; its own module ``_cpu_detect``
chooses and loads one. The package itself is not imported, as that needs more than kernels do.

Beside its workers one more thread is busy: it waits for them without sleeping. On a machine whose cores are all
workers it takes their time; so there are two contenders, with as many workers as torch has threads and with one fewer.
After a call its threads stay busy for 50 ms, which the benchmark waits for. Signatures as seen in 0.7.2.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from executors._bench.contenders import Contender
from executors._bench.layers import BenchLayer
from executors._bench.routing import Batch
from executors._compare.report import version_of

NAME = "kt-kernel"
DISTRIBUTION, PACKAGE, LOADER = "kt-kernel", "kt_kernel", "_cpu_detect.py"
CLASSES = ("AMXBF16_MOE", "AVX2BF16_MOE")  # the first that a variant has, as its own wrapper chooses
MULTIPLE = 32  # of H, and of a NUMA node's part of I: with 16 the AMX variant reads beyond its arrays
LONGEST = 4096  # tokens that its buffers are made for
REST_S = 0.06  # from a call until its threads sleep, and 10 ms more
STDOUT = 1


def kt_version() -> str | None:
    """The version of kt-kernel, or None where it is not installed."""
    return version_of(DISTRIBUTION) if find_spec(PACKAGE) else None


def kt_variant() -> str | None:
    """The instruction set that its kernels were compiled for, such as "amx"; None where it cannot be had."""
    try:
        return str(library().__cpu_variant__) if kt_version() else None
    except (ImportError, OSError, AttributeError):
        return None


def kt_peers(layer: BenchLayer) -> list[Contender]:
    """kt-kernel on this layer, usable or with the reason why not; on a GPU it does not take part."""
    if layer.weights().gate_up_proj.device.type != "cpu":
        return []
    if reason := refusal(layer):
        return [Contender(NAME, False, reason=reason)]
    try:
        compiled = library()
    except (ImportError, OSError, AttributeError) as error:
        return [Contender(NAME, False, reason=f"cannot be loaded: {' '.join(str(error).split())}")]
    return [peer(layer, compiled, workers) for workers in worker_counts(torch.get_num_threads())]


def refusal(layer: BenchLayer) -> str:
    """Why it cannot compute this layer, or ""."""
    config, shape = layer.shape.config, layer.shape
    if kt_version() is None:
        return f"{DISTRIBUTION} is not installed"
    if config.activation != "swiglu" or config.limit is not None or config.up_offset or config.alpha != 1.0:
        return "it has swiglu only, in bf16 without clamp and offset"
    if config.gate_up_layout != "concatenated" or config.scale_input:
        return "it has gate and up apart from each other only, and weights on outputs"
    if shape.biases or shape.transposed:
        return "it has no biases, and rows of H numbers only"
    if shape.hidden % MULTIPLE or shape.intermediate % MULTIPLE:
        return f"H={shape.hidden}, I={shape.intermediate}: it has multiples of {MULTIPLE} only"
    return ""


def worker_counts(threads: int) -> list[int]:
    """As many workers as torch has threads, and one fewer: a core is left for the thread that waits."""
    return list(dict.fromkeys((threads, max(threads - 1, 1))))


def peer(layer: BenchLayer, compiled: Any, workers: int) -> Contender:
    """The contender around its classes."""
    own = KTLayer(layer, compiled, workers)
    name = NAME if workers == torch.get_num_threads() else f"{NAME}[{workers}]"
    return Contender(name, False, own, backward=False, refusal=_too_long, settle=own.settle)


def _too_long(tokens: int, backward: bool) -> str:
    return f"its buffers are made for {LONGEST} tokens here" if tokens > LONGEST else ""


class KTLayer:
    """A layer in its own order, which is made at the first call."""

    def __init__(self, layer: BenchLayer, compiled: Any, workers: int) -> None:
        self.layer, self.compiled, self.workers = layer, compiled, workers
        self.nodes = nodes_for(layer.shape.intermediate, workers)
        self.experts: Any = None
        self.is_busy = False

    def __call__(self, batch: Batch) -> Tensor:
        """[T, H] of a batch."""
        if self.experts is None:
            self.experts = self._laid_out()
        x = batch.x.detach().contiguous()
        ids, weights = batch.topk_ids.to(torch.int64).contiguous(), batch.topk_weights.detach().float().contiguous()
        y, tokens = torch.empty_like(x), torch.tensor([x.shape[0]], dtype=torch.int32)
        arrays = [array.data_ptr() for array in (ids, weights, x, y)]
        self._run(self.experts.forward_task(tokens.data_ptr(), ids.shape[1], *arrays, False))
        self.is_busy = True
        return y

    def settle(self) -> None:
        """Waits until its threads sleep, if it was called."""
        if self.is_busy:
            time.sleep(REST_S)
        self.is_busy = False

    def _run(self, task: Any) -> None:
        pool = worker_pool(self.compiled, self.workers, self.nodes)
        pool.submit(task)
        pool.sync()

    def _laid_out(self) -> Any:
        shape, parameters = self.layer.shape, self.layer.parameters
        up, down = parameters["gate_up_proj"].detach(), parameters["down_proj"].detach()
        moe = self.compiled.moe
        config = moe.MOEConfig(shape.experts, shape.top_k, shape.hidden, shape.intermediate)
        config.pool = worker_pool(self.compiled, self.workers, self.nodes).backend_
        config.max_len = LONGEST
        config.gate_projs = [[expert.data_ptr() for expert in up]]
        config.up_projs = [[expert[shape.intermediate :].data_ptr() for expert in up]]
        config.down_projs = [[expert.data_ptr() for expert in down]]
        config.gate_scales = config.up_scales = config.down_scales = [[0] * shape.experts]
        order = torch.arange(shape.experts)
        with silent():
            experts = next(getattr(moe, name) for name in CLASSES if hasattr(moe, name))(config)
            self._run(experts.load_weights_task(order.data_ptr()))
        return experts


@cache
def worker_pool(compiled: Any, workers: int, nodes: int) -> Any:
    """Its threads, divided among NUMA nodes as its own wrapper does."""
    config = compiled.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map = nodes, list(range(nodes))
    config.subpool_thread_count = [workers // nodes + (node < workers % nodes) for node in range(nodes)]
    atexit.register(_end_pools)
    with silent():
        return compiled.CPUInfer(config)


def nodes_for(intermediate: int, workers: int) -> int:
    """As many NUMA nodes as there are, if I can be divided so: each of them computes a part of I."""
    return max(n for n in range(1, min(numa_nodes(), workers) + 1) if intermediate % (n * MULTIPLE) == 0)


def numa_nodes() -> int:
    """Of this machine."""
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))


def _end_pools() -> None:
    with silent():  # it says goodbye
        worker_pool.cache_clear()


@cache
def library() -> Any:
    """Its compiled module, in the variant of what torch uses here.

    Raises:
        ImportError, OSError, AttributeError: it is not of the form that 0.7.2 has, or cannot be loaded.
    """
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise ImportError(f"{PACKAGE} is no package")
    spec = spec_from_file_location(f"{PACKAGE}_detect", Path(package.submodule_search_locations[0], LOADER))
    assert isinstance(spec, ModuleSpec)
    assert spec.loader is not None
    detect = module_from_spec(spec)
    spec.loader.exec_module(detect)
    return detect.load_extension(variant(torch.backends.cpu.get_cpu_capability(), detect.detect_cpu_features()))


def variant(capability: str, detected: str) -> str:
    """AVX2 where torch uses no more than that; else what kt-kernel finds."""
    return detected if capability.startswith("AVX512") else "avx2"


@contextmanager
def silent() -> Iterator[None]:
    """Without what compiled code prints meanwhile."""
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), STDOUT)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, STDOUT)
        os.close(kept)
