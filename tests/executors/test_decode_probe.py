"""A kernel that decodes 4 bits wrongly is found out before its first use: a spoiled kernel for each kind of defect."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from executors._decode import bitsandbytes as _decode_kernel
from executors._decode.bitsandbytes import BLOCKSIZES, is_right
from moe_ref.nf4 import CODES
from narrow_kernel import without_vectors

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = [(quant_type, dtype) for quant_type in ("nf4", "fp4") for dtype in DTYPES]


class Honest:
    """The operator in three stages, each of which a defect replaces."""

    def __call__(
        self, codes: Tensor, scales: Tensor, blocksize: int, quant_type: str, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        assert shape == (len(scales), blocksize)
        assert codes.numel() * 2 == scales.numel() * blocksize
        high_first = torch.stack([codes >> 4, codes & 15], dim=1).view(shape)
        return self.rounded(self.scaled(self.looked_up(high_first, quant_type), scales), dtype)

    def looked_up(self, codes: Tensor, quant_type: str) -> Tensor:
        """[blocks, blocksize] fp32."""
        return torch.tensor(CODES[quant_type])[codes.int()]  # type: ignore[index]

    def scaled(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return numbers * scales[:, None]

    def rounded(self, products: Tensor, dtype: torch.dtype) -> Tensor:
        return products.to(dtype)


class LookedUp(Honest):
    """Numbers are spoiled; told are code and number."""

    def __init__(self, spoil: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.spoil = spoil

    def looked_up(self, codes: Tensor, quant_type: str) -> Tensor:
        return self.spoil(codes, super().looked_up(codes, quant_type))


class Scaled(Honest):
    def __init__(self, scaled: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.spoiled = scaled

    def scaled(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return self.spoiled(numbers, scales)


class Rounded(Honest):
    def __init__(self, rounded: Callable[[Tensor, torch.dtype], Tensor]) -> None:
        self.spoiled = rounded

    def rounded(self, products: Tensor, dtype: torch.dtype) -> Tensor:
        return self.spoiled(products, dtype)


class Decoded(Honest):
    """What comes out is spoiled, by its place."""

    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        self.spoil = spoil

    def rounded(self, products: Tensor, dtype: torch.dtype) -> Tensor:
        return self.spoil(super().rounded(products, dtype))


class LowNibbleFirst(Honest):
    def looked_up(self, codes: Tensor, quant_type: str) -> Tensor:
        return super().looked_up(codes.view(-1, 2).flip(1).view(codes.shape), quant_type)


def truncated(products: Tensor, dtype: torch.dtype) -> Tensor:
    """Towards zero, by dropping bits."""
    dropped = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    return (products.view(torch.int32) >> dropped << dropped).view(torch.float32).to(dtype)


class OneRounding(Honest):
    """The exact product is rounded once, not to fp32 first."""

    def scaled(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return numbers.double() * scales.double()[:, None]

    def rounded(self, products: Tensor, dtype: torch.dtype) -> Tensor:
        digits, smallest = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}[dtype]
        steps = 2.0 ** (products.frexp().exponent - digits).clamp(min=smallest).double()
        return ((products / steps).round() * steps).float().to(dtype)


def ties_away(products: Tensor, dtype: torch.dtype) -> Tensor:
    """Ties go away from zero, not to the even neighbour."""
    half = {torch.bfloat16: 2**15, torch.float16: 2**12}[dtype]
    bits = products.view(torch.int32)
    tie = (bits & (2 * half - 1)) == half
    return torch.where(tie & products.isfinite(), bits + half, bits).view(torch.float32).to(dtype)


def without_subnormals(products: Tensor, dtype: torch.dtype) -> Tensor:
    found = products.to(dtype)
    return torch.where(found.abs() < torch.finfo(dtype).tiny, 0.0 * found, found)


def saturating(products: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(dtype)
    return torch.where(products.isfinite(), products.clamp(limits.min, limits.max), products).to(dtype)


def changed(found: Tensor, rows: slice, columns: slice = slice(None)) -> Tensor:
    """Twice as large in some places."""
    found[rows, columns] *= 2
    return found


NARROW = ("bfloat16", "float16")
DEFECTS: dict[str, tuple[Honest, tuple[str, ...]]] = {
    "code 8 is a zero with a sign": (LookedUp(lambda codes, n: torch.where((codes == 8) & (n == 0), -n, n)), DTYPES),
    "zeros have no sign": (Rounded(lambda products, dtype: products.to(dtype) + 0.0), DTYPES),
    "low nibble first": (LowNibbleFirst(), DTYPES),
    "four digits": (LookedUp(lambda _, n: (n * 1e4).round() / 1e4), DTYPES),
    "the last bit": (LookedUp(lambda _, n: n * (1 + 2.0**-23)), DTYPES),
    "scales without sign": (Scaled(lambda n, scales: n * scales.abs()[:, None]), DTYPES),
    "one scale for all": (Scaled(lambda n, scales: n * scales[0]), DTYPES),
    "the next block's scale": (Scaled(lambda n, scales: n * scales.roll(-1)[:, None]), DTYPES),
    "scales in bf16": (Scaled(lambda n, scales: n * scales.bfloat16().float()[:, None]), DTYPES),
    "scales of 0 are 1e-38": (Scaled(lambda n, scales: n * scales.where(scales != 0, 1e-38)[:, None]), DTYPES),
    "NaN is 0": (Scaled(lambda n, scales: n * scales.nan_to_num(0.0, torch.inf, -torch.inf)[:, None]), DTYPES),
    "0 times inf is 0": (Scaled(lambda n, scales: (n * scales[:, None]).where(n != 0, 0.0)), DTYPES),
    "one rounding": (OneRounding(), NARROW),
    "truncated": (Rounded(truncated), NARROW),
    "ties away from zero": (Rounded(ties_away), NARROW),
    "subnormal numbers are 0": (Rounded(without_subnormals), ("float32", "float16")),
    "too large is the largest": (Rounded(saturating), NARROW),
    "infinite is the largest": (Rounded(lambda products, dtype: products.to(dtype).clamp(-65504.0, 65504.0)), DTYPES),
    "the last vector of a block": (Decoded(lambda found: changed(found, slice(None), slice(-8, None))), DTYPES),
    "the first number of a block": (Decoded(lambda found: changed(found, slice(None), slice(1))), DTYPES),
    "the last block of an odd count": (
        Decoded(lambda found: changed(found, slice(-1, None) if len(found) % 2 else slice(0))),
        DTYPES,
    ),
    "the only block": (Decoded(lambda found: changed(found, slice(1 if len(found) == 1 else 0))), DTYPES),
    "later blocks": (Decoded(lambda found: changed(found, slice(200, None))), DTYPES),
    **{
        f"blocks of {size}": (
            Decoded(lambda found, size=size: changed(found, slice(None if found.shape[1] == size else 0))),  # type: ignore[misc]
            DTYPES,
        )
        for size in BLOCKSIZES
    },
    "a row for all": (Decoded(lambda found: found.view(1, -1)[:, :-1]), DTYPES),
    "another dtype": (Rounded(lambda products, _: products.double()), DTYPES),
}


def spoils(name: str, quant_type: str) -> bool:
    """NF4 has no zero with a sign, and no zero under code 8."""
    return quant_type == "fp4" or name != "code 8 is a zero with a sign"


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Tensor], str, str], bool]]:
    """Whether an operator would be used for a format."""

    def ask(operator: Callable[..., Tensor], quant_type: str, dtype: str) -> bool:
        is_right.cache_clear()
        monkeypatch.setattr(_decode_kernel, "operator", lambda: operator)
        return is_right(quant_type, dtype)

    yield ask
    is_right.cache_clear()


@pytest.mark.parametrize(("quant_type", "dtype"), FORMATS)
def test_an_honest_kernel_is_trusted(trusted: Callable[..., bool], quant_type: str, dtype: str) -> None:
    """Or the others would be rejected for nothing."""
    assert trusted(Honest(), quant_type, dtype)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_spoiled_kernel_is_not(trusted: Callable[..., bool], name: str) -> None:
    kernel, dtypes = DEFECTS[name]
    for quant_type in ("nf4", "fp4"):
        for dtype in dtypes:
            assert trusted(kernel, quant_type, dtype) == (not spoils(name, quant_type)), (quant_type, dtype)


@pytest.mark.parametrize("code", range(16))
@pytest.mark.parametrize("low", [False, True], ids=["high nibble", "low nibble"])
def test_each_code_is_looked_at(trusted: Callable[..., bool], code: int, low: bool) -> None:
    """One code is wrong, in one nibble, in the last place of a block."""

    def spoil(codes: Tensor, numbers: Tensor) -> Tensor:
        places = torch.zeros_like(codes, dtype=torch.bool)
        places[:, -1 if low else -2] = True
        return torch.where(places & (codes == code), numbers + 0.5, numbers)

    for quant_type in ("nf4", "fp4"):
        assert not trusted(LookedUp(spoil), quant_type, "bfloat16")


@pytest.mark.parametrize(("quant_type", "dtype"), FORMATS)
def test_the_library_without_vectors(trusted: Callable[..., bool], quant_type: str, dtype: str) -> None:
    """Q2: its loop for processors without AVX-512, which all have, gives FP4's code 8 a sign, and is right else."""
    pytest.importorskip("bitsandbytes")
    operator = without_vectors(_decode_kernel.operator())
    found = operator(torch.tensor([0x80] * 16, dtype=torch.uint8), torch.ones(1), 32, "fp4", (1, 32), torch.float32)
    if not found.signbit().any():
        pytest.skip("this version of bitsandbytes gives code 8 no sign")
    assert trusted(operator, quant_type, dtype) == (quant_type == "nf4")
