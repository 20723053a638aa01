"""Every family of the installed transformers, on its own loop over experts and on `executors.hf`."""

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

import transformers

import executors.hf
import families
import family_errors
from executors.hf import interface
from executors.hf import module as experts_module
from family_sizes import OWN_LOOPS, WITHOUT_EXPERTS
from moe_ref import MoEWeights

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # transformers' own, of many models
]
FAMILIES = families.families()
BY_NAME = {family.name: family for family in FAMILIES}
SOURCES = Path(transformers.__file__).parent


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_model_in_fp32(family: families.Family) -> None:
    """Its logits, or last hidden states, and all its gradients: no farther from float64 than on its own loop."""
    judgement = family_errors.judge_model(family)
    assert judgement.failures() == {}
    assert max(judgement.own.values()) < 0.01  # no token chose another expert than in float64
    assert max(judgement.ours["output"], judgement.own["output"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_its_experts_in_bf16(family: families.Family) -> None:
    judgement = family_errors.judge_experts(family, torch.bfloat16)
    assert judgement.failures() == {}
    assert judgement.own["output"] < 0.02


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_gradients_reach_all_experts(family: families.Family) -> None:
    """What is compared above is not nothing."""
    names = {"x", "topk_weights", "down_proj"}
    assert names < family_errors.judge_experts(family, torch.bfloat16).own.keys()
    model = families.build(family)
    family_errors.run_model(model)
    for module in families.experts_of(model, family).values():
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("name", OWN_LOOPS)
def test_a_loop_of_its_own_is_refused_by_name(name: str) -> None:
    experts, model_class, sizes = OWN_LOOPS[name]
    found = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), model_class)
    with torch.device("meta"):
        model = found(found.config_class(**sizes))
    assert experts in {type(module).__name__ for module in model.modules()}
    with pytest.raises(executors.Unsupported, match=f"has {experts}, with a loop of its own"):
        executors.hf.use(model)


def test_all_loops_of_their_own_are_known() -> None:
    """Each class that is named after experts is dispatched or listed; each family that has experts has such a class."""
    dispatched = {family.experts for family in FAMILIES}
    unknown, seen = [], set(dispatched)
    for file in sorted([*SOURCES.glob("models/*/modeling_*.py"), *SOURCES.glob("integrations/*.py")]):
        source = file.read_text(encoding="utf-8")
        classes = set(re.findall(r"^class (\w+)\((?:nn\.)?Module\w*\)", source, flags=re.MULTILINE))
        seen |= classes
        unknown += [name for name in classes if name.endswith("Experts") and not name.endswith("SharedExperts")]
        counts = re.search(r"\bnum_experts\b|\bnum_local_experts\b|\bn_routed_experts\b", source)
        if counts and file.parent.parent.name == "models" and file.parent.name not in WITHOUT_EXPERTS:
            assert classes & (dispatched | experts_module.OWN_LOOPS), f"{file.parent.name}: experts of an unknown class"
    assert set(unknown) - dispatched - experts_module.OWN_LOOPS == set()
    assert {experts for experts, _, _ in OWN_LOOPS.values()} <= seen & experts_module.OWN_LOOPS


def changed(**fields: object) -> Callable[[MoEWeights], MoEWeights]:
    return lambda weights: replace(weights, config=replace(weights.config, **fields))


def not_transposed(weights: MoEWeights) -> MoEWeights:
    """The bytes of [E, I, H] read as [E, H, I]."""
    return replace(weights, down_proj=weights.down_proj.transpose(1, 2).reshape(weights.down_proj.shape))


def factor_less_one(weights: MoEWeights) -> MoEWeights:
    """What transformers stores, taken for gamma."""
    return replace(weights, post_expert_norm=weights.post_expert_norm - 1)


BREAKS: list[tuple[str, str, Callable[[MoEWeights], MoEWeights]]] = [
    ("deepseek_v4", "another limit", changed(limit=9.5)),
    ("glm5_next", "no limit", changed(limit=None)),
    ("gpt_oss", "interleaved read as concatenated", changed(gate_up_layout="concatenated")),
    ("gpt_oss", "another alpha", changed(alpha=1.7)),
    ("gpt_oss", "no bias of the first product", lambda weights: replace(weights, gate_up_proj_bias=None)),
    ("minimax_m3_vl", "another offset", changed(up_offset=0.999)),
    ("inkling2", "another softcap of the gate", changed(gate_softcap=3.9)),
    ("inkling2", "no softcap of the gate", changed(gate_softcap=None)),
    ("inkling2", "no softcap of the up half", changed(up_softcap=None)),
    ("openai_privacy_filter", "no bias of the second product", lambda weights: replace(weights, down_proj_bias=None)),
    ("muse_spark", "no norm", lambda weights: replace(weights, post_expert_norm=None)),
    ("muse_spark", "another epsilon of the norm", changed(post_expert_norm_eps=0.01)),
    ("muse_spark", "the norm's weight for its factor", factor_less_one),
    ("aria", "not transposed", not_transposed),
    ("gemma4", "another gelu", changed(activation="geglu")),
    ("mixtral", "gelu for silu", changed(activation="geglu")),
    ("nemotron_h", "silu for relu2", changed(activation="silu")),
]


@pytest.mark.parametrize(("name", "what", "broken"), BREAKS, ids=[f"{name}: {what}" for name, what, _ in BREAKS])
def test_a_planted_break_is_noticed(
    name: str, what: str, broken: Callable[[MoEWeights], MoEWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = interface.weights_of
    monkeypatch.setattr(interface, "weights_of", lambda module: broken(true(module)))
    judgement = family_errors.judge_model.__wrapped__(BY_NAME[name])
    assert len(judgement.failures()) > len(judgement.ours) / 2
    assert "output" in judgement.failures()


def test_a_family_that_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of a later version may be: no test is skipped silently."""
    mixtral = BY_NAME["mixtral"]
    monkeypatch.setitem(families.EXCEPTIONS, "mixtral", {"hidden_size": "many"})
    with pytest.raises(families.NoTinyModel, match="mixtral-MixtralExperts"):
        families.build(mixtral)
    with pytest.raises(families.NoTinyModel, match="mixtral-MixtureExperts: no model class"):
        families.model_class(families.Family("mixtral", "MixtureExperts"))
