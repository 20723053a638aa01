"""The product of rows with a matrix on a CPU, with and without instructions of 16 bits, and fp16's range on a GPU."""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import executors
from executors._pipeline import cpu_product, half
from executors._pipeline.grouped import GroupedProducts
from executors._pipeline.loop import LoopProducts
from moe_ref import MoEConfig, MoEWeights

NARROW = (torch.bfloat16, torch.float16)
SIZES = [(1, 8, 8), (2, 17, 5), (3, 64, 33), (5, 1, 1), (7, 130, 70), (1, 300, 90)]


@pytest.fixture(params=[False, True], ids=["without", "with"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor without, or with, instructions of 16 bits, as far as the choice goes."""
    monkeypatch.setattr(cpu_product, "multiplies", lambda dtype: request.param or dtype not in NARROW)
    return request.param


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_product, "SLICE", 200)
    return


def matrix(k: int, m: int, dtype: torch.dtype, order: str) -> torch.Tensor:
    """[k, m], stored by rows, by columns, or with gaps between all numbers."""
    value = torch.randn(k, m, generator=torch.Generator().manual_seed(k + m)).to(dtype)
    if order == "columns":
        return value.t().contiguous().t()
    if order == "gaps":
        return torch.stack([value, torch.full_like(value, torch.nan)], dim=-1)[..., 0]
    return value


def demand_rounded_once(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """E2: sums in fp32, then one rounding to out's dtype (and before it one to fp16, where products are in fp16)."""
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    unit = max(torch.finfo(d).eps for d in (out.dtype, *([b.dtype] if b.dtype == torch.float16 else [])))
    least = torch.finfo(torch.float16).tiny if torch.float16 in (out.dtype, b.dtype) else 0.0
    bound = unit * (exact.abs() + least) + 2.0**-22 * terms
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("order", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.usefixtures("small_slices")
def test_products_are_rounded_once(instructions: bool, dtype: torch.dtype, order: str) -> None:
    """E2: whatever the sizes, the order in which the matrix is stored, and the processor."""
    for n, k, m in SIZES:
        a, b = torch.randn(n, k).to(dtype), matrix(k, m, dtype, order)
        for out in (torch.empty(n, m, dtype=dtype), torch.empty(n, m)):
            if out.dtype == torch.float32 and dtype == torch.bfloat16:
                continue  # only beside fp16
            cpu_product.multiply(a, b, out.fill_(torch.nan))
            demand_rounded_once(out, a, b)


@pytest.mark.parametrize(
    ("left", "right"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float16)],
)
@pytest.mark.usefixtures("small_slices")
def test_outer_products_are_rounded_once(instructions: bool, left: torch.dtype, right: torch.dtype) -> None:
    """E2: also of one row, and of fp32 beside fp16."""
    for n, m, k in [(1, 40, 17), (2, 8, 8), (5, 33, 70), (40, 70, 9)]:
        a, b = torch.randn(n, m).to(left), torch.randn(n, k).to(right)
        out = torch.full((m, k), torch.nan, dtype=right)
        cpu_product.multiply_outer(a, b, out)
        demand_rounded_once(out, a.t(), b)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_threads_change_no_bit(dtype: torch.dtype, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without instructions of 16 bits a result does not depend on the number of threads."""
    monkeypatch.setattr(cpu_product, "multiplies", lambda dtype: dtype not in NARROW)
    threads = torch.get_num_threads()
    try:
        for n, k, m in [
            (1, 2048, 256),
            (3, 2880, 85),
            (8, 2880, 128),
            (64, 2880, 256),
            (33, 2048, 16),
            (100, 512, 300),
        ]:
            a, b = torch.randn(n, k).to(dtype), matrix(k, m, dtype, order)
            found = []
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                out, outer = torch.empty(n, m, dtype=dtype), torch.empty(k, m, dtype=dtype)
                cpu_product.multiply(a, b, out)
                cpu_product.multiply_outer(a, out, outer)
                found.append((out, outer))
            for others in found[1:]:
                for one, other in zip(found[0], others, strict=True):
                    assert torch.equal(one, other), (n, k, m)
    finally:
        torch.set_num_threads(threads)


class Calls(TorchDispatchMode):
    """Lists the dtype and rows of each product, and the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[torch.dtype, int]] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **kwargs or {})
        if func.name() in ("aten::mm", "aten::mm.out", "mkldnn::_linear_pointwise"):
            self.products.append((args[1].dtype, args[0].shape[0]))
        elif func.name().startswith(("aten::empty", "aten::new_empty", "aten::_to_copy", "aten::clone")):
            self.largest = max(self.largest, out.numel())
        return out


def calls_of(multiply: Callable[..., None], *tensors: torch.Tensor) -> Calls:
    with Calls() as calls:
        multiply(*tensors)
    return calls


@pytest.mark.parametrize("dtype", NARROW)
def test_the_processor_decides_and_few_rows(
    instructions: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own 16-bit product where there are instructions for it, or few rows and a matrix stored by columns."""
    monkeypatch.setattr(cpu_product, "_has_amx", lambda: False)
    few = cpu_product.FEW_ROWS
    for order, n in product(("rows", "columns"), (1, few, few + 1)):
        tensors = torch.zeros(n, 8, dtype=dtype), matrix(8, 6, dtype, order), torch.empty(n, 6, dtype=dtype)
        calls = calls_of(cpu_product.multiply, *tensors)
        narrow = instructions or (order == "columns" and n <= few)
        assert {kind for kind, _ in calls.products} == {dtype if narrow else torch.float32}, (order, n)


def test_no_more_than_a_slice_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extra memory: a slice of the matrix, and what the rows take."""
    monkeypatch.setattr(cpu_product, "multiplies", lambda dtype: dtype not in NARROW)
    monkeypatch.setattr(cpu_product, "SLICE", 2**12)
    for order in ("rows", "columns"):
        b = matrix(256, 512, torch.bfloat16, order)
        calls = calls_of(cpu_product.multiply, torch.zeros(8, 256, dtype=b.dtype), b, b.new_empty(8, 512))
        assert 0 < calls.largest <= 2**12
    a, b = torch.zeros(8, 256, dtype=torch.bfloat16), torch.zeros(8, 256, dtype=torch.bfloat16)
    assert calls_of(cpu_product.multiply_outer, a, b, a.new_empty(256, 256)).largest <= 2**12


def test_instructions_of_fp16_are_used_only_where_all_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """E7: a result, or an operand, past the range of fp16 takes the product in fp32."""
    monkeypatch.setattr(cpu_product, "multiplies", lambda _dtype: True)
    b = torch.full((4, 2), 256.0, dtype=torch.float16)
    within = torch.ones(2, 4, dtype=torch.float16)
    for a, narrow, widened in ((within, True, False), (255 * within, True, True), (1e6 * within.float(), True, True)):
        out = torch.empty(2, 2)
        calls = calls_of(cpu_product.multiply, a, b, out)
        assert (out == 1024 * a[0, 0].float()).all()
        kinds = {kind for kind, _ in calls.products}
        assert (torch.float16 in kinds, torch.float32 in kinds) == (narrow, widened)


def test_bf16_is_not_trusted_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN emulates products of bf16, slowly, on processors that have AVX-512 and lack AVX512_BF16."""
    monkeypatch.setattr(cpu_product, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not cpu_product.multiplies.__wrapped__(torch.bfloat16)
    monkeypatch.setattr(cpu_product, "_has_onednn", lambda: False)
    assert not any(cpu_product.multiplies.__wrapped__(dtype) for dtype in NARROW)


@pytest.mark.parametrize("k", [7, 9, 17, 34, 50, 96, 176, 208])
def test_rows_stay_apart(k: int) -> None:
    """R4: with AMX oneDNN multiplies what follows a row by zeros, which a NaN survives, unless rows are whole tiles."""
    for order in ("rows", "columns"):
        a, b = torch.randn(33, k).bfloat16(), matrix(k, 48, torch.bfloat16, order)
        a[16], out = torch.nan, torch.empty(33, 48, dtype=torch.bfloat16)
        cpu_product.multiply(a, b, out)
        matrices = b.t()[None].contiguous() if order == "columns" else b.t()[None]
        grouped = GroupedProducts(torch.tensor([0, 33]))
        for found in (out, grouped.rows(a, matrices), grouped.rows_back(a, matrices.transpose(1, 2))):
            assert found.isnan().any(dim=1).nonzero().flatten().tolist() == [16]


def test_rows_of_whole_tiles_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule costs nothing for sizes that models have."""
    for amx, k, apart in ((True, 2880, True), (True, 176, False), (False, 176, True)):
        monkeypatch.setattr(cpu_product, "_has_amx", lambda amx=amx: amx)
        assert cpu_product.keeps_rows_apart(torch.bfloat16, k) == apart
    assert cpu_product.keeps_rows_apart(torch.float32, 7)


def test_without_onednn_fp32_products_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch without oneDNN has the same products."""
    monkeypatch.setattr(cpu_product, "_has_onednn", lambda: False)
    a, b = torch.randn(5, 9).bfloat16(), matrix(9, 4, torch.bfloat16, "rows")
    out = torch.empty(5, 4, dtype=torch.bfloat16)
    cpu_product._multiply_widened(a.float(), b, out)
    demand_rounded_once(out, a, b)


@pytest.mark.parametrize("name", ["native", "grouped_mm"])
def test_explain_names_the_products(name: str, instructions: bool) -> None:
    """Which product a call takes on this machine is told."""
    weights = MoEWeights(torch.zeros(2, 4, 3).bfloat16(), torch.zeros(2, 3, 2).bfloat16(), config=MoEConfig(1))
    rows = {row.name: row for row in executors.explain(torch.zeros(1, 3).bfloat16(), weights)}
    wanted = "instructions for them" if instructions else "no instructions for bfloat16"
    assert wanted in rows[name].note


@pytest.mark.parametrize("largest", [1.0, 40000.0, 1e6, 3e30])
def test_fp16_on_a_gpu_is_scaled_by_powers_of_two(largest: float) -> None:
    """E7: rows of the left operand, and columns of the right one, past the range; others are multiplied as they are."""
    a, b = torch.randn(3, 16), torch.randn(16, 5).half()
    a[1] *= largest / a[1].abs().amax()
    a = a.half().float() if largest < 30000 else a
    out = torch.empty(3, 5)
    half.multiply(a, b, out)
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((out.double() - exact).abs() <= 2.0**-11 * terms).all()
    turned = torch.empty(5, 3)
    half.multiply(b.t(), a.t(), turned)
    assert torch.equal(turned, out.t())
    fitted, scale = half._fitted(a, 1)
    assert fitted.isfinite().all()
    assert scale is not None
    assert ((scale == 1) == (a.abs().amax(1, keepdim=True) <= torch.finfo(torch.float16).max)).all()
    a[2, 0] = torch.nan
    half.multiply(a, b, out)
    assert out[2].isnan().all()
    assert out[:2].isfinite().all()


def test_a_single_large_row_is_paired_only_where_it_pays() -> None:
    """A large matrix of a dtype with instructions: one row takes the next with it, which is then written over."""
    products = LoopProducts(torch.tensor([0, 1, 2]))
    a, matrices = torch.randn(2, 512), torch.randn(2, 512, 512)
    expected = torch.stack([matrices[0] @ a[0], matrices[1] @ a[1]])
    calls = calls_of(lambda: products.rows(a, matrices))
    assert [n for _, n in calls.products] == [2, 1]
    torch.testing.assert_close(products.rows(a, matrices), expected, rtol=1e-4, atol=1e-4)
    small = calls_of(lambda: products.rows(a[:, :8], matrices[:, :8, :8]))
    assert [n for _, n in small.products] == [1, 1]
