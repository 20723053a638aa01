"""The command ``tune``: its search, what it admits, and what it prints and stores. Times are made up."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import executors
from executors._bench.layers import LAYERS, Shape, random_layer, with_adapters
from executors._bench.routing import batch
from executors._cli.app import app
from executors._triton import interpreter, tuned_file
from executors._triton import layer as _layer
from executors._triton.configs import FAMILIES, KernelConfig, Tile
from executors._triton.device import INTERPRETED
from executors._triton.tuned_file import PRODUCTS, SHARING
from executors._tune import choice as tune_choice
from executors._tune.contest import Contest, Duel, agree
from executors._tune.moves import fits, moves, with_rows
from executors._tune.search import Search
from executors._tune.workload import LAYER, Workload
from moe_ref import MoEConfig
from triton_cases import DEVICE, python

TILE = Tile(32, 64, 32, 4, 2, 1)
SHIPPED = KernelConfig(16.0, *[TILE] * len(PRODUCTS))
TOY = Shape("toy", 4, 32, 32, MoEConfig(2), biases=True)
SIZES = ("--experts", 4, "--top-k", 2, "--hidden", 32, "--intermediate", 32)
QUICK = (*SIZES, "--tokens", 6, "--seconds", 0.5, "--direction", "forward")

Times = Callable[[str, KernelConfig], float]


class Made:
    """Products whose time is known, of which some tiles are wrong and others do not compile."""

    def __init__(self, times: Times, wrong: Callable[[Tile], bool], fails: Callable[[Tile], bool]) -> None:
        self.times, self.wrong, self.fails = times, wrong, fails
        self.launched: list[tuple[str, KernelConfig]] = []

    def run(self, product: str, config: KernelConfig) -> list[torch.Tensor]:
        tile = config.up if product == LAYER else getattr(config, product)
        if self.fails(tile):
            raise RuntimeError("out of resources")
        self.launched.append((product, config))
        return [torch.full((4, 4), 2.0 if self.wrong(tile) else 1.0)]

    def clock(self, action: Callable[[], object]) -> float:
        action()
        return self.times(*self.launched[-1])


def never(_tile: Tile) -> bool:
    return False


def searched(
    times: Times,
    products: tuple[str, ...] = ("up", "down"),
    wrong: Callable[[Tile], bool] = never,
    fails: Callable[[Tile], bool] = never,
    seconds: float = 10_000,
) -> Search:
    """A search in which looking at the time takes a second."""
    made = Made(times, wrong, fails)
    contest, ticks = Contest(made, SHIPPED, made.clock, 3), iter(range(10**6))
    search = Search(contest, products, 2, "sm90", 227 * 1024, now=lambda: next(ticks))
    search.go(seconds)
    return search


def away(tile: Tile, best: Tile) -> float:
    """A second, and more with each step from the best tile."""
    steps = (abs(a.bit_length() - b.bit_length()) for a, b in zip(tile[:4], best[:4], strict=True))
    return 1.0 + sum(steps) + abs(tile.stages - best.stages) + abs(tile.per_sm - best.per_sm)


def test_search_finds_the_best_tile_of_each_product() -> None:
    best = {"up": Tile(32, 256, 64, 8, 4, 2), "down": Tile(32, 32, 128, 2, 3, 0), "outer": Tile(128, 128, 32, 8, 3, 1)}

    def times(product: str, config: KernelConfig) -> float:
        own = best if product == LAYER else [product]
        return sum(away(getattr(config, name), best[name]) for name in own)

    found = searched(times, ("up", "down", "outer")).best
    assert {name: getattr(found, name) for name in best} == best
    assert found.dx == TILE  # which nobody tuned


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_search_finds_the_best_number_of_rows(rows: int) -> None:
    """Shared by all products: more are better for one, and together decide."""
    search = searched(lambda _product, config: 1.0 + abs(config.up.block_m - rows) / 100)
    assert {getattr(search.best, name).block_m for name in SHARING} == {rows}
    assert search.best.outer == TILE


def test_rows_that_only_one_product_likes_are_not_taken() -> None:
    def times(product: str, config: KernelConfig) -> float:
        up, down = 0.9 if config.up.block_m == 64 else 1.0, 1.2 if config.down.block_m == 64 else 1.0
        return {"up": up, "down": down, LAYER: up + down}[product]

    assert searched(times).best == SHIPPED


def test_wrong_tiles_are_rejected_however_fast() -> None:
    search = searched(lambda _, config: 1.0 / config.up.block_n, ("up",), wrong=lambda tile: tile.block_n > 64)
    assert search.best == SHIPPED
    assert search.contest.tally.wrong > 0
    assert search.contest.tally.failed == 0


def test_tiles_that_do_not_compile_are_skipped_and_counted() -> None:
    search = searched(lambda _, config: 1.0 / config.up.stages, ("up",), fails=lambda tile: tile.stages >= 4)
    assert search.best.up.stages == 3
    assert search.contest.tally.failed > 0
    assert search.contest.tally.wrong == 0
    assert search.contest.tally.tried > search.contest.tally.failed


def test_device_that_is_lost_ends_the_search() -> None:
    made = Made(lambda *_: 1.0, never, lambda tile: tile.stages == 3)

    def lost() -> None:
        if made.launched[-1][1].up.stages == 2 and len(made.launched) > 1:
            raise torch.AcceleratorError("illegal memory access")

    with pytest.raises(torch.AcceleratorError):
        Search(Contest(made, SHIPPED, made.clock, 1, lost), ("up",), 2, "sm90", 227 * 1024).go(100)


def test_noise_changes_nothing() -> None:
    noise = iter([1.0, 0.99, 1.02, 0.97, 1.01] * 10_000)
    assert searched(lambda *_: next(noise)).best == SHIPPED


def test_budget_ends_the_search() -> None:
    few, more = (searched(lambda _, r: 1.0 / r.up.block_n, seconds=seconds).contest.tally.tried for seconds in (12, 60))
    assert few <= 12
    assert few < more <= 60
    assert searched(lambda *_: 1.0, seconds=0).contest.tally.tried == 0


def test_interruption_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workload_of(backward=False)

    def press(self: Search, _seconds: float) -> None:
        self.best = self.best._replace(up=self.best.up._replace(block_n=64, stages=2))
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "go", press)
    use_times(monkeypatch, lambda _, config: 1.0 / config.up.stages)
    choice = tune_choice.choose(workload, 6, 1.0, lambda _: None)
    assert choice.interrupted
    assert choice.chosen.up.stages == 2


def test_duel_is_won_by_more_than_noise_only() -> None:
    assert Duel([1.0] * 15, [0.99] * 15).won
    assert not Duel([1.0] * 15, [0.996] * 15).won
    assert not Duel([1.0] * 15, [1.01] * 15).won
    noisy = [0.8, 1.1, 0.95, 1.2, 0.7] * 3
    assert not Duel([1.0] * 15, noisy).won
    assert Duel([1.0] * 15, [0.5 * t for t in noisy]).won


def test_results_agree_up_to_rounding() -> None:
    right = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        own = right.to(dtype)
        rounded = (own.double() * (1 + torch.finfo(dtype).eps / 2)).to(dtype)
        assert agree(rounded, own)
        for row, wrong in ((3, 0.0), (511, torch.nan), (0, torch.inf)):  # one row of many
            other = own.clone()
            other[row] = wrong
            assert not agree(other, own)
        scale = torch.ones(512, 1, dtype=dtype)
        scale[100] = 1.05
        assert not agree(own * scale, own)
        assert not agree(own[:-1], own)
        assert agree(own[:0], own[:0])
    assert not agree(right.bfloat16(), right)
    assert agree(right.to(torch.float32)[0], right[0])


def test_comparing_takes_large_results_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executors._tune.contest.COMPARED", 100)
    right = torch.ones(5, 7, 9)
    wrong = right.clone()
    wrong[4, 6] = 0
    assert agree(right.clone(), right)
    assert not agree(wrong, right)


def test_moves_are_such_as_a_kernel_may_take() -> None:
    for family in FAMILIES.values():
        for config in (*family.narrow, *family.wide):
            for product in PRODUCTS:
                tile = getattr(config, product)
                found = moves(product, tile, 2, "sm90", family.shared)
                assert tile not in found
                assert len(found) == len(set(found))
                for other in found:
                    tuned_file.check_tile(product, other)
                    assert product == "outer" or other.block_m == tile.block_m
    spilling = Tile(128, 256, 64, 4, 2, 1)
    assert not fits("down", spilling, 2, "sm90", 227 * 1024)
    assert fits("down", spilling._replace(warps=8), 2, "sm90", 227 * 1024)
    assert not fits("down", spilling._replace(warps=8, stages=8), 2, "sm90", 227 * 1024)
    assert fits("down", spilling, 2, "gfx942", 227 * 1024)  # 64 threads in a warp
    assert fits("down", spilling, 2, "sm100", 227 * 1024)
    assert all(tile.block_m == 64 for tile in with_rows(SHIPPED, "up", 64))


def workload_of(
    shape: Shape = TOY, rank: int = 0, dtype: torch.dtype = torch.bfloat16, *, backward: bool = True
) -> Workload:
    if INTERPRETED:
        interpreter.mend()
    layer = random_layer(shape, DEVICE, 0, lambda *_: None)
    owner = with_adapters(layer, rank, 0) if rank else layer
    return Workload(owner, batch("uniform", 6, 6, shape, DEVICE, 0), dtype, backward)


def use_times(monkeypatch: pytest.MonkeyPatch, times: Times) -> None:
    """Made-up times in place of measured ones."""

    def clock(action: Any) -> float:
        action()
        return times(*action.args)

    monkeypatch.setattr(tune_choice, "host_clock", clock)
    monkeypatch.setattr(tune_choice, "GpuClock", lambda _: clock)


GPT_OSS = replace(LAYERS["gpt-oss-20b"], experts=4, hidden=32, intermediate=32, config=replace(TOY.config, limit=7.0))


@pytest.mark.parametrize(
    ("shape", "rank", "dtype"),
    [(TOY, 0, torch.bfloat16), (GPT_OSS, 4, torch.float16), (replace(TOY, hidden=24), 0, torch.float32)],
    ids=["dense", "adapters, by columns", "odd"],
)
def test_every_product_is_right_with_other_tiles(shape: Shape, rank: int, dtype: torch.dtype) -> None:
    workload = workload_of(shape, rank, dtype)
    contest = Contest(workload, workload.shipped, lambda _: 1.0, 1)
    other = Tile(32, 32, 16, 2, 1, 2)
    with torch.no_grad():
        for product in (*workload.products, LAYER):
            assert contest.admits(product, KernelConfig(1.0, *[other] * len(PRODUCTS))), product
    assert workload.products == ("up", "down", "dh", "dx", "outer", *(("inner",) if rank else ()))


def test_products_are_those_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result, by itself, is found in a pass through the layer."""
    workload, made = workload_of(), []
    for module, names in ((_layer.products, ("up", "down")), (_layer._gradients, ("outer",))):
        for name in names:
            plain = getattr(module, name)

            def recorded(*given: Any, plain: Any = plain, **named: Any) -> Any:
                found = plain(*given, **named)
                made.extend(found if isinstance(found, tuple) else [found])
                return found

            monkeypatch.setattr(module, name, recorded)
    with torch.no_grad():
        workload.run(LAYER, workload.shipped)
        own = list(made)
        for product in workload.products:
            for result in workload.run(product, workload.shipped):
                assert any(result.shape == other.shape and torch.equal(result, other) for other in own), product


def test_rows_of_a_forward_pass_are_rows_of_a_backward_pass_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not tuned launches with them, or nothing is chosen."""
    workload = workload_of(backward=False)
    contest = Contest(workload, workload.shipped, lambda _: 1.0, 1)
    search = Search(contest, workload.products, 2, workload.device.family, workload.shared)
    taller = {name: getattr(workload.shipped, name)._replace(block_m=32) for name in SHARING}
    with torch.no_grad():
        search.best = workload.shipped._replace(**taller)
        search.settle()
        assert {getattr(search.best, name).block_m for name in SHARING} == {32}
        assert contest.tally.tried == 2  # dh and dx
        plain = workload.run

        def refuses(product: str, config: KernelConfig) -> list[torch.Tensor]:
            if product == "dh" and config != workload.shipped:
                raise ValueError("too large")
            return plain(product, config)

        monkeypatch.setattr(workload, "run", refuses)
        search.settle()
        assert search.best == workload.shipped


@pytest.fixture
def wide_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that follow the columns of ``up`` alone."""
    use_times(monkeypatch, lambda _, config: 1.0 / config.up.block_n)


def tune(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in ("tune", *arguments)])


@pytest.mark.usefixtures("wide_is_fast")
def test_choice_is_stored_and_used(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tune(*QUICK, "--json", tmp_path / "tune.json")
    assert result.exit_code == 0, result.output
    assert f'stored in {stored}; used by executors.get("triton", tuned=True)' in result.output
    shown = [line for line in result.output.splitlines() if not line.startswith(("stored in", "wrote"))]
    assert max(map(len, shown)) <= 80
    (entry,) = json.loads(stored.read_text())["entries"]
    assert entry["tiles"]["up"]["block_n"] > workload_of(backward=False).shipped.up.block_n
    assert entry["found"]["tuned"] == ["up", "down"]

    figures = json.loads((tmp_path / "tune.json").read_text())
    (choice,) = figures["choices"]
    assert choice["entry"] == entry
    assert choice["tiles"]["tried"] > 0
    assert set(choice["seconds"]) == {"up", "down", LAYER}

    launched = []
    plain = _layer.products.blocks
    monkeypatch.setattr(_layer.products, "blocks", lambda tile: launched.append(tile) or plain(tile))
    layer = random_layer(replace(TOY, biases=False), DEVICE, 0, lambda *_: None)
    for tokens, same in ((5, True), (8, True), (4, False), (9, False)):
        launched.clear()
        given = batch("uniform", tokens, tokens, TOY, DEVICE, 1)
        executor = executors.get("triton", tuned=True)
        with torch.no_grad():
            executor.experts(given.x, topk_ids=given.topk_ids, topk_weights=given.topk_weights, weights=layer.weights())
        assert (launched[0] == Tile(**entry["tiles"]["up"])) == same, tokens


@pytest.mark.usefixtures("wide_is_fast")
def test_dry_run_stores_nothing(stored: Path) -> None:
    result = tune(*QUICK, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "stored" not in result.output
    assert not stored.exists()


def test_shipped_tiles_are_not_stored(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_times(monkeypatch, lambda *_: 1.0)
    result = tune(*QUICK, "--seconds", 0)
    assert result.exit_code == 0, result.output
    assert "nothing to store" in result.output
    assert not stored.exists()


def test_what_is_slower_on_the_whole_layer_is_not_stored(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_times(monkeypatch, lambda product, config: config.up.block_n ** (1.0 if product == LAYER else -1.0))
    result = tune(*QUICK)
    assert "nothing to store" in result.output
    assert not stored.exists()


@pytest.mark.usefixtures("wide_is_fast")
def test_choice_that_cannot_be_stored_is_printed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = tune(*QUICK, "--file", tmp_path / "file" / "tuned.json")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {tmp_path}/file/tuned.json: cannot be written: ")
    (entry,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    tuned_file.parse(entry)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layer", "qwen"), "--layer qwen: must be one of gpt-oss-20b, qwen3-30b-a3b"),
        (("--layer", "gpt-oss-20b", "--hidden", 8), "--hidden 8: must be left out with --layer gpt-oss-20b"),
        ((), "--experts: must be given"),
        (SIZES[:-2], "--intermediate: must be given"),
        ((*SIZES, "--top-k", 5), "--top-k 5: must be at most --experts 4"),
        ((*SIZES, "--activation", "gelu"), "--activation gelu: must be one of swiglu"),
        ((*SIZES, "--layout", "odd"), "--layout odd: must be one of concatenated, interleaved"),
        ((*SIZES, "--dtype", "float64"), "--dtype float64: must be one of bfloat16"),
        ((*SIZES, "--direction", "back"), "--direction back: must be one of forward"),
        ((*SIZES, "--routing", "none"), "--routing none: must be one of real"),
        (
            (*SIZES, "--tokens", 7, "--tokens", 8),
            "--tokens 8: must be left out, as one choice serves it and --tokens 7",
        ),
        ((*SIZES, "--json", "/no/folder/at/all"), "--json /no/folder/at/all: must be in a folder that exists"),
        ((*SIZES, "--device", "quantum"), "--device quantum: must be a device that torch has here"),
    ],
)
def test_bad_arguments_are_one_line(arguments: tuple[object, ...], message: str) -> None:
    result = tune(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses() -> None:
    done = python("-m", "executors", "tune", "--layer", "gpt-oss-20b")
    assert done.returncode == 2
    assert done.stderr.startswith("error: tune needs a GPU; TRITON_INTERPRET=1 ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_triton_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from executors.__main__ import main; sys.argv[1:] = ['tune']; main()"
    )
    done = python("-c", code)
    assert done.returncode == 2
    assert done.stderr == 'error: tune needs triton: pip install "moe-ref[triton]"\n'


def test_help() -> None:
    result = tune("--help")
    assert result.exit_code == 0
    assert "tuned=True" in result.output
