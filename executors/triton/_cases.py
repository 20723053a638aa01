"""What is compiled to see what the kernels take: every shipped configuration, on layers that differ in what matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from executors.triton import _configs
from executors.triton._compile import TARGETS, compiling
from executors.triton._configs import Regime
from executors.triton._device import Device
from executors.triton._grouping import group
from executors.triton._operator import forward
from executors.triton._products import Act
from executors.triton._routing import route
from moe_ref.types import MoEConfig, MoEWeights

TF32 = "tf32"  # float32 whose products may round their operands
MULTIPROCESSORS = 128  # decides how many programs run, not what they are


class Layer(NamedTuple):
    """A layer as the products see it.

    Attributes:
        name: the model, or what is special.
        experts, top_k, hidden, intermediate: E, K, H, I.
        act: the activation.
        biases: whether both projections have one.
        by_columns: whether (E, H, 2I) and (E, I, H) are stored, as gpt-oss does.
        scale_input: C3.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    act: Act
    biases: bool = False
    by_columns: bool = False
    scale_input: bool = False


SWIGLU = Act("swiglu", 1.0, None, 0.0, "concatenated")
CLAMPED = Act("swiglu", 1.702, 7.0, 1.0, "interleaved")
QWEN3 = Layer("qwen3", 128, 8, 2048, 768, SWIGLU)
GPT_OSS = Layer("gpt-oss", 32, 4, 2880, 2880, CLAMPED, biases=True, by_columns=True)
GPT_OSS_ROWS = GPT_OSS._replace(name="oss-rows", by_columns=False)
DEEPSEEK = Layer("deepseek", 256, 8, 7168, 2048, SWIGLU, by_columns=True)  # 15 GB: offsets need 64 bits
GEGLU = QWEN3._replace(name="geglu", act=SWIGLU._replace(activation="geglu"), biases=True)
GELU = Layer("gelu", 128, 8, 1040, 528, Act("gelu", 1.0, None, 0.0, ""), biases=True, scale_input=True)
RELU2 = QWEN3._replace(name="relu2", act=Act("relu2", 1.0, None, 0.0, ""))
ODD = Layer("odd", 5, 2, 50, 17, CLAMPED._replace(layout="concatenated"), biases=True)

NARROW = (QWEN3, GPT_OSS, GPT_OSS_ROWS, GELU)
NARROW_LARGEST = (DEEPSEEK, GEGLU, RELU2)  # with the largest tiles only, the nearest to their limits
WIDE = (QWEN3, GPT_OSS, DEEPSEEK)
ROUNDED = (QWEN3, GPT_OSS)  # in TF32

MANY = MoEConfig(10)
GROUPED = MoEConfig(
    8, scoring="sigmoid", num_groups=8, topk_groups=4, group_score="top2_sum", routed_scaling_factor=2.5
)


class Case(NamedTuple):
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
    """A compiled kernel, and the case in which it came up first.

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
    "group": ("CHUNK", "BLOCK_E", "BLOCK_M"),
    "count": ("CHUNK", "BLOCK_E"),
    "scan": ("BLOCK_C", "BLOCK_E"),
    "place": ("CHUNK", "BLOCK_E", "BLOCK_M"),
    "up": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "down": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "combine": ("BLOCK_T", "BLOCK_H"),
}


def family_of(target: str) -> str:
    """The name of the family of configurations that a target takes."""
    return _configs.family_of(TARGETS[target].backend, TARGETS[target].arch)


def default_dtypes(target: str) -> tuple[str, ...]:
    """What stands for all: float16 compiles as bfloat16 does, where there is a bfloat16."""
    return ("float16" if target == "sm75" else "bfloat16", "float32")


def compile_kernels(target: str, dtypes: tuple[str, ...], show: Callable[[int, int], None]) -> list[Kernel]:
    """Compiles everything for a target: each kernel once, in the order of `BLOCKS`.

    Args:
        target: a name of `executors.triton._compile.TARGETS`.
        dtypes: "bfloat16", "float16" or "float32"; the last compiles for TF32 too.
        show: called with the cases done and the cases in all.

    Raises:
        Unavailable: the kernels are interpreted in this process.
    """
    found: dict[str, Kernel] = {}
    with compiling(target) as launches:
        everything = list(cases(family_of(target), dtypes))
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


def cases(family: str, dtypes: tuple[str, ...]) -> Iterator[Case]:
    """The cases for a family of configurations."""
    own, device = _configs.FAMILIES[family], Device(family, MULTIPROCESSORS)
    for dtype in dtypes:
        if dtype != "float32":
            for layer in NARROW:
                yield from _of_products(layer, own.narrow, dtype, device)
            for layer in NARROW_LARGEST:
                yield list(_of_products(layer, own.narrow, dtype, device))[-1]
            continue
        for layer in WIDE:
            yield from _of_products(layer, own.wide, dtype, device)
        for layer in ROUNDED:
            yield from _of_products(layer, own.wide, TF32, device)
    for dtype in dtypes:
        yield from _of_products(ODD, own.odd, dtype, device)
        yield Case("gpt-oss", dtype, partial(_route, 32, dtype, MoEConfig(4, scoring="topk_softmax")))
        yield Case("E=512", dtype, partial(_route, 512, dtype, MANY))
    yield Case("deepseek", "float32", partial(_route, 256, "float32", GROUPED))
    yield Case("deepseek", "float64", partial(_route, 256, "float64", GROUPED))
    yield Case("E=512", "float64", partial(_route, 512, "float64", MANY))
    for tokens in (64, 1024):
        ids = torch.empty(tokens, 10, dtype=torch.int64, device="meta")
        yield Case("E=512", "int64", partial(group, ids, 512, own.narrow[0].up.block_m))


def _of_products(layer: Layer, regimes: tuple[Regime, ...], dtype: str, device: Device) -> Iterator[Case]:
    """A case for each regime, with as few tokens as it takes."""
    least = [0.0, *(regime.rows for regime in regimes)]
    for rows in least[: len(regimes)]:
        tokens = int(rows * layer.experts / layer.top_k) + 1
        yield Case(layer.name, dtype, partial(_forward, layer, tokens, dtype, device))


def _forward(layer: Layer, tokens: int, dtype: str, device: Device) -> Tensor:
    absent = partial(torch.empty, dtype=getattr(torch, "float32" if dtype == TF32 else dtype), device="meta")

    def stored(experts: int, m: int, k: int) -> Tensor:
        return absent(experts, k, m).transpose(1, 2) if layer.by_columns else absent(experts, m, k)

    _, experts, top_k, hidden, intermediate, act, *_ = layer
    both = 2 * intermediate if act.layout else intermediate
    biases = (absent(experts, both), absent(experts, hidden)) if layer.biases else (None, None)
    return forward(
        absent(tokens, hidden),
        absent(tokens, top_k, dtype=torch.int32),
        absent(tokens, top_k, dtype=torch.float32),
        (stored(experts, both, hidden), stored(experts, hidden, intermediate), *biases),
        layer.scale_input,
        act,
        device,
        dtype == TF32,
    )


def _route(experts: int, dtype: str, config: MoEConfig) -> None:
    # A custom operator would not launch anything for tensors without values: these have some, and nobody reads them.
    logits = torch.zeros(64, experts, dtype=getattr(torch, dtype))
    bias = torch.zeros(experts) if config.num_groups > 1 else None
    none = logits.new_zeros(experts, 0, 0)
    route(logits, MoEWeights(none, none, selection_bias=bias, config=config))
