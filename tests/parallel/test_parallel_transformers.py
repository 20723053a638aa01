"""transformers' own expert parallelism with executors inside: on two ranks as on one device."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.21 or later")

import torch
from torch import Tensor, nn

import parallel_models as models
from moe_ref.conformance.parallel.cluster import Cluster
from tiny_models import blocks, tiny_model

CLOSE = 4e-6  # of the largest number of each tensor, in fp32
CLOSE_ANYWHERE = (
    2e-5  # in all families: of so many parameters the gradients of some nearly cancel, for transformers too
)
FAMILIES = ("mixtral", "gpt_oss")  # softmax without biases; (E, H, 2I), biases and a clamp
CHANGES = {"deepseek_v3": {"num_key_value_heads": 4}}  # the tensor parallelism of its attention wants as many as heads
OTHERS = ("qwen3_moe", "deepseek_v3", "glm4_moe", "olmoe", "qwen2_moe", "minimax_m2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2) as own:
        yield own


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of each family."""
    return tmp_path_factory.mktemp("models")


def same_model(family: str) -> nn.Module:
    """The same in every run: what `tiny_model` does not draw itself is from a seed too."""
    with torch.random.fork_rng():
        torch.manual_seed(6)  # with others a router's gradient may nearly cancel, and all are further from one device
        return tiny_model(family, **CHANGES.get(family, {}))


def folder_of(saved: Path, family: str) -> Path:
    folder = saved / family
    if not folder.exists():
        same_model(family).save_pretrained(folder)
    return folder


def lonely(saved: Path) -> Path:
    """A model whose first layer sends all tokens to the first rank, and whose second one all to the second."""
    folder = saved / "lonely"
    if not folder.exists():
        model = same_model("gpt_oss")
        for rank, block in enumerate(blocks(model)):
            block.router.bias.data[4 * rank : 4 * rank + 4] += 10
        model.save_pretrained(folder)
    return folder


def prompts(length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 48, (2, length), generator=torch.Generator().manual_seed(seed))


def agrees(
    cluster: Cluster, folder: Path, executor: str, way: str, tokens: Tensor, close: float = CLOSE
) -> list[models.Compared]:
    """What both ranks found, which must be close."""
    both = cluster.run(models.compared, folder, executor, way, tokens)
    for found in both:
        assert found.worst < close, (found.output, max(found.gradients.items(), key=lambda item: item[1]))
    return both


@pytest.mark.parametrize("way", models.WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_are_one_device(cluster: Cluster, saved: Path, family: str, way: str) -> None:
    """Logits and all gradients, with tokens of one rank alone and of both."""
    ranks = agrees(cluster, folder_of(saved, family), "native", way, prompts())
    first, second, both = map(sum, zip(*(side for found in ranks for side in found.sides), strict=True))
    assert first + second > 0 < both
    for found in ranks:
        assert {count for count, _ in found.calls} == {4}, "experts of one rank"
        assert any(foreign for _, foreign in found.calls) == (way == "all_reduce"), "empty slots"
        assert {"router" in name or "gate.weight" in name for name in found.gradients} == {True, False}


@pytest.mark.parametrize("way", models.WAYS)
def test_a_rank_that_no_token_chooses(cluster: Cluster, saved: Path, way: str) -> None:
    for found in agrees(cluster, lonely(saved), "native", way, prompts()):
        assert [[bool(count) for count in side] for side in found.sides] == [[1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("way", ["all_reduce", "all_to_all"])
def test_a_rank_without_tokens(cluster: Cluster, saved: Path, way: str) -> None:
    """A single token of a single sequence belongs to the first rank.

    Not with any token: where its two slots nearly cancel in the router's gradient, all are further from one device.
    """
    agrees(cluster, folder_of(saved, "gpt_oss"), "native", way, prompts(1, seed=2)[:1])


@pytest.mark.parametrize("mutant", ["one_percent_more", "weight_gradient_lacks_one_row"])
def test_a_wrong_executor_on_one_rank_is_seen(cluster: Cluster, saved: Path, mutant: str) -> None:
    for way in models.WAYS:
        found = cluster.run(models.compared, folder_of(saved, "mixtral"), "native", way, prompts(), mutant)
        assert any(each.worst > 10 * CLOSE for each in found), way


def test_four_bits_are_refused_in_one_line(cluster: Cluster, saved: Path) -> None:
    said = "model.layers.0.mlp.experts.gate_up_proj is a DTensor: must be a plain tensor; see executors.parallel"
    assert all(found.startswith(said) for found in cluster.run(models.quantised, folder_of(saved, "mixtral"), ranks=2))


@pytest.mark.nightly
@pytest.mark.parametrize("executor", ["", "native", "auto", "grouped_mm", "numba"])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_two_ranks_are_one_device_everywhere(cluster: Cluster, saved: Path, family: str, executor: str) -> None:
    """transformers' own grouped_mm too, as the measure of what is close."""
    for way in models.WAYS:
        agrees(cluster, folder_of(saved, family), executor, way, prompts(), CLOSE_ANYWHERE)
