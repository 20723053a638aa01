"""The executor of PTX on floats: each instruction against torch, NumPy, fractions or the bounds of the ISA."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from bitwise import bits, same, special
from by_hand import by_hand
from moe_ref.conformance.ptx.approximations import BOUNDS, FUNCTIONS, Approximate
from moe_ref.conformance.ptx.executed import executed
from moe_ref.conformance.ptx.launch import How

INTEGERS = torch.tensor([0, 1, -1, 2, 7, -7, 31, 33, 2**31 - 1, -(2**31), 12345, -99999, 1 << 20, 3, 5, -3])


@triton.jit
def contracted(a, b, c, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.fma(tl.load(a + i), tl.load(b + i), tl.load(c + i)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fma_rounds_once(dtype: torch.dtype) -> None:
    """Also where a sum in fp64 is half way between two numbers in fp32, and where the result is subnormal."""
    rng = np.random.default_rng(0)
    a, b, c = (torch.from_numpy(rng.normal(size=1024)).to(dtype) for _ in range(3))
    a[:256] = 1 + 2.0**-12 * torch.from_numpy(rng.integers(-5, 5, 256)).to(dtype)
    b[:256] = 1 + 2.0**-12 * torch.from_numpy(rng.integers(-5, 5, 256)).to(dtype)
    c[:256] = 2.0 ** -torch.from_numpy(rng.integers(20, 90, 256)).to(dtype)
    c[256:512] = -(a * b)[256:512]
    if dtype == torch.float32:
        a[512:640] *= 2.0**-70
        b[512:640] *= 2.0**-66
        c[512:640] *= 2.0**-133
    with executed():
        out = torch.empty(1024, dtype=dtype)
        contracted[(1,)](a, b, c, out, BLOCK=1024)
    for found, x, y, z in zip(out.tolist(), a.tolist(), b.tolist(), c.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        around = [np.nextafter(out.numpy().dtype.type(found), way) for way in (-np.inf, np.inf)]
        error = abs(Fraction(found) - exact)
        assert all(error <= abs(Fraction(float(other)) - exact) for other in around), (x, y, z)
        if any(error == abs(Fraction(float(other)) - exact) for other in around):
            mantissa = np.array(found, out.numpy().dtype).view(f"u{dtype.itemsize}")
            assert mantissa % 2 == 0, "a tie must go to the even neighbour"


@triton.jit
def compared(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, (x < y).to(tl.int8))
    tl.store(out + BLOCK + i, (x != y).to(tl.int8))
    tl.store(out + 2 * BLOCK + i, (x >= y).to(tl.int8))
    tl.store(out + 3 * BLOCK + i, (x == y).to(tl.int8))
    tl.store(out + 4 * BLOCK + i, (x != x).to(tl.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_comparisons_with_nan(dtype: torch.dtype) -> None:
    some = special(dtype)[:16]
    a, b = (grid.reshape(-1).contiguous() for grid in torch.meshgrid(some, some, indexing="ij"))
    with executed():
        out = torch.empty(5, 256, dtype=torch.int8)
        compared[(1,)](a, b, out, BLOCK=256)
    expected = torch.stack([a < b, a != b, a >= b, a == b, a != a])
    same(out, expected.to(torch.int8))


@triton.jit
def cast(a, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(a + i).to(out.dtype.element_ty))


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_casts(dtype: torch.dtype, to: torch.dtype) -> None:
    a = special(dtype)
    if dtype == torch.float32:  # half way between two numbers of 16 bits
        a[128:] = ((bits(a[128:]) & -0x10000) | 0x8000).view(torch.float32)
    if dtype == torch.float64 and to == torch.bfloat16:
        a = a.float().double()
    with executed():
        out = torch.empty(256, dtype=to)
        cast[(1,)](a, out, BLOCK=256)
    same(out, a.to(to))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8, torch.uint8, torch.int16])
def test_casts_of_integers(dtype: torch.dtype) -> None:
    a = INTEGERS.repeat(4).to(torch.int32)
    with executed():
        out, back = torch.empty(64, dtype=dtype), torch.empty(64)
        cast[(1,)](a, out, BLOCK=64)
        cast[(1,)](a, back, BLOCK=64)
        whole = torch.empty(64, dtype=torch.int32)
        cast[(1,)](torch.linspace(-9, 9, 64), whole, BLOCK=64)
    same(out, a.to(dtype))
    same(back, a.float())
    same(whole, torch.linspace(-9, 9, 64).trunc().int())


@triton.jit
def functions(a, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(a + i)
    tl.store(out + i, tl.exp(x))
    tl.store(out + BLOCK + i, tl.log(tl.abs(x) + 0.1))
    tl.store(out + 2 * BLOCK + i, tl.sqrt(tl.abs(x)))
    tl.store(out + 3 * BLOCK + i, tl.erf(x))
    tl.store(out + 4 * BLOCK + i, 1.0 / (x * x + 0.5))
    tl.store(out + 5 * BLOCK + i, tl.rsqrt(x * x + 0.5))
    tl.store(out + 6 * BLOCK + i, tl.exp2(x))
    tl.store(out + 7 * BLOCK + i, tl.log2(tl.abs(x) + 3))
    tl.store(out + 8 * BLOCK + i, tl.sqrt_rn(tl.abs(x)))
    tl.store(out + 9 * BLOCK + i, tl.div_rn(x, x * x + 0.5))


@pytest.mark.parametrize("seed", [None, 3])
def test_functions(seed: int | None) -> None:
    a = torch.cat([torch.linspace(-8, 8, 512), torch.randn(512, generator=torch.Generator().manual_seed(0)) * 0.01])
    with executed(how=How(seed=seed)):
        out = torch.empty(10, 1024)
        functions[(1,)](a, out, BLOCK=1024)
    x = a.double()
    exact = torch.stack(
        [
            *(x.exp(), (x.abs() + 0.1).log(), x.abs().sqrt(), x.erf(), 1 / (x * x + 0.5), (x * x + 0.5).rsqrt()),
            *(x.exp2(), (x.abs() + 3).log2(), x.abs().sqrt(), x / (x * x + 0.5)),
        ]
    )
    torch.testing.assert_close(out.double(), exact, rtol=4e-6, atol=2e-6)
    n = a.numpy()  # torch's own square root is not always rounded to nearest
    same(out[8], torch.from_numpy(np.sqrt(abs(n))))
    same(out[9], torch.from_numpy(n / (n.astype(np.float64) ** 2 + 0.5).astype(np.float32)))
    if seed is None:
        with executed(how=How(seed=3)):
            other = torch.empty(10, 1024)
            functions[(1,)](a, other, BLOCK=1024)
        assert not torch.equal(out[:6], other[:6]), "a seed must draw errors"
        assert torch.equal(out[8:], other[8:])


@triton.jit
def narrow(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x * y)
    tl.store(out + BLOCK + i, x + y)
    tl.store(out + 2 * BLOCK + i, x - y)
    tl.store(out + 3 * BLOCK + i, (x.to(tl.float32) + 0.0).to(x.dtype))
    tl.store(out + 4 * BLOCK + i, tl.abs(-x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_in_16_bits(dtype: torch.dtype) -> None:
    """Two numbers side by side, rounded once."""
    a, b = special(dtype), special(dtype).flip(0)
    b[3:9] = a[3:9]
    with executed():
        out = torch.empty(5, 256, dtype=dtype)
        narrow[(1,)](a, b, out, BLOCK=256)
    x, y = a.double(), b.double()
    same(out[0], (x * y).float().to(dtype) if dtype == torch.bfloat16 else (x * y).to(dtype))
    same(out[1], (a.float() + b.float()).to(dtype))
    same(out[2], (a.float() - b.float()).to(dtype))
    same(out[3], (a.float() + 0.0).to(dtype))
    same(out[4], (-a).abs())


@pytest.mark.parametrize("mode", ["", ".rn"])
def test_contraction(mode: str) -> None:
    """(1 + 2^-12)^2 - 1 - 2^-11 is 2^-24, or 0 if the product rounds first; a rounding mode forbids contraction."""
    body = f"""
	mov.b32 	%r3, 0f3F800800;
	mul{mode}.f32 	%r4, %r3, %r3;
	sub{mode}.f32 	%r2, %r4, 0f3F801000;
"""
    found = [float(by_hand(body, How(contracts=contracts)).view(torch.float32)[0]) for contracts in (False, True)]
    assert found == [0.0, 0.0 if mode else 2.0**-24]


@pytest.mark.parametrize(
    ("relation", "holds"),
    [
        ("eq", (0, 0)),
        ("ne", (1, 0)),
        ("neu", (1, 1)),
        ("lt", (1, 0)),
        ("geu", (0, 1)),
        ("nan", (0, 1)),
        ("num", (1, 0)),
    ],
)
def test_comparisons(relation: str, holds: tuple[int, int]) -> None:
    """1 with 2, and with a NaN."""
    for other, expected in zip(("0f40000000", "0f7FC00000"), holds, strict=True):
        lines = ["mov.b32 %r3, 0f3F800000;", f"setp.{relation}.f32 %p2, %r3, {other};", "selp.b32 %r2, 1, 0, %p2;"]
        assert by_hand("\n".join(["", *lines, ""])).tolist() == [expected] * 64


def ulp(value: np.ndarray) -> np.ndarray:
    return np.spacing(np.abs(value)).astype(np.float64)


# What PTX ISA 9.2 says of each: from the exact result, the nearest one and the operand to the most it may be off.
ALLOWED = {
    "div": lambda _exact, nearest, _: 2 * ulp(nearest),
    "rcp": lambda _exact, nearest, _: ulp(nearest),
    "sqrt": lambda exact, *_: np.abs(exact) * 2.0**-23,
    "rsqrt": lambda exact, *_: np.abs(exact) * 2.0**-22.9,
    "ex2": lambda exact, nearest, _: 2 * ulp(nearest) + np.abs(nearest - exact),  # from the correctly rounded result
    "lg2": lambda exact, _, x: np.where((x > 0.5) & (x < 2), 2.0**-22, np.abs(exact) * 2.0**-22),
    "tanh": lambda exact, *_: np.abs(exact) * 2.0**-11,
    "sin": lambda _exact, _nearest, x: np.where(np.abs(x) <= 2 * np.pi, 2.0**-20.5, 2.0**-14.7),
}
ALLOWED["cos"] = ALLOWED["sin"]
NARROW = {
    ("ex2", "f16"): lambda exact: np.abs(exact) * 2.0**-9.9,
    ("ex2", "bf16"): lambda exact: np.abs(exact) * 2.0**-7,
    ("tanh", "f16"): lambda exact: np.full(exact.shape, 2.0**-10.987),
    ("tanh", "bf16"): lambda exact: np.full(exact.shape, 2.0**-8),
}


@pytest.mark.parametrize(("name", "kind"), BOUNDS)
def test_approximations_are_off_by_as_much_as_the_isa_allows(name: str, kind: str) -> None:
    """And by no more; the same for the same number."""
    rng = np.random.default_rng(0)
    x = (rng.uniform(0.01, 250, 4096) if name != "ex2" else rng.uniform(-13, 15, 4096)).astype(np.float32)
    x[::2] = rng.uniform(0.3, 3, 2048)
    given = [x, x[::-1].copy()] if name == "div" else [x]
    if kind == "f16":
        given = [own.astype(np.float16) for own in given]
    exact = FUNCTIONS[name](*(own.astype(np.float64) for own in given))
    nearest = Approximate(None)(name, kind, *given)
    most = NARROW[name, kind](exact) if (name, kind) in NARROW else ALLOWED[name](exact, nearest, x)
    assert (np.abs(nearest - exact) <= most).all()
    for seed in (1, 2):
        found = Approximate(seed)(name, kind, *given)
        assert found.dtype == nearest.dtype
        off = np.abs(found.astype(np.float64) - exact) / most
        assert off.max() <= 1
        assert off.max() > 0.8
        assert (Approximate(seed)(name, kind, *(own[::-1] for own in given)) == found[::-1]).all()


def test_approximations_of_zeros_infinities_and_nan() -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 1e-45], np.float32)
    inf, nan = np.inf, np.nan
    expected = {
        "rcp": [inf, -inf, 0, -0.0, nan, None, inf],
        "sqrt": [0, -0.0, inf, nan, nan, None, None],
        "rsqrt": [inf, -inf, 0, nan, nan, None, None],
        "ex2": [1, 1, inf, 0, nan, None, None],
        "lg2": [-inf, -inf, inf, nan, nan, None, None],
        "tanh": [0, -0.0, 1, -1, nan, None, 1e-45],
        "sin": [0, -0.0, nan, nan, nan, None, None],
        "cos": [1, 1, nan, nan, nan, None, None],
    }
    for name, wanted in expected.items():
        with np.errstate(all="ignore"):
            found = Approximate(5)(name, "f32", x)
        for own, value, of in zip(found, wanted, x, strict=True):
            if value is not None:
                assert np.float32(value).tobytes() == own.tobytes() or (np.isnan(value) and np.isnan(own)), (name, of)


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("div.full.f32 %r2, 0f3F800000, %r3;", lambda x: 1 / x),
        ("rcp.approx.ftz.f32 %r2, %r3;", lambda x: 1 / x),
        ("sqrt.approx.f32 %r2, %r3;", np.sqrt),
        ("rsqrt.approx.ftz.f32 %r2, %r3;", lambda x: 1 / np.sqrt(x)),
        ("ex2.approx.f32 %r2, %r3;", np.exp2),
        ("lg2.approx.f32 %r2, %r3;", np.log2),
        ("tanh.approx.f32 %r2, %r3;", np.tanh),
        ("sin.approx.f32 %r2, %r3;", np.sin),
        ("cos.approx.ftz.f32 %r2, %r3;", np.cos),
    ],
)
def test_approximations_by_hand(text: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rounded to nearest without a seed, and off with one."""
    head = "\n	cvt.rn.f32.u32 %r3, %r1;\n	fma.rn.f32 %r3, %r3, 0f3D4CCCCD, 0f3DCCCCCD;\n	"
    x = (np.arange(64) * float(np.float32(0.05)) + float(np.float32(0.1))).astype(np.float32).astype(np.float64)
    found = by_hand(f"{head}{text}\n").view(torch.float32)
    assert found.tolist() == function(x).astype(np.float32).tolist()
    assert found.tolist() != by_hand(f"{head}{text}\n", How(seed=1)).view(torch.float32).tolist()


def test_fast_division_by_large_numbers() -> None:
    """Beyond 2^126 ``div.approx`` gives a zero, and a NaN of infinity; ``div.full`` divides."""
    large = "0f7F000000"  # 2^127
    for form, of, expected in (
        ("approx", "0f7F000000", 0.0),
        ("approx", "0fFF000000", -0.0),
        ("approx", "0f7F800000", math.nan),
        ("full", "0f7F000000", 1.0),
    ):
        body = f"\n	mov.b32 %r3, {of};\n	mov.b32 %r4, {large};\n	div.{form}.f32 %r2, %r3, %r4;\n"
        found = by_hand(body).view(torch.float32)[:1]
        same(found, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["mov.b32 %r3, 0f7FC00000;", "cvt.rzi.s32.f32 %r2, %r3;"], 0),
        (["mov.b32 %r3, 0f7FC00000;", "cvt.rzi.s64.f32 %rd4, %r3;", "mov.b64 {%r4, %r2}, %rd4;"], -(2**31)),
        (["mov.b64 %rd4, 0d7FF8000000000000;", "cvt.rzi.s32.f64 %r2, %rd4;"], -(2**31)),
        (["mov.b64 %rd4, 0d7FF8000000000000;", "cvt.rzi.u32.f64 %r2, %rd4;"], -(2**31)),
        (["mov.b32 %r3, 0f00000001;", "cvt.rpi.s32.f32 %r2, %r3;"], 1),
        (["mov.b32 %r3, 0f00000001;", "cvt.rpi.ftz.s32.f32 %r2, %r3;"], 0),
        (["mov.b16 %rs1, 1;", "cvt.ftz.f32.f16 %r2, %rs1;"], 0x33800000),  # 2^-24 is subnormal in fp16 only
        (["mov.b32 %r3, 0x00010400;", "mov.b32 %r4, 0;", "add.f16x2 %r2, %r3, %r4;"], 0x00010400),
        (["mov.b32 %r3, 0x00010400;", "mov.b32 %r4, 0;", "add.ftz.f16x2 %r2, %r3, %r4;"], 0x00000400),
        (["mov.b32 %r3, 0x00010400;", "mov.b32 %r4, 0x6C006C00;", "mul.f16x2 %r2, %r3, %r4;"], 0x0C003400),
        (["mov.b32 %r3, 0x00010400;", "mov.b32 %r4, 0x6C006C00;", "mul.ftz.f16x2 %r2, %r3, %r4;"], 0x00003400),
    ],
)
def test_conversions_and_flushing(lines: list[str], expected: int) -> None:
    """NaN as an integer; ``.ftz`` is of fp32 in a conversion, and of both halves of a word."""
    assert by_hand("\n".join(["", *lines, ""])).tolist() == [expected] * 64
