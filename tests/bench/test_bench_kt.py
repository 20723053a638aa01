"""kt-kernel as a peer of the benchmark: what it takes, how it is called. It need not be installed."""

import ctypes
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from executors._bench.contenders import Contender
from executors._bench.everyone import everyone_else
from executors._bench.judge import judge_contender
from executors._bench.layers import BenchLayer, random_layer, sized
from executors._bench.peers import kt as bench_kt
from executors._bench.report import machine
from executors._bench.routing import batch
from executors._bench.run import measure_case
from executors._bench.settings import Settings
from executors._bench.truth import sample_truth

pytestmark = pytest.mark.usefixtures("one_thread")
needs_it = pytest.mark.skipif(bench_kt.kt_version() is None, reason="kt-kernel is not installed")


def layer_of(name: str = "qwen3-30b-a3b", scale: int = 32, **changes: Any) -> BenchLayer:
    shape = replace(sized(name, scale, "cpu"), **changes)
    return random_layer(shape, "cpu", 0, lambda *_: None)


def at(address: int, dtype: torch.dtype, *sizes: int) -> Tensor:
    """The array of C that begins there."""
    count = torch.Size(sizes).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=dtype).view(sizes)


class MOEConfig(SimpleNamespace):
    def __init__(self, experts: int, top_k: int, hidden: int, intermediate: int) -> None:
        super().__init__(experts=experts, top_k=top_k, hidden=hidden, intermediate=intermediate)


class CPUInfer:
    """Runs what is submitted at once."""

    made: ClassVar[list[Any]] = []

    def __init__(self, config: Any) -> None:
        self.backend_ = config
        self.made.append(config)

    def submit(self, task: Any) -> None:
        task()

    def sync(self) -> None:
        pass


class AVX2BF16MOE:
    """As its own wrapper calls it: numbers of experts copied by address, then tokens, K, and addresses."""

    def __init__(self, config: MOEConfig) -> None:
        self.config = config

    def load_weights_task(self, order: int) -> Any:
        def load() -> None:
            c = self.config
            assert at(order, torch.int64, c.experts).tolist() == list(range(c.experts))
            assert c.gate_scales == c.up_scales == c.down_scales == [[0] * c.experts]
            self.gate, self.up, self.down = (
                [at(address, torch.bfloat16, *sizes).float() for address in found]
                for (found,), sizes in (
                    (c.gate_projs, (c.intermediate, c.hidden)),
                    (c.up_projs, (c.intermediate, c.hidden)),
                    (c.down_projs, (c.hidden, c.intermediate)),
                )
            )

        return load

    def forward_task(self, tokens: int, k: int, ids: int, weights: int, x: int, y: int, incremental: bool) -> Any:
        def forward() -> None:
            assert not incremental
            c, (t,) = self.config, at(tokens, torch.int32, 1).tolist()
            assert t <= c.max_len
            assert k == c.top_k
            rows, out = (at(address, torch.bfloat16, t, c.hidden) for address in (x, y))
            chosen, shares = at(ids, torch.int64, t, k), at(weights, torch.float32, t, k)
            for row, (experts, share) in enumerate(zip(chosen.tolist(), shares, strict=True)):
                parts = [self.one(rows[row].float(), expert) for expert in experts]
                out[row] = (share[:, None] * torch.stack(parts)).sum(0)

        return forward

    def one(self, row: Tensor, expert: int) -> Tensor:
        return self.down[expert] @ (torch.nn.functional.silu(self.gate[expert] @ row) * (self.up[expert] @ row))


def stand_in() -> Any:
    CPUInfer.made = []
    compiled = ModuleType("kt_kernel_ext")
    vars(compiled)["moe"] = SimpleNamespace(MOEConfig=MOEConfig, AVX2BF16_MOE=AVX2BF16MOE)
    vars(compiled).update(CPUInfer=CPUInfer, WorkerPoolConfig=SimpleNamespace, __cpu_variant__="avx2")
    return compiled


def z_of(layer: BenchLayer, contender: Contender, tokens: int = 5) -> float:
    given = batch("real", tokens, 4, layer.shape, "cpu", 0)
    assert contender.call is not None
    judgement = judge_contender(contender.call, layer, given, sample_truth(layer, given, False, 0), False)
    assert not judgement.failure
    assert judgement.max_z is not None
    return judgement.max_z


@pytest.mark.parametrize(("name", "scale"), [("qwen3-30b-a3b", 32), ("mixtral-8x7b", 32), ("deepseek-v3", 8)])
def test_it_is_called_as_its_signatures_say(name: str, scale: int) -> None:
    layer = layer_of(name, scale)
    peer = bench_kt.peer(layer, stand_in(), 1)
    assert (peer.name, peer.ours, peer.backward) == ("kt-kernel", False, False)
    assert z_of(layer, peer) < 6
    assert peer.why_not(1, backward=True) == "forward only"
    assert peer.why_not(bench_kt.LONGEST + 1, backward=False) == "its buffers are made for 4096 tokens here"
    assert not peer.why_not(bench_kt.LONGEST, backward=False)


def test_it_has_torch_s_threads_divided_among_numa_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_kt.worker_counts(8) == [8, 7]
    assert bench_kt.worker_counts(1) == [1]
    monkeypatch.setattr(bench_kt, "numa_nodes", lambda: 2)
    assert [bench_kt.nodes_for(i, 5) for i in (64, 96)] == [2, 1]  # as half of 96 is no multiple of 32
    assert bench_kt.nodes_for(64, 1) == 1
    compiled = stand_in()
    pool = bench_kt.worker_pool(compiled, 5, 2)
    (made,) = CPUInfer.made
    assert (made.subpool_count, made.subpool_numa_map, made.subpool_thread_count) == (2, [0, 1], [3, 2])
    assert bench_kt.worker_pool(compiled, 5, 2) is pool


def test_its_name_tells_fewer_workers() -> None:
    layer = layer_of()
    torch.set_num_threads(2)
    assert [bench_kt.peer(layer, stand_in(), n).name for n in (2, 1)] == ["kt-kernel", "kt-kernel[1]"]


def test_it_takes_what_it_can_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kt, "kt_version", lambda: "0.7.2")
    assert bench_kt.refusal(layer_of()) == ""
    assert bench_kt.refusal(layer_of("gpt-oss-20b")) == "it has swiglu only, in bf16 without clamp and offset"
    assert bench_kt.refusal(layer_of(biases=True)) == "it has no biases, and rows of H numbers only"
    assert bench_kt.refusal(layer_of(hidden=80)) == "H=80, I=32: it has multiples of 32 only"
    monkeypatch.setattr(bench_kt, "kt_version", lambda: None)
    assert bench_kt.refusal(layer_of()) == "kt-kernel is not installed"
    (absent,) = bench_kt.kt_peers(layer_of())
    assert absent.why_not(1, backward=False) == "kt-kernel is not installed"


def test_a_build_that_cannot_be_loaded_stands_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kt_kernel").mkdir()
    (tmp_path / "kt_kernel" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bench_kt, "kt_version", lambda: "0.7.2")
    bench_kt.library.cache_clear()
    (peer,) = bench_kt.kt_peers(layer_of())
    bench_kt.library.cache_clear()
    assert peer.reason.startswith("cannot be loaded: ")
    assert "_cpu_detect.py" in peer.reason


def test_the_variant_follows_torch() -> None:
    assert bench_kt.variant("AVX512", "amx") == "amx"
    assert bench_kt.variant("AVX512", "avx512_bf16") == "avx512_bf16"
    assert bench_kt.variant("AVX2", "amx") == bench_kt.variant("DEFAULT", "amx") == "avx2"


def test_the_others_wait_until_its_threads_sleep() -> None:
    layer = layer_of()
    given = batch("real", 2, 2, layer.shape, "cpu", 0)
    truth = sample_truth(layer, given, False, 0)
    peer = bench_kt.peer(layer, stand_in(), 1)
    ended = began = 0.0
    gaps = []

    def kt(batch: Any) -> Tensor:
        nonlocal ended
        y = peer.call(batch)  # type: ignore[misc]
        ended = time.perf_counter()
        return y

    def other(batch: Any) -> Tensor:
        nonlocal began
        began = time.perf_counter()
        if ended:
            gaps.append(began - ended)
        return peer.call(batch)  # type: ignore[misc]

    everyone = [replace(peer, call=kt), Contender("other", False, other)]
    settings = Settings(("native",), seconds=0.0, rounds=3)
    measure_case(settings, layer, given, truth, "real", "forward", everyone, lambda _: None)
    timed = gaps[1:]  # the first is that of judging
    assert timed
    assert min(timed) > bench_kt.REST_S * 0.99
    before = time.perf_counter()
    peer.settle()  # type: ignore[misc]
    assert time.perf_counter() - before < bench_kt.REST_S / 2  # as it was not called


def test_a_peer_can_be_left_out() -> None:
    layer = layer_of()
    names = {contender.name.partition("[")[0] for contender in everyone_else(layer)}
    assert "kt-kernel" in names
    assert {c.name.partition("[")[0] for c in everyone_else(layer, ("kt-kernel",))} == names - {"kt-kernel"}


def test_the_heading_tells_version_and_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kt, "kt_version", lambda: "0.7.2")
    monkeypatch.setattr(bench_kt, "library", stand_in)
    assert "kt-kernel is kt-kernel 0.7.2, avx2 variant" in machine(Settings(("native",)))


REAL = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_bench_kt import bench_kt, layer_of, z_of
for threads in (1, 2):
    torch.set_num_threads(threads)
    for name, scale in (("qwen3-30b-a3b", 8), ("mixtral-8x7b", 32), ("deepseek-v3", 8)):
        layer = layer_of(name, scale)
        for contender in bench_kt.kt_peers(layer):
            assert not contender.reason, contender.reason
            for tokens in (1, 5, 40):
                assert z_of(layer, contender, tokens) < 6
print("variant", bench_kt.kt_variant())
"""


@needs_it
@pytest.mark.parametrize("held", [False, True])
def test_the_real_one_is_right(held: bool) -> None:
    """In a process of its own: it must end well, print nothing, and take no more instructions than torch does."""
    environment = os.environ | ({"ATEN_CPU_CAPABILITY": "avx2"} if held else {})
    command = [sys.executable, "-c", REAL, str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (said,) = done.stdout.splitlines()
    assert said == "variant avx2" if held else said.startswith("variant ")
