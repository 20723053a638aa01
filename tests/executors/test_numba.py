"""The executor numba: compiled products of a few rows, beside those of torch."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch

import executors
from executors import nf4
from executors._pipeline import cpu_product
from executors._pipeline.loop import LoopProducts
from moe_ref import MoEConfig, MoEWeights

numba = pytest.importorskip("numba")

from executors._numba import kernels, launch, products  # noqa: E402
from executors._numba.products import NumbaProducts, few_rows  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COUNTS = (1, 0, 2, 3, 4, 5, 0, 7, 9)  # rows of each expert: all remainders of a tile, and none


@pytest.fixture(autouse=True)
def _same_numbers_and_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[0, 4, 100], ids=["none few", "some few", "all few"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Up to how many rows are compiled."""
    for table in ("BY_ROWS", "BY_COLUMNS", "OUTER"):
        monkeypatch.setattr(products, table, dict.fromkeys((True, False), request.param))
    return request.param


def stack(shape: tuple[int, int, int], dtype: torch.dtype, order: str) -> torch.Tensor:
    """[E, m, k] by rows, by columns, or a slice of something larger."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if order == "columns":
        return value.transpose(1, 2).contiguous().transpose(1, 2)
    if order == "slice":
        room = torch.full((shape[0] + 1, shape[1] + 3, shape[2] + 2), torch.nan, dtype=dtype)
        room[1:, 1:-2, 1:-1] = value
        return room[1:, 1:-2, 1:-1]
    return value


@pytest.mark.parametrize("order", ["rows", "columns", "slice"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (7, 17), (64, 100), (33, 513), (130, 6)])
def test_products_of_all_groups(limit: int, dtype: torch.dtype, order: str, m: int, k: int) -> None:
    """E2: every remainder of rows, columns and of what is summed over; a slot of no expert is left alone."""
    offsets = torch.tensor([0, *np.cumsum(COUNTS)])
    total = int(offsets[-1])
    matrices = stack((len(COUNTS), m, k), dtype, order)
    compiled = NumbaProducts(offsets)
    for method, inner in ((compiled.rows, k), (compiled.rows_back, m)):
        a = torch.randn(total + 2, inner).to(dtype)
        out = method(a, matrices)
        assert out.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        for expert, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            b = matrices[expert].double()
            b = b.t() if method == compiled.rows else b
            exact, terms = a[start:stop].double() @ b, a[start:stop].double().abs() @ b.abs()
            unit = torch.finfo(dtype).eps
            bound = unit * (exact.abs() + (6.2e-5 if dtype == torch.float16 else 0)) + 2.0**-21 * terms
            assert ((out[start:stop].double() - exact).abs() <= bound).all(), (expert, method)


@pytest.mark.parametrize("order", ["rows", "columns", "slice"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (7, 17), (33, 513), (130, 6)])
@pytest.mark.usefixtures("limit")
def test_outer_products_of_all_groups(dtype: torch.dtype, order: str, m: int, k: int) -> None:
    """E2, D2: one rounding of an fp32 sum, in the order of the stack; zeros for an expert without rows."""
    offsets = torch.tensor([0, *np.cumsum(COUNTS)])
    total = int(offsets[-1])
    like = stack((len(COUNTS), m, k), dtype, order)
    a, b = (torch.randn(total + 2, size).to(dtype) for size in (m, k))
    a[total:] = torch.nan
    out = NumbaProducts(offsets).outer(a, b, like, dtype)
    assert out.dtype == dtype
    assert out.stride() == torch.empty_like(like).stride()
    for expert, (start, stop) in enumerate(pairwise(offsets.tolist())):
        one, other = a[start:stop].double(), b[start:stop].double()
        exact, terms = one.t() @ other, one.t().abs() @ other.abs()
        unit = torch.finfo(dtype).eps / 2
        bound = unit * (exact.abs() + (6.2e-5 if dtype == torch.float16 else 0)) + 2.0**-21 * terms
        assert ((out[expert].double() - exact).abs() <= bound).all(), expert
        assert stop > start or not out[expert].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_to_nearest_ties_to_even(dtype: torch.dtype) -> None:
    """The middle between each number and the next, and its neighbours in fp32; NaN and infinity stay what they are."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middles = (numbers.double() + torch.nextafter(numbers.to(dtype), torch.tensor(torch.inf, dtype=dtype)).double()) / 2
    middles = middles.float()
    steps = [middles, *(torch.nextafter(middles, torch.tensor(sign * torch.inf)) for sign in (-1, 1)), numbers]
    broken = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC0FFFF], dtype=torch.int32).view(torch.float32)  # NaN
    given = torch.cat([*steps, broken])
    like = torch.empty(1, 1, len(given), dtype=dtype)
    out = NumbaProducts(torch.tensor([0, 1])).outer(torch.ones(1, 1), given[None], like, dtype)[0, 0]
    wanted = given.to(dtype)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out[~wanted.isnan()], wanted[~wanted.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("limit")
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    """How jobs are shared out changes nothing; nor do more threads than jobs."""
    matrices = stack((len(COUNTS), 130, 70), dtype, "rows")
    like = stack((len(COUNTS), 70, 70), dtype, "rows")
    a = torch.randn(sum(COUNTS), 70).to(dtype)
    found = []
    for count in (1, 2, 3, 64):
        torch.set_num_threads(count)
        compiled = NumbaProducts(torch.tensor([0, *np.cumsum(COUNTS)]))
        found.append((compiled.rows(a, matrices), compiled.rows_back(found[0][0].to(dtype) if found else
                      compiled.rows(a, matrices).to(dtype), matrices), compiled.outer(a, a, like, dtype)))  # fmt: skip
    if dtype == torch.float32 and min(products.BY_ROWS[True], products.BY_COLUMNS[True]) < max(COUNTS):
        return  # torch's own fp32 products: MKL's depend on the number of threads
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


def test_nan_and_infinity_stay_in_their_rows() -> None:
    """R4: sums may be reordered, but NaN and infinity are what they are."""
    matrices = stack((1, 40, 50), torch.bfloat16, "rows")
    a = torch.randn(4, 50).bfloat16()
    a[1, 3], a[2, 7] = torch.nan, torch.inf
    out = NumbaProducts(torch.tensor([0, 4])).rows(a, matrices)
    assert out[1].isnan().all()
    assert out[2].isinf().all()
    assert out[[0, 3]].isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 9])
def test_infinity_is_multiplied_once(size: int) -> None:
    """R4: where numbers are taken by fours, what is missing to four is not 0 times the last: 0 inf is NaN."""
    for rows in (1, 2, 3, 5, 7):
        products_ = NumbaProducts(torch.tensor([0, rows]))
        a = torch.ones(rows, size).bfloat16()
        matrix = torch.ones(1, size, 9).bfloat16()
        matrix[0, -1, 4] = torch.inf
        for product in (products_.rows_back(a, matrix), products_.rows(a, matrix.transpose(1, 2).contiguous())):
            assert product[:, 4].isposinf().all()
            assert (product[:, :4] == size).all()
        b = torch.ones(rows, 9).bfloat16()
        b[-1, 4] = torch.inf
        gradient = products_.outer(a, b, matrix, torch.bfloat16)[0]
        assert gradient[:, 4].isposinf().all()
        assert (gradient[:, 5:] == rows).all()


def test_few_rows_depend_on_the_processor_and_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows are left to torch where it has instructions of 16 bits; other strides always."""
    b = torch.zeros(8, 6, dtype=torch.bfloat16)
    for able in (True, False):
        monkeypatch.setattr(cpu_product, "multiplies", lambda _dtype, able=able: able)
        assert few_rows(b) == products.BY_COLUMNS[able]
        assert few_rows(b.t()) == products.BY_ROWS[able]
    assert few_rows(torch.zeros(8, 6, 2)[..., 0]) == 0
    assert few_rows(b.double()) == 0


def test_shares_are_of_the_same_cost() -> None:
    """Bounds of jobs: contiguous, all of them, none twice."""
    rng = np.random.default_rng(0)
    for jobs, count in ((1, 4), (7, 2), (100, 3), (64, 8)):
        costs = rng.integers(1, 50, jobs)
        bounds = launch.bounds(costs, count)
        assert bounds[0] == 0
        assert bounds[-1] == jobs
        assert (np.diff(bounds) >= 0).all()
        heaviest = max(costs[a:b].sum() for a, b in pairwise(bounds))
        assert heaviest <= costs.sum() / count + costs.max()


def _call_in_a_child(queue: "multiprocessing.Queue[bool]") -> None:
    torch.set_num_threads(1)  # as a worker of torch's DataLoader has it
    queue.put(_layer_is_right())


def _layer_is_right() -> bool:
    generator = torch.Generator().manual_seed(0)
    gate_up, down, x, logits = (
        torch.randn(*shape, generator=generator) for shape in ((4, 64, 32), (4, 32, 32), (3, 32), (3, 4))
    )
    weights = MoEWeights(gate_up, down, config=MoEConfig(2))
    compiled, plain = (executors.get(name)(x, logits, weights) for name in ("numba", "native"))
    return bool(torch.allclose(compiled, plain, rtol=1e-4, atol=1e-4))


def test_it_works_after_a_fork() -> None:
    """A child process with one thread never enters OpenMP, which ends a child that does."""
    torch.set_num_threads(2)
    assert _layer_is_right()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_call_in_a_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60)
    finally:
        child.kill()
        child.join()


def test_python_threads_may_call_it_at_once() -> None:
    """Calls from several threads wait for each other, and leave Numba's own number of threads as it was."""
    torch.set_num_threads(2)
    before = numba.get_num_threads()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: _layer_is_right(), range(16)))
    assert numba.get_num_threads() == before


def test_the_loop_is_the_same_layer() -> None:
    """Few and many rows, forward and backward, agree with the loop of native."""
    assert issubclass(NumbaProducts, LoopProducts)
    assert _layer_is_right()


def test_without_a_place_for_the_cache_it_compiles_in_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba raises where no folder can be written."""
    njit = kernels.njit
    kept: list[bool] = []

    def refusing(cache: bool = False, **options: object) -> object:
        kept.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(kernels, "njit", refusing)

    def twice(number: float) -> float:
        return 2 * number

    assert kernels.compiled(twice)(3.0) == 6.0
    assert kept == [True, False]


@pytest.mark.parametrize(("able", "rows"), [(True, 4), (False, 512)])
def test_explain_says_up_to_how_many_rows_are_compiled(able: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the processor can, and the kind of weights."""
    monkeypatch.setattr(cpu_product, "multiplies", lambda _dtype: able)
    weights = MoEWeights(torch.zeros(2, 64, 32).bfloat16(), torch.zeros(2, 32, 32).bfloat16(), config=MoEConfig(1))
    for given, expected in ((weights, rows), (nf4.quantize(weights), max(rows, 16))):
        (row,) = (row for row in executors.explain(torch.zeros(1, 32).bfloat16(), given) if row.name == "numba")
        assert row.note.startswith(f"products of up to {expected} rows of an expert are compiled; products in ")
