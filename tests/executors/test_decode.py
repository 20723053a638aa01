"""How executors decode 4 bits: when the library's kernel is trusted, and sizes that no test could hold."""

import math
from collections.abc import Iterator

import pytest
import torch

import executors
from dense_cases import inputs_of
from executors import _decode
from executors._decode import bitsandbytes as _decode_kernel
from moe_ref.nf4 import decode
from moe_ref.types import NF4Tensor
from packed_cases import PACKED
from random_nf4 import equal_bits

FORMATS = [(quant_type, dtype) for quant_type in ("nf4", "fp4") for dtype in ("float32", "bfloat16", "float16")]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What was seen of the kernel, before and after."""
    for remembered in (_decode_kernel.operator, _decode_kernel.is_right):
        remembered.cache_clear()
    yield
    for remembered in (_decode_kernel.operator, _decode_kernel.is_right):
        remembered.cache_clear()


def tensor_of(absmax: list[float], dtype: str = "float32", **form: object) -> NF4Tensor:
    """One expert for each block of 64 codes 15."""
    codes = torch.full((32 * len(absmax),), 0xFF, dtype=torch.uint8)
    return NF4Tensor(codes, torch.tensor(absmax), shape=(len(absmax), 4, 16), dtype=dtype, **form)


def same(found: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, the signs of zeros included; ``right`` may be the specification's, in fp32."""
    return found.shape == right.shape and bool(equal_bits(found.float().numpy(), right.float().numpy()).all())


def by_kernel(tensor: NF4Tensor) -> bool:
    return _decode_kernel.decode_blocks(tensor.packed, tensor.absmax, tensor) is not None


@pytest.mark.parametrize(("quant_type", "dtype"), FORMATS)
def test_the_kernel_is_used_where_it_is_right(quant_type: str, dtype: str) -> None:
    """On this machine, with the library that is installed."""
    pytest.importorskip("bitsandbytes")
    if not _decode_kernel.is_right(quant_type, dtype):
        pytest.skip("the library's kernel is wrong on this machine")
    assert by_kernel(tensor_of([1.0, 2.0], dtype, quant_type=quant_type))


def test_scales_of_subnormal_numbers_are_kept_from_the_kernel() -> None:
    """Q6: it flushes them to zero in bf16, and only there; a block of zeros is no reason."""
    pytest.importorskip("bitsandbytes")
    for tiny in (1e-38, -1e-38, 1e-45):
        assert not by_kernel(tensor_of([1.0, tiny], "bfloat16"))
        assert by_kernel(tensor_of([1.0, tiny]))
    assert not by_kernel(tensor_of([float("nan"), 1e-38], "bfloat16"))
    assert by_kernel(tensor_of([1.0, 0.0], "bfloat16"))
    assert by_kernel(tensor_of([1.0, -1.0], "bfloat16"))


@pytest.mark.parametrize("exponent", range(-122, -115))
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_scales_about_the_limit(quant_type: str, exponent: int) -> None:
    """Q2, Q6: every code, on either side of where the kernel is trusted."""
    codes = torch.arange(0, 256, dtype=torch.uint8)
    scales = torch.full((8,), 2.0**exponent)
    tensor = NF4Tensor(codes, scales, shape=(1, 16, 32), dtype="bfloat16", quant_type=quant_type)
    assert same(_decode.decode_expert(tensor, 0), decode(tensor)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 16, 32), (2, 7, 9)], ids=["whole blocks", "straddling"])
def test_torchs_default_dtype_changes_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As models are often made under another one."""
    size = math.prod(shape)
    codes, scales = torch.arange(-(-size // 2)).to(torch.uint8), torch.rand(-(-size // 64))
    tensor = NF4Tensor(codes, scales, shape=shape, dtype="float32")
    torch.set_default_dtype(dtype)
    try:
        alone = torch.stack([_decode.decode_expert(tensor, expert) for expert in range(2)])
        both = _decode.decode_experts(tensor, torch.arange(2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(alone, decode(tensor))
    assert same(both, decode(tensor))


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError, AttributeError])
def test_a_library_that_cannot_be_had_is_done_without(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error(name)

    monkeypatch.setattr(_decode_kernel, "import_module", fail)
    tensor = tensor_of([1.0, 2.0])
    assert not by_kernel(tensor)
    assert same(_decode.decode_expert(tensor, 1), decode(tensor)[1])


@pytest.mark.parametrize("fault", [2.0, 1 + 2.0**-23, float("nan")])
def test_a_wrong_kernel_is_found_out(fault: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q6: the probe differs in a bit, so the table decodes, and explain says so."""
    pytest.importorskip("bitsandbytes")
    kernel = _decode_kernel.operator()
    monkeypatch.setattr(_decode_kernel, "operator", lambda: lambda *given: kernel(*given) * fault)
    inputs = inputs_of(PACKED)
    row = next(row for row in executors.explain(inputs.x, inputs.weights) if row.name == "grouped_nf4")
    assert row.usable
    assert row.note.startswith("bitsandbytes' kernel is wrong for gate_up_proj and down_proj on this machine")
    packed = inputs.weights.gate_up_proj
    assert same(_decode.decode_expert(packed, 1), decode(packed)[1])


def test_a_kernel_that_is_wrong_for_long_blocks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Q6: the probe has short blocks and the longest that the kernel is ever given; longer ones come in parts."""
    pytest.importorskip("bitsandbytes")
    kernel, given = _decode_kernel.operator(), []

    def spoiled(codes, absmax, blocksize, *form):  # type: ignore[no-untyped-def]
        given.append(blocksize)
        return kernel(codes, absmax, blocksize, *form) * (2.0 if blocksize >= 1024 else 1.0)

    long = NF4Tensor(
        torch.full((2048,), 0xFF, dtype=torch.uint8), torch.ones(1), shape=(1, 1, 4096), dtype="float32", blocksize=4096
    )
    if by_kernel(long):
        monkeypatch.setattr(_decode_kernel, "operator", lambda: lambda *a: given.append(a[2]) or kernel(*a))
        assert by_kernel(long)
        assert max(given) == 1024
    _decode_kernel.is_right.cache_clear()
    monkeypatch.setattr(_decode_kernel, "operator", lambda: spoiled)
    assert not by_kernel(long)


def test_strided_codes_and_scales_are_read_as_they_stand() -> None:
    """Q6: the kernel ignores strides."""
    codes, absmax = torch.arange(64, dtype=torch.uint8), torch.tensor([1.0, 2.0, 3.0, 4.0])
    form = {"shape": (2, 4, 16), "dtype": "float32", "blocksize": 32}
    right = decode(NF4Tensor(codes, absmax, **form))
    apart = (torch.stack([array, torch.full_like(array, 7)], dim=1)[:, 0] for array in (codes, absmax))
    strided = NF4Tensor(*apart, **form)
    for expert in range(2):
        assert same(_decode.decode_expert(strided, expert), right[expert])
    assert same(_decode.decode_experts(strided, torch.tensor([1, 0])), right.flip(0))


@pytest.mark.parametrize("experts", [2**31 // 4096 + 3, 2**33 // 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_places_beyond_2_31_numbers(experts: int, nested: bool) -> None:
    """E5: the last expert has its own scale; the codes exist once, and stand everywhere."""
    codes = torch.tensor([0xFF], dtype=torch.uint8).expand(experts * 2048)
    scales = torch.arange(experts, dtype=torch.float32)
    tensor = NF4Tensor(codes, scales, shape=(experts, 64, 64), dtype="float32", blocksize=4096)
    if nested:
        table = torch.zeros(256)
        table[:2] = torch.tensor([0.0, 1.0])
        segments = NF4Tensor(
            codes, torch.ones(experts, dtype=torch.uint8), scales, table, torch.zeros(experts), shape=tensor.shape,
            dtype="float32", blocksize=4096,
        )  # fmt: skip
        tensor = segments
    last = experts - 1
    assert tensor.size > 2**31
    assert same(_decode.decode_expert(tensor, last), torch.full((64, 64), float(last)))
    assert same(_decode.decode_experts(tensor, torch.tensor([last]))[0], torch.full((64, 64), float(last)))


def test_a_straddling_tensor_beyond_2_31_numbers() -> None:
    """E5: experts of 63 numbers, which share their blocks and bytes."""
    experts = 2**31 // 63 + 100
    codes = torch.tensor([0xFF], dtype=torch.uint8).expand(-(-experts * 63 // 2))
    scales = torch.arange(-(-experts * 63 // 4096), dtype=torch.float32)
    tensor = NF4Tensor(codes, scales, shape=(experts, 7, 9), dtype="float32", blocksize=4096)
    expert = experts - 40
    expected = (torch.arange(expert * 63, (expert + 1) * 63) // 4096).float().view(7, 9)
    assert same(_decode.decode_expert(tensor, expert), expected)
    assert same(_decode.decode_experts(tensor, torch.tensor([expert]))[0], expected)
