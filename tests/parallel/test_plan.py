"""Plans of expert parallelism: simulation and formulas agree, figures by hand, memory as measured, the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from executors._bench.layers import DENSE, LAYERS, Shape, Storage
from executors._cli.app import app
from executors._counts.cards import CARDS
from executors._plan import run, simulation, traffic
from executors._plan.costs import Nodes, memories
from executors._plan.links import ACROSS, INSIDE, Link
from executors._plan.traffic import TO_ALL, WAYS, RowSizes, Way
from executors._plan.world import World, draw, layer_of, over_mean, split_world, world_of
from live_bytes import LiveBytes
from moe_ref.types import MoEConfig

NODES = Nodes(CARDS["h200"], INSIDE["nvlink4"], ACROSS["infiniband-ndr"], 2)


def ids_of(ranks: int, tokens: int, experts: int, top_k: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(ranks)
    return [torch.rand(tokens + r % 3, experts, generator=generator).argsort(1)[:, :top_k] for r in range(ranks)]


# --- the simulated executor


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("ranks", "experts"), [(1, 5), (3, 5), (7, 5), (96, 64)])
def test_the_simulated_executor_sends_what_formulas_say(way: Way, ranks: int, experts: int) -> None:
    world = world_of(ids_of(ranks, 4, experts, 3), ranks, experts)
    for rank in {0, ranks // 2, ranks - 1}:
        for hidden in (8, 24):
            run.check(world, rank, way, RowSizes(hidden, 2, 4), torch.float32)


@pytest.mark.parametrize("way", TO_ALL, ids=str)
def test_the_simulated_executor_with_a_bound(way: Way) -> None:
    world = world_of(ids_of(5, 4, 6, 3), 5, 6)
    most = world.least_bound
    for rank in range(5):
        run.check(world.bounded(most), rank, way, RowSizes(8), torch.float32)
    with pytest.raises(RuntimeError, match=f"max_slots={most - 1}"):
        run.check(world.bounded(most - 1), int(world.slots.max(1).argmax()), way, RowSizes(8), torch.float32)


def test_wrong_formulas_end_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(ids_of(3, 4, 5, 2), 3, 5)
    monkeypatch.setattr(traffic, "HEAD", 8)
    with pytest.raises(run.Contradiction, match="all_to_all slot: exchange 1 forward, heads, has other bytes"):
        run.check(world, 0, TO_ALL[0], RowSizes(8), torch.float32)


def test_an_exchange_that_formulas_leave_out_ends_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "messages", lambda *given: traffic.messages(*given)[1:])
    with pytest.raises(run.Contradiction, match="all_reduce rank has 2 exchanges, but 3 were counted"):
        run.check(world_of(ids_of(3, 4, 5, 2), 3, 5), 0, WAYS[3], RowSizes(8), torch.float32)


# --- figures by hand


def by_hand() -> World:
    """Two ranks of two experts. Three tokens of rank 0 with two slots, one of rank 1; one slot is empty."""
    return world_of([torch.tensor([[0, 1], [1, 2], [3, 2]]), torch.tensor([[0, -1]])], 2, 4)


def test_rows_and_slots_by_hand() -> None:
    world = by_hand()
    assert world.rows.tolist() == [[2, 2], [1, 0]]
    assert world.slots.tolist() == [[3, 3], [1, 0]]
    assert (world.fan_out, world.copies) == (5 / 4, 3 / 4)
    assert world.load.tolist() == [2, 2, 2, 1]
    assert world.active.tolist() == [2, 2]
    assert over_mean(world.received_slots) == 4 / 3.5


def test_bytes_by_hand() -> None:
    """Rank 0 sends 2 rows of 10 bf16, 3 heads and 3 weights, and 1 result of rank 1; both compare 7 numbers."""
    forward = traffic.messages(by_hand(), Way("all_to_all", "slot"), RowSizes(10, 2, 4), False)
    assert [own.sent[0].tolist() for own in forward] == [[0, 56], [0, 36], [0, 40], [0, 12], [0, 20]]
    backward = traffic.messages(by_hand(), Way("all_to_all", "rank"), RowSizes(10, 2, 4), True)
    assert [own.sent[1].tolist() for own in backward] == [[56, 0], [20, 0], [56, 0], [80, 0], [12, 0]]
    assert traffic.by_name(backward, 1) == {"comparison": 112, "rows": 20, "results": 80, "weights": 12}


def test_bytes_under_all_reduce_by_hand() -> None:
    """Of three sums, the ranks add two and one: rank 0 sends one and gets one, then gives two and gets one."""
    found = traffic.reduced(3, 2, 2, "rank", RowSizes(10, 2, 4), False)
    assert [own.sent.tolist() for own in found] == [[[0, 56], [56, 0]], [[0, 40], [80, 0]], [[0, 80], [40, 0]]]


def test_the_slowest_rank_and_link_decide() -> None:
    """Ranks 0 and 1 are on one node, rank 2 is on another."""
    sent = np.array([[0, 900, 10], [0, 0, 0], [0, 100, 0]])
    slow = replace(NODES, inside=Link("", "", 9.0, ""), across=Link("", "", 2.0, ""))
    assert slow.link_seconds(sent) == 100.0  # rank 0 and rank 1 need 900 / 9, rank 1 and rank 2 100 / 2
    assert slow.link_seconds(sent.T) == 100.0
    assert replace(slow, across=Link("", "", 0.5, "")).link_seconds(sent) == 200.0
    meet = np.array([[0, 500, 0], [0, 0, 0], [0, 400, 0]])
    assert replace(slow, per_node=3).link_seconds(meet) == replace(slow, per_node=3).link_seconds(meet.T) == 100.0


def test_least_times_of_products_by_hand() -> None:
    """Rank 0 has 4 slots, and 2 experts of 3 H I weights each."""
    shape = Shape("", 4, 16, 32, MoEConfig(2))
    card = CARDS["h200"]
    products = replace(NODES, card=card._replace(tensor={"bf16": 1.0}))
    by_memory = replace(NODES, card=card._replace(dram=1.0))
    assert products.product_seconds(by_hand(), shape, DENSE, False) == 4 * 2 * 3 * 16 * 32
    assert products.product_seconds(by_hand(), shape, DENSE, True) == 2 * 4 * 2 * 3 * 16 * 32
    assert by_memory.product_seconds(by_hand(), shape, DENSE, False) == 2 * 2 * 3 * 16 * 32
    assert by_memory.product_seconds(by_hand(), shape, DENSE, True) == 2 * 2 * 2 * 3 * 16 * 32
    one = world_of([torch.tensor([[0]])], 1, 4)  # of four experts one has a slot, and all have gradients
    assert by_memory.product_seconds(one, shape, DENSE, False) == 2 * 3 * 16 * 32
    assert by_memory.product_seconds(one, shape, DENSE, True) == (1 + 4) * 2 * 3 * 16 * 32
    frozen = Storage(0.5, frozen=True)
    assert products.product_seconds(by_hand(), shape, frozen, True) == 4 * 2 * 3 * 16 * 32
    assert by_memory.product_seconds(by_hand(), shape, frozen, True) == 2 * 3 * 16 * 32 / 2


def test_ranks_share_the_tokens_of_one_batch() -> None:
    (ids,) = ids_of(1, 10, 8, 2)
    world = split_world(ids, 4, 8)
    assert world.tokens.tolist() == [3, 3, 2, 2]
    assert torch.equal(torch.cat(list(world.ids)), ids)
    assert world.slots.sum() == 20


def test_all_reduce_beats_all_to_all_on_two_ranks_if_tokens_have_few_experts() -> None:
    """By bytes of H alone, with as many tokens on both ranks, of which all slots are on the other rank, or on both."""
    far = torch.cat([torch.full((500, 1), 1), torch.full((500, 1), 0)])
    both = torch.tensor([[0, 1]]).expand(1000, 2)
    sizes = RowSizes(10_000)
    # K=1: all_reduce sends a slot there and its sum back: 2 T/2; all_to_all T/2 there, T/2 back, and T/2 to the other
    assert run.same_tokens(NODES, far, 2, 2, sizes) == pytest.approx(2 / 3, rel=1e-3)
    # K=2: all_reduce T/2 sums in fp32 and T/2 back, 4 in all; all_to_all T/2 there, T/2 back, T/2 to the other: 3
    assert run.same_tokens(NODES, both, 2, 2, sizes) == pytest.approx(4 / 3, rel=1e-3)


def test_tokens_of_its_own_cost_all_reduce_the_tokens_of_all() -> None:
    """By bytes of H alone: each slot of two ranks with 500 tokens is on the other rank."""
    world = world_of([torch.full((500, 1), 1), torch.full((500, 1), 0)], 2, 2)
    # all_reduce: T rows of the other rank, then 1000 slots in two parts, there and back: 3 T; all_to_all: T and T
    assert run.own_tokens(NODES, world, RowSizes(10_000)) == pytest.approx(3 / 2, rel=1e-3)


# --- tokens


def test_tokens_of_all_kinds_and_groups() -> None:
    shape = layer_of("deepseek-v3")
    assert (shape.config.num_groups, shape.config.topk_groups) == (8, 4)
    assert replace(shape, config=LAYERS["deepseek-v3"].config) == LAYERS["deepseek-v3"]
    uneven = {}
    for kind in ("real", "uniform", "skewed"):
        ids = draw(kind, 256, shape, 0, 2, 8, lambda *_: None)
        world = world_of(ids, 8, 256)
        assert world.fan_out <= 4  # a rank has the experts of a group
        uneven[kind] = over_mean(world.received_slots)
        assert not torch.equal(*ids)
        assert torch.equal(draw(kind, 256, shape, 0, 1, 4, lambda *_: None)[0], ids[0][:, :4])
    assert uneven["uniform"] < 1.2 < min(uneven["real"], uneven["skewed"])


def test_batches_begin_again_where_there_are_more_ranks() -> None:
    ids = ids_of(2, 5, 6, 2)
    world = world_of(ids, 5, 6)
    assert world.rows[0].tolist() == world.rows[2].tolist() == world.rows[4].tolist()
    assert world.load.sum() == world.slots.sum() == sum(own.numel() for own in world.ids)


# --- memory


@pytest.mark.parametrize("way", TO_ALL, ids=str)
def test_memory_is_what_tensors_take(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each of four ranks forward, its tensors followed: formulas leave out ids, weights and the like alone."""
    hidden, inner, top_k = 1024, 256, 4
    monkeypatch.setattr(simulation, "INTERMEDIATE", inner)
    world = world_of(ids_of(4, 40, 16, top_k), 4, 16)
    each = memories(world, Shape("", 16, hidden, inner, MoEConfig(top_k)), DENSE, way, RowSizes(hidden))
    for rank, own in enumerate(each):
        with LiveBytes() as live:
            simulation.count(world, rank, way, hidden, torch.bfloat16, torch.float32)
        given = own.weights + int(world.tokens[rank]) * (2 * hidden + 4 * top_k)  # parameters, x, weights of slots
        assert own.kept + own.exchange <= live.peak - given <= 1.02 * (own.kept + own.exchange)


def test_memory_of_weights() -> None:
    shape = Shape("", 4, 64, 32, MoEConfig(2), biases=True)
    dense, frozen = (memories(by_hand(), shape, own, TO_ALL[0], RowSizes(64))[0] for own in (DENSE, Storage(0.5, True)))
    assert dense.weights == dense.gradients == 2 * 2 * (3 * 64 * 32 + 2 * 32 + 64)
    assert (frozen.weights, frozen.gradients) == (2 * (3 * 64 * 32 // 2 + 2 * (2 * 32 + 64)), 0)
    assert dense.total == dense.weights + dense.gradients + dense.kept + dense.exchange


# --- the command


def planned(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


SMALL = "--layer", "mixtral-8x7b", "--tokens", "20", "--ranks", "12,1,2,2", "--ranks-per-node", "2"


def test_a_plan_is_printed_drawn_and_written(tmp_path: Path) -> None:
    ran = planned(*SMALL, "--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.png"))
    assert ran.exit_code == 0, ran.output
    assert max(map(len, ran.output.splitlines())) <= 80 + len(str(tmp_path))
    assert "mixtral-8x7b: E=8, K=2, H=4096, I=14336; weights bf16" in ran.output
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [own["ranks"] for own in found["plans"]] == [1, 2, 12]
    assert [own["idle"] for own in found["plans"]] == [0, 0, 4]
    assert found["plans"][1]["memory"]["slot"]["weights"] == 4 * 2 * 3 * 4096 * 14336
    assert found["plans"][2]["memory"]["rank"]["weights"] == 2 * 3 * 4096 * 14336  # not that of an idle rank
    alone, two, twelve = (own["ways"] for own in found["plans"])
    assert all(way["forward"]["sent"] == way["forward"]["seconds"] == 0 for way in alone)
    assert [(way["dispatch"], way["returns"]) for way in two] == [*WAYS]
    assert two[3]["forward"]["sent"] == 20 * 4096 * 4 + 8 * 7
    assert all(way["forward"]["sent"] >= way["forward"]["mean"] for way in twelve)
    assert {"own", "same", "same_tokens"} == found["plans"][2]["all_reduce_over_all_to_all"].keys()
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_tables_fit_whatever_is_in_them() -> None:
    for asked in (("--tokens", "1", "--ranks", "4"), ("--tokens", "300", "--ranks", "40", "--across", "ethernet-100g")):
        ran = planned("--layer", "gpt-oss-20b", "--routing", "skewed", *asked)
        assert ran.exit_code == 0
        assert max(map(len, ran.output.splitlines())) <= 80
        assert "…" not in ran.output


def test_copies_to_other_nodes_and_crossings(tmp_path: Path) -> None:
    def figures(per_node: int) -> tuple[Result, dict[str, Any]]:
        path = tmp_path / "plan.json"
        ran = planned(*SMALL[:-1], str(per_node), "--ranks", "2,4", "--json", str(path))
        return ran, json.loads(path.read_text())["plans"][1]

    (_, apart), (ran, together) = figures(1), figures(4)
    assert apart["copies_to_other_nodes"] == apart["copies"] > together["copies_to_other_nodes"] == 0
    faster = [f"K={k}" for k, ratio in together["all_reduce_over_all_to_all"]["same"].items() if ratio < 0.99]
    faster += [f"T={t}" for t, ratio in together["all_reduce_over_all_to_all"]["same_tokens"].items() if ratio < 0.99]
    assert faster == ["T=1"]
    assert "4 ranks, same tokens: all_reduce is faster at T=1" in ran.output.splitlines()


def test_links_weights_and_cards_count(tmp_path: Path) -> None:
    def figures(*more: str) -> dict[str, Any]:
        path = tmp_path / "plan.json"
        assert planned(*SMALL, "--ranks", "4", "--json", str(path), *more).exit_code == 0
        (own,) = json.loads(path.read_text())["plans"]
        return {
            "seconds": own["ways"][0]["forward"]["seconds"],
            "weights": own["memory"]["slot"]["weights"],
            "products": own["products"]["forward"],
        }

    usual, other = figures(), figures("--across", "ethernet-100g", "--weights", "nf4", "--card", "a100")
    assert other["seconds"] == pytest.approx(4 * usual["seconds"])
    assert other["weights"] == usual["weights"] * (0.5 + 4 / 64) / 2
    assert other["products"] > usual["products"] * (0.5 + 4 / 64) / 2
    assert figures("--inside", "nvlink5", "--ranks-per-node", "4")["seconds"] < usual["seconds"] / 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layer", "deepseek"), "--layer deepseek: must be one of gpt-oss-20b, qwen3-30b-a3b, mixtral-8x7b, deepse"),
        (("--ranks", "0"), "--ranks 0: must be a whole number from 1 to 1024; commas part several"),
        (("--ranks", "8,1025"), "--ranks 1025: must be a whole number from 1 to 1024; commas part several"),
        (("--ranks", "8;64"), "--ranks 8;64: must be a whole number from 1 to 1024; commas part several"),
        (("--ranks", "8,"), "--ranks '': must be a whole number from 1 to 1024; commas part several"),
        (("--ranks", "-2"), "--ranks -2: must be a whole number from 1 to 1024; commas part several"),
        (("--routing", "even"), "--routing even: must be one of real, uniform, skewed"),
        (("--tokens", "0"), "--tokens 0: must be from 1 to 32768"),
        (("--weights", "int4"), "--weights int4: must be one of bf16, nf4, nf4-nested, mxfp4"),
        (("--card", "rtx4090"), "--card rtx4090: must be one of a100, h100, h200"),
        (("--inside", "pcie"), "--inside pcie: must be one of nvlink3, nvlink4, nvlink5"),
        (("--across", "wifi"), "--across wifi: must be one of infiniband-ndr, ethernet-400g, ethernet-100g"),
        (("--ranks-per-node", "0"), "--ranks-per-node 0: must be at least 1"),
        (("--seed", "-1"), "--seed -1: must be from 0 to"),
        (("--json", "nowhere/plan.json"), "--json nowhere/plan.json: must be in a folder that exists"),
        (("--plot", "nowhere/plan.png"), "--plot nowhere/plan.png: must be in a folder that exists"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    ran = planned(*arguments)
    assert ran.exit_code == 2
    assert ran.output.startswith(f"error: {message}")
    assert len(ran.output.splitlines()) == 1
