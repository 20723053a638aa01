"""What executors.hf.config_of refuses, and what it says; and that a new router of transformers is noticed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import families
import router_walk
from executors import Unsupported
from executors.hf import config_of
from executors.hf import router as router_module
from executors.hf.router_table import CHECKED, REFUSED, RULES
from router_cases import made
from router_walk import Place, places

PLACES = {place.router: place for place in places()}


def bare(place: Place) -> nn.Module:
    """A module of the router's class, with nothing in it."""
    kind = place.get(place.router)
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


@pytest.mark.parametrize("router", sorted(REFUSED))
def test_what_no_config_says_is_refused_by_name(router: str) -> None:
    with pytest.raises(Unsupported) as refusal:
        config_of(bare(PLACES[router]))
    assert str(refusal.value) == f"{router}: {REFUSED[router]}: no MoEConfig says that"
    with pytest.raises(Unsupported, match=f"^{router}: "):
        config_of(nn.ModuleDict({"gate": bare(PLACES[router])}))


@pytest.mark.parametrize(
    ("router", "attribute", "value"),
    [
        ("DeepseekV4TopKRouter", "score_fn", nn.Softplus()),
        ("Inkling2TopKRouter", "score_fn", nn.Tanh()),
        ("Cohere2MoeTopKRouter", "expert_selection_fn", "tanh"),
        ("DeepseekV2TopkRouter", "topk_method", "noaux_tc"),
    ],
)
def test_an_option_that_no_config_says_is_refused_by_name(router: str, attribute: str, value: Any) -> None:
    module = made(PLACES[router])[1]
    setattr(module, attribute, value)
    said = type(value).__name__ if isinstance(value, nn.Module) else repr(value)
    with pytest.raises(Unsupported, match=rf"^{router}: .*{said}: must be '"):
        config_of(module)


@pytest.mark.parametrize(
    ("router", "name"),
    [
        ("AfmoeTokenChoiceRouter", "expert_bias"),
        ("Dots3NoteVisionTopKRouter", "e_score_correction_bias"),
        ("HYV3TopKRouter", "e_score_correction_bias"),
        ("Lfm2MoeTopKRouter", "expert_bias"),
        ("MiniMaxM2TopKRouter", "e_score_correction_bias"),
    ],
)
def test_a_bias_of_the_block_wants_the_block(router: str, name: str) -> None:
    block, alone = made(PLACES[router])
    assert config_of(block).selection_bias is getattr(block, name)
    with pytest.raises(
        Unsupported, match=rf"{router}: must be the block .*: the selection bias is the block's {name}$"
    ):
        config_of(alone)


def test_a_router_alone_is_enough_elsewhere() -> None:
    for router in ("DeepseekV3TopkRouter", "MixtralTopKRouter", "GptOssTopKRouter"):
        block, alone = made(PLACES[router])
        ours, whole = config_of(alone), config_of(block)
        assert (ours.config, ours.output_scale) == (whole.config, 1.0)
        assert ours.selection_bias is whole.selection_bias


@pytest.mark.parametrize("name", ["diffusion_gemma", "gemma4"])
def test_a_router_in_a_layer_without_a_block_is_found(name: str) -> None:
    """Gemma 4's decoder layer holds it; its scales of experts are not copied."""
    layers = [module for module in families.build(families.named(name)).modules() if hasattr(module, "router")]
    rule = config_of(layers[0])
    assert rule.expert_scale is layers[0].router.per_expert_scale
    assert (rule.returns, rule.output_scale, rule.selection_bias) == ("probabilities", 1.0, None)
    assert config_of(layers[0].router).config == rule.config


def test_a_bias_of_one_row_is_a_view() -> None:
    block, router = made(PLACES["Ernie4_5_MoeTopKRouter"])
    own = router.moe_statics.e_score_correction_bias
    bias = config_of(block).selection_bias
    assert (own.shape, bias.shape, bias.data_ptr()) == ((1, router.num_experts), (router.num_experts,), own.data_ptr())


@pytest.mark.parametrize("router", ["BeamTopKRouter", "LagunaTopKRouter", "OpenAIPrivacyFilterTopKRouter"])
def test_a_scale_of_the_block_is_not_guessed(router: str) -> None:
    block, alone = made(PLACES[router])
    assert config_of(block).output_scale is not None
    assert config_of(alone).output_scale is None


class NewTopKRouter(nn.Module):
    """A class that the table does not have."""


def test_an_unknown_router_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"^NewTopKRouter: is no router .*: it contains nothing$"):
        config_of(NewTopKRouter())
    with pytest.raises(Unsupported, match=r"^ModuleDict: is no router .*: it contains Linear, NewTopKRouter$"):
        config_of(nn.ModuleDict({"gate": NewTopKRouter(), "experts": nn.Linear(1, 1)}))


def test_a_class_of_the_same_name_elsewhere_is_unknown() -> None:
    other = type("MixtralTopKRouter", (nn.Module,), {})
    with pytest.raises(Unsupported, match=r"^MixtralTopKRouter: is no router of transformers"):
        config_of(other())


def test_two_routers_are_not_chosen_from() -> None:
    with pytest.raises(Unsupported, match=r"^ModuleList: has 2 routers"):
        config_of(nn.ModuleList([bare(PLACES["MixtralTopKRouter"]), bare(PLACES["JambaTopKRouter"])]))


def test_a_parametrised_router_is_the_same() -> None:
    """As when its weight is kept in another form."""
    router = made(PLACES["MixtralTopKRouter"])[1]
    before = config_of(router).config
    nn.utils.parametrize.register_parametrization(router, "weight", nn.Identity())
    assert type(router).__name__ != "MixtralTopKRouter"
    assert config_of(router).config == before


def test_another_version_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module.transformers, "__version__", "5.99.0")
    note = config_of(made(PLACES["MixtralTopKRouter"])[1]).note
    assert note == f"the rule was compared with transformers {CHECKED}, this is 5.99.0"


NEW_FAMILY = """
@use_experts_implementation
class NewExperts(nn.Module): ...

class NewChooser(nn.Module):
    def forward(self, x): ...

class NewBlock(nn.Module):
    def __init__(self, config):
        self.experts = NewExperts(config)
        self.chooser = NewChooser(config)

    def forward(self, x):
        _, weights, ids = self.chooser(x)
        return self.experts(x, ids, weights)
"""


def test_a_new_router_is_found_by_its_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "modeling_new.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(router_walk, "MODELS", tmp_path)
    found = places.__wrapped__()
    assert Place("new", "NewChooser", "NewBlock", "chooser") in found
    assert "NewChooser" not in RULES.keys() | REFUSED.keys()


def test_a_family_without_a_router_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "modeling_new.py").write_text(NEW_FAMILY.replace("self.chooser(x)", "choose(x)"))
    monkeypatch.setattr(router_walk, "MODELS", tmp_path)
    with pytest.raises(AssertionError, match="new: has experts, and no router"):
        places.__wrapped__()


def test_the_bias_is_not_copied() -> None:
    router = made(PLACES["DeepseekV3TopkRouter"])[1]
    rule = config_of(router)
    assert rule.selection_bias is router.e_score_correction_bias
    assert rule.selection_bias.dtype == torch.float32
