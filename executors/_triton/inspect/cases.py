"""What is compiled to see what the kernels take: every shipped configuration, on layers that cover all features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from executors._base.arguments import Projection
from executors._base.operator import NAMES
from executors._triton import configs
from executors._triton.configs import KernelConfig
from executors._triton.device import Device
from executors._triton.inspect.case_layers import (
    DECODED,
    DEEPSEEK,
    GEGLU,
    GELU,
    GPT_OSS,
    GPT_OSS_ROWS,
    INKLING2,
    LORA,
    LORA_FP32,
    MXFP4,
    NESTED,
    NF4,
    ODD,
    ODD_NF4,
    ODD_PAIRS,
    ODD_SCALED,
    PEFT,
    QWEN3,
    RELU2,
    STEP,
    CaseLayer,
    packed_like,
)
from executors._triton.inspect.compile import TARGETS, compiling
from executors._triton.launch.grouping import bounds_of, group
from executors._triton.launch.operands import LaunchPlan, Matrices, are_aligned
from executors._triton.launch.routing import backward_operator, route
from executors._triton.layer import Layer, backward, forward
from moe_ref.types import LORA_FACTORS, MoEConfig, MoEWeights

TF32 = "tf32"  # float32 whose products may round their operands
MULTIPROCESSORS = 128  # decides how many programs run, not how they are compiled

INFERENCE = (GPT_OSS,)  # forward alone, with every configuration
INFERENCE_LARGEST = (QWEN3, DEEPSEEK)  # only with the largest tiles, the nearest to their limits
TRAINED = (QWEN3,)  # forward and backward, with every configuration
TRAINED_LARGEST = (GPT_OSS, GPT_OSS_ROWS, GELU, GEGLU, RELU2, STEP, INKLING2, LORA_FP32)
MANY = MoEConfig(10)
GROUPED = MoEConfig(
    8, scoring="sigmoid", num_groups=8, topk_groups=4, group_score="top2_sum", routed_scaling_factor=2.5
)
NEWER = MoEConfig(  # every other way through the kernels at once
    6, scoring="sqrtsoftplus", renormalize=True, renormalize_form="max", selection_key="logit"
)


class CompileCase(NamedTuple):
    """One call of the launchers.

    Attributes:
        layer: what the case is called.
        dtype: of x, or of router_logits.
        run: makes the call.
    """

    layer: str
    dtype: str
    run: Callable[[], Any]


class Kernel(NamedTuple):
    """A compiled kernel, and the first case that launched it.

    Attributes:
        name: of the kernel, without "_kernel".
        layer, dtype: of the case.
        tile: its blocks: rows, columns and, of a product, the inner dimension.
        constants: its compile-time arguments.
        compiled: Triton's compiled kernel.
    """

    name: str
    layer: str
    dtype: str
    tile: tuple[int, ...]
    constants: dict[str, Any]
    compiled: Any


BLOCKS = {
    "route": ("BLOCK_T", "BLOCK_E"),
    "route_backward": ("BLOCK_T", "BLOCK_E"),
    "group": ("CHUNK", "BLOCK_E", "BLOCK_M"),
    "count": ("CHUNK", "BLOCK_E"),
    "scan": ("BLOCK_C", "BLOCK_E"),
    "place": ("CHUNK", "BLOCK_E", "BLOCK_M"),
    "up": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "down": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "combine": ("BLOCK_T", "BLOCK_H"),
    "narrow_rows": ("BLOCK_M", "BLOCK_N"),
    "narrow_columns": ("BLOCK_M", "BLOCK_N"),
    "decode": ("BLOCK_O", "BLOCK_I"),
    "inner": ("BLOCK_M", "BLOCK_R", "BLOCK_K"),
    "outer": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "dz": ("BLOCK_M", "BLOCK_N"),
    "input_weights": ("BLOCK_M", "BLOCK_N"),
    "sums": ("BLOCK_M", "BLOCK_N"),
}


def family_of(target: str) -> str:
    """The name of the family of configurations that a target takes."""
    return configs.family_of(TARGETS[target].backend, TARGETS[target].arch)


def default_dtypes(target: str) -> tuple[str, ...]:
    """What is compiled unless others are asked for: float16 where there is no bfloat16."""
    return ("float16" if target == "sm75" else "bfloat16", "float32")


def compile_kernels(
    target: str, dtypes: tuple[str, ...], show: Callable[[int, int], None], largest: bool = False
) -> list[Kernel]:
    """Compiles everything for a target: each kernel once, in the order of `BLOCKS`.

    Args:
        target: a name of `executors._triton.inspect.compile.TARGETS`.
        dtypes: "bfloat16", "float16" or "float32"; the last compiles for TF32 too.
        show: called with the cases done and the cases in all.
        largest: whether to compile only the largest tiles of the products.

    Raises:
        Unavailable: the kernels are interpreted in this process.
    """
    found: dict[str, Kernel] = {}
    with compiling(target) as launches:
        everything = list(cases(family_of(target), dtypes, largest))
        for done, case in enumerate(everything):
            show(done, len(everything))
            case.run()
            for launch in launches:
                name = launch.kernel.removesuffix("_kernel")
                tile = tuple(launch.constants[block] for block in BLOCKS[name])
                kernel = Kernel(name, case.layer, case.dtype, tile, launch.constants, launch.compiled)
                found.setdefault(launch.compiled.hash, kernel)
            launches.clear()
    order = list(BLOCKS)
    return sorted(found.values(), key=lambda kernel: order.index(kernel.name))


def cases(family: str, dtypes: tuple[str, ...], largest: bool = False) -> Iterator[CompileCase]:
    """The cases of a family of configurations; with ``largest``, only its largest tiles, nearest to their limits."""
    if largest:
        for dtype in dtypes:
            yield from _largest_cases(family, dtype)
        return
    own, device = configs.FAMILIES[family], Device(family, MULTIPROCESSORS)
    for dtype in dtypes:
        if dtype == "float32":
            yield _largest(DEEPSEEK, own.wide, dtype, device)
            yield from _of_products(GPT_OSS, own.wide, dtype, device, trained=True)
            yield _largest(QWEN3, own.wide, dtype, device, trained=True)
            yield from _of_products(GPT_OSS, own.wide, TF32, device)
            for layer in (QWEN3, LORA):
                yield _largest(layer, own.wide, TF32, device, trained=True)
            yield from _of_products(NF4, own.packed.wide, dtype, device, trained=True)
            continue
        for layer in INFERENCE:
            yield from _of_products(layer, own.narrow, dtype, device)
        for layer in INFERENCE_LARGEST:
            yield _largest(layer, own.narrow, dtype, device)
        for layer in TRAINED:
            yield from _of_products(layer, own.narrow, dtype, device, trained=True)
        for layer in TRAINED_LARGEST:
            yield _largest(layer, own.narrow, dtype, device, trained=True)
        yield from _of_products(NF4, own.packed.narrow, dtype, device, trained=True)
        yield from _of_products(MXFP4, own.packed.narrow, dtype, device)
        for layer in (NESTED, MXFP4, PEFT):
            yield _largest(layer, own.packed.narrow, dtype, device, trained=True)
        yield _largest(DECODED, own.narrow, dtype, device, trained=True)
        if own.mixed_dtype_limits != configs.LEAST_MIXED_LIMITS:  # where tiles beside adapters depend on x's dtype
            yield _largest(LORA_FP32, own.narrow, "float16", device)
            yield _largest(LORA, own.narrow, dtype, device)
    for dtype in dtypes:
        yield from _of_products(ODD, own.odd, dtype, device, trained=True)
        yield from _of_products(ODD_NF4, own.packed.odd, dtype, device, trained=True)
        yield CompileCase("gpt-oss", dtype, partial(_route, 32, dtype, MoEConfig(4, scoring="topk_softmax")))
        yield CompileCase("E=512", dtype, partial(_route, 512, dtype, MANY))
    if dtypes[-1] == "float32":
        yield from _sums_over_lanes(own, device)
    yield CompileCase("deepseek", "float32", partial(_route, 256, "float32", GROUPED))
    yield CompileCase("deepseek", "float64", partial(_route, 256, "float64", GROUPED))
    yield CompileCase("E=512", "float64", partial(_route, 512, "float64", MANY))
    for dtype in ("float32", "float64"):
        yield CompileCase("deepseek", dtype, partial(_route, 256, dtype, NEWER))
    for tokens in (64, 1024):
        ids = torch.empty(tokens, 10, dtype=torch.int64, device="meta")
        yield CompileCase("E=512", "int64", partial(group, ids, 512, own.narrow[0].up.block_m))


def _of_products(
    layer: CaseLayer, kernel_configs: tuple[KernelConfig, ...], dtype: str, device: Device, trained: bool = False
) -> Iterator[CompileCase]:
    """A case for each configuration, with as few tokens as select it."""
    least = [0.0, *(config.rows for config in kernel_configs)]
    for rows, config in zip(least, kernel_configs, strict=False):
        tokens = int(rows * layer.experts / layer.top_k) + 1
        yield CompileCase(layer.name, dtype, partial(_call, layer, tokens, dtype, device, config, trained))


def _largest_cases(family: str, dtype: str) -> Iterator[CompileCase]:
    own, device = configs.FAMILIES[family], Device(family, MULTIPROCESSORS)
    kernel_configs = own.wide if dtype == "float32" else own.narrow
    yield _largest(GPT_OSS, kernel_configs, dtype, device)
    for layer in (QWEN3, GPT_OSS) if dtype == "float32" else (QWEN3, *TRAINED_LARGEST):
        yield _largest(layer, kernel_configs, dtype, device, trained=True)
    if dtype == "float32":
        yield _largest(NF4, own.packed.wide, dtype, device, trained=True)
        yield _largest(QWEN3, own.wide, TF32, device, trained=True)
    else:
        for layer in (NF4, MXFP4, PEFT):
            yield _largest(layer, own.packed.narrow, dtype, device, trained=True)
        yield _largest(DECODED, kernel_configs, dtype, device)
    yield _largest(ODD, own.odd, dtype, device, trained=True)
    yield _largest(ODD_NF4, own.packed.odd, dtype, device, trained=True)
    if dtype == "float32":
        yield from _sums_over_lanes(own, device)


def _sums_over_lanes(own: configs.Family, device: Device) -> Iterator[CompileCase]:
    """Cases whose sums of products would begin between lanes, if products were added over lanes at all."""
    for layer in (ODD_PAIRS, ODD_SCALED):
        yield _largest(layer, own.odd, "float32", device, trained=True)
    for experts, config in ((5, MoEConfig(2)), (128, MoEConfig(8, renormalize=True))):
        yield CompileCase(f"E={experts}", "float32", partial(_route, experts, "float32", config))


def _largest(
    layer: CaseLayer, kernel_configs: tuple[KernelConfig, ...], dtype: str, device: Device, trained: bool = False
) -> CompileCase:
    return list(_of_products(layer, kernel_configs, dtype, device, trained))[-1]


def _call(layer: CaseLayer, tokens: int, dtype: str, device: Device, config: KernelConfig, trained: bool) -> None:
    """Forward, or forward and backward with the gradients of all that is not frozen."""
    absent = partial(torch.empty, dtype=getattr(torch, "float32" if dtype == TF32 else dtype), device="meta")

    def projection(m: int, k: int) -> Projection[Matrices]:
        experts, rank = layer.experts, layer.rank
        stored = absent(experts, k, m).transpose(1, 2) if layer.by_columns else absent(experts, m, k)
        bias = absent(experts, m) if layer.biases else None
        factor = partial(absent, **({"dtype": getattr(torch, layer.lora_dtype)} if layer.lora_dtype else {}))
        a, b = (factor(experts, rank, k), factor(experts, m, rank)) if rank else (None, None)
        if layer.packed:
            return Projection(packed_like(layer.packed, stored, layer.by_columns), bias, a, b, 2.0)
        return Projection(stored, bias, a, b, 2.0)

    hidden, intermediate = layer.hidden, layer.intermediate
    x, weights = absent(tokens, hidden), absent(tokens, layer.top_k, dtype=torch.float32)
    ids = absent(tokens, layer.top_k, dtype=torch.int32)
    up = projection(2 * intermediate if layer.act.layout else intermediate, hidden)
    whole = Layer(x, ids, weights, up, projection(hidden, intermediate), layer.act, layer.scale_input)
    groups = group(ids, layer.experts, config.up.block_m)
    aligned = are_aligned(whole.up.matrices, whole.down.matrices)
    bounds = bounds_of(groups, config.up.block_m) if layer.decoded else None
    plan = LaunchPlan(groups, layer.top_k, config, device, "tf32" if dtype == TF32 else "ieee", aligned, bounds)
    y, z = forward(whole, plan, keep_z=trained)
    if trained:
        frozen = {"gate_up_proj", "down_proj"} if layer.rank or layer.packed else set()
        frozen |= set() if layer.rank else set(LORA_FACTORS)
        backward(whole, plan, z, y, {name: name not in frozen for name in NAMES})


def _route(experts: int, dtype: str, config: MoEConfig) -> None:
    """Routing, forward and backward."""
    # A custom operator launches nothing for tensors without values: these have some, which nobody reads.
    logits = torch.zeros(64, experts, dtype=getattr(torch, dtype))
    bias = torch.zeros(experts) if config.num_groups > 1 or config.selection_key == "logit" else None
    none = logits.new_zeros(experts, 0, 0)
    routing = route(logits, MoEWeights(none, none, selection_bias=bias, config=config))
    static = config.scoring, config.renormalize, 1e-20, 1.0, config.renormalize_form
    backward_operator(routing.topk_weights, routing.topk_ids, logits, *static)
