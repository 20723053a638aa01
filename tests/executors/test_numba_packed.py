"""Experts in 4 bits, decoded inside Numba's kernels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import executors
from executors import mxfp4, nf4
from executors._pipeline.packed_matrices import PackedMatrices, room_for
from moe_ref import MoEConfig, MoEWeights
from moe_ref import mxfp4 as mxfp4_specification
from moe_ref import nf4 as nf4_specification
from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor
from random_nf4 import WILD

numba = pytest.importorskip("numba")

from executors._numba import packed, products  # noqa: E402
from executors._numba.kernels import KINDS, _decode  # noqa: E402
from executors._numba.packed import block_of, multiply_packed  # noqa: E402
from executors._numba.products import NumbaProducts  # noqa: E402

DTYPES = ("bfloat16", "float16")
EVERY_BYTE = np.arange(256, dtype=np.uint8)


def nf4_stack(shape: tuple[int, int, int], **form: object) -> NF4Tensor:
    """Random bytes, with scales of both signs, one of them 0 and some whose products are subnormal."""
    rng = np.random.default_rng(0)
    count = int(np.prod(shape))
    blocksize = int(form.get("blocksize", 64))  # type: ignore[call-overload]
    scales = rng.standard_normal(-(-count // blocksize)).astype(np.float32)
    scales[0], scales[-1] = 0, 3e-39
    codes = rng.integers(0, 256, -(-count // 2), dtype=np.uint8)
    return NF4Tensor(torch.tensor(codes), torch.tensor(scales), shape=shape, **form)  # type: ignore[arg-type]


def mxfp4_stack(shape: tuple[int, int, int], **form: object) -> MXFP4Tensor:
    rng = np.random.default_rng(0)
    blocks = (*shape[:2], shape[2] // 32)
    codes = rng.integers(0, 256, (*blocks, 16), dtype=np.uint8)
    scales = rng.integers(110, 135, blocks, dtype=np.uint8)
    return MXFP4Tensor(torch.tensor(codes), torch.tensor(scales), **form)  # type: ignore[arg-type]


def stack_of(tensor: PackedTensor) -> PackedMatrices:
    return PackedMatrices(tensor, room_for(tensor, 0, torch.zeros(0)), False)


def bits(value: torch.Tensor) -> torch.Tensor:
    """As integers; one NaN is as good as another."""
    return torch.where(value.isnan(), torch.full_like(value, torch.nan), value).view(torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "mxfp4"])
def test_codes_are_decoded_to_the_last_bit(quant_type: str, dtype: str) -> None:
    """Q1, Q2, M1: every byte with wild scales of both signs, as the specification decodes it."""
    if quant_type == "mxfp4":
        scales = np.repeat(np.arange(256, dtype=np.uint8), 16)
        codes = np.tile(EVERY_BYTE.reshape(16, 16), (256, 1))
        whole = MXFP4Tensor(codes[None, None], scales[None, None], dtype=dtype)
        wanted = torch.tensor(np.asarray(mxfp4_specification.decode(whole))).to(getattr(torch, dtype))
        exponents = scales.astype(np.float64) - 127
        powers = np.where(scales == 255, np.nan, np.exp2(exponents)).astype(np.float32)
        values, blocksize = packed._values("mxfp4"), 32
    else:
        powers = np.repeat(np.concatenate([WILD, -WILD]), 8)
        codes, values, blocksize = np.tile(EVERY_BYTE, 2 * len(WILD)), packed._values(quant_type), 64
        shape = (1, 1, 2 * len(codes))
        plain = NF4Tensor(codes, powers, shape=shape, dtype=dtype, quant_type=quant_type, blocksize=64)
        with np.errstate(all="ignore"):
            wanted = torch.tensor(np.asarray(nf4_specification.decode(plain))).to(getattr(torch, dtype))
    codes = np.ascontiguousarray(codes.reshape(-1))
    out = torch.zeros(2 * len(codes), dtype=getattr(torch, dtype))
    _decode(
        out.numel(), codes.ctypes.data, powers.ctypes.data, blocksize, values.ctypes.data,
        quant_type == "mxfp4", out.data_ptr(), KINDS[dtype],
    )  # fmt: skip
    assert torch.equal(bits(out), bits(wanted.view(-1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("quant_type", "blocksize", "shape"),
    [
        ("nf4", 64, (3, 64, 128)),
        ("fp4", 32, (3, 7, 96)),
        ("nf4", 64, (3, 50, 96)),
        ("nf4", 256, (2, 8, 1280)),
        ("nf4", 4096, (2, 33, 4096)),
        ("mxfp4", 32, (3, 7, 1056)),
        ("mxfp4", 32, (3, 70, 32)),
    ],
)
def test_each_expert_times_one_is_what_it_decodes_to(
    quant_type: str, blocksize: int, shape: tuple[int, int, int], transposed: bool, dtype: str
) -> None:
    """Both directions, with blocks that straddle rows and a last job that is smaller; experts out of order of rows."""
    if quant_type == "mxfp4":
        tensor: PackedTensor = mxfp4_stack(shape, dtype=dtype)
    else:
        tensor = nf4_stack(shape, quant_type=quant_type, blocksize=blocksize, dtype=dtype)
    if transposed:
        tensor = tensor.transpose(1, 2)
    stack = stack_of(tensor)
    used = [shape[0] - 1, 0]
    for back in (False, True):
        by_rows = back == transposed
        inner = tensor.shape[1 if back else 2]
        if not block_of(stack, by_rows):
            assert not by_rows
            assert shape[2] % blocksize
            continue
        one = torch.eye(inner)
        groups = [(e, i * inner, (i + 1) * inner) for i, e in enumerate(used)]
        out = multiply_packed(one.repeat(2, 1), stack, groups, by_rows)
        for expert, start, stop in groups:
            matrix = stack.expert(expert, 0).float()
            assert torch.equal(out[start:stop], matrix if back else matrix.t()), (expert, back)


def test_what_the_kernels_cannot_decode_takes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, blocks that straddle experts, codes with gaps, what was kept, and processors without the instruction."""
    tensor = nf4_stack((3, 64, 128), dtype="bfloat16")
    stack = stack_of(tensor)
    assert block_of(stack, True)
    assert block_of(stack, False)
    gaps = replace(tensor, packed=tensor.packed.repeat_interleave(2)[::2])
    others = [
        nf4_stack((3, 64, 128), dtype="float32"),
        nf4_stack((3, 5, 7), dtype="bfloat16"),
        gaps,
        nf4_stack((2, 3, 2**18), dtype="bfloat16"),
    ]
    assert not any(block_of(stack_of(other), True) for other in others)
    assert not block_of(PackedMatrices(tensor, room_for(tensor, 2, torch.zeros(0)), False), True)
    packed._can_look_up.cache_clear()
    monkeypatch.setattr(packed.config, "CPU_NAME", "generic")
    monkeypatch.setattr(packed, "machine", lambda: "x86_64")
    assert not block_of(stack, True)
    packed._can_look_up.cache_clear()
    monkeypatch.undo()
    assert block_of(stack, True)
    packed._can_look_up.cache_clear()
    monkeypatch.setattr(packed, "machine", lambda: "riscv64")
    assert not block_of(stack, True)
    packed._can_look_up.cache_clear()


@pytest.mark.parametrize("limit", [0, 5, 100], ids=["none few", "some few", "all few"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "mxfp4"])
def test_the_layer_is_that_of_the_loop(quant_type: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, nested statistics too; the numbers of threads change no bit."""
    for table in ("BY_ROWS", "BY_COLUMNS"):
        monkeypatch.setattr(products, table, dict.fromkeys((True, False), limit))
    monkeypatch.setattr(products, "PACKED", limit)
    calls = []
    monkeypatch.setattr(products, "multiply_packed", lambda *a, **k: calls.append(1) or multiply_packed(*a, **k))
    drawn = torch.Generator().manual_seed(0)
    shapes = ((4, 256, 128), (4, 128, 128), (9, 128), (9, 4), (9, 128))
    gate_up, down, x, logits, dy = (torch.randn(*shape, generator=drawn).bfloat16() for shape in shapes)
    dense = MoEWeights(gate_up / 16, down / 16, config=MoEConfig(2))
    weights = (
        mxfp4.quantize(dense) if quant_type == "mxfp4" else nf4.quantize(dense, quant_type=quant_type, nested=True)
    )
    found = []
    before = torch.get_num_threads()
    try:
        for name, threads in (("grouped_nf4", 1), ("numba", 1), ("numba", 2), ("numba", 5)):
            torch.set_num_threads(threads)
            given = x.clone().requires_grad_()
            y = executors.get(name)(given, logits, weights)
            y.backward(dy)
            found.append((y.detach(), given.grad))
    finally:
        torch.set_num_threads(before)
    assert bool(calls) == (limit > 0)
    for one, other in zip(*found[:2], strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=2e-2, atol=2e-2 * float(other.abs().max()))
    for others in found[2:]:
        assert all(torch.equal(one, other) for one, other in zip(found[1], others, strict=True))


def test_a_nan_scale_stays_with_its_expert() -> None:
    """R4: an MXFP4 scale of 255 is NaN, in its own column."""
    tensor = mxfp4_stack((2, 40, 64), dtype="bfloat16")
    tensor.scales[1, 3, 0] = 255
    out = NumbaProducts(torch.tensor([0, 2, 4])).rows(torch.ones(4, 64).bfloat16(), stack_of(tensor))
    assert out[2:, 3].isnan().all()
    out[2:, 3] = 0
    assert out.isfinite().all()
