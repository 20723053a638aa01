"""Each family of the table, on a checkpoint that transformers' own save_pretrained wrote: weights, router, output."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import executors
import tiny_models
from executors import checkpoint
from executors.checkpoint import config as configs
from executors.checkpoint.family import MISSING, Key
from executors.checkpoint.table import FAMILIES, REFUSED
from family_errors import in_dtype
from tiny_models import Block

ALIASES = {"kimi_k2": "deepseek_v3"}
BLOCK_SCALES = ("beam", "laguna", "llama4_text", "minimax_m3_vl_text", "openai_privacy_filter")
NORM_BEHIND = "axk1"  # a norm of the block's own follows
WITHOUT_INTERFACE = {"jetmoe", "dbrx", "doge", "nllb-moe", "switch_transformers", "longcat_flash", "step3p5"}


def parameters(family: str, block: Block) -> dict[str, Tensor | None]:
    """The layer's parameters as the loaded module holds them, in the canonical order."""
    module: Any = block.experts
    up = getattr(module, "gate_up_proj", None)
    up = module.up_proj if up is None else up
    down = module.down_proj
    if getattr(module, "is_transposed", family == "llama4_text"):
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    elif FAMILIES[family].interleaved and module.is_concatenated:  # rows alternate in the file alone
        up = torch.stack(up.chunk(2, dim=1), dim=2).flatten(1, 2)
    named = {**dict(block.module.named_parameters()), **dict(block.module.named_buffers())}
    bias = [value for name, value in named.items() if re.search(r"(e_score_correction|expert)_bias$", name)]
    return {
        "gate_up_proj": up,
        "down_proj": down,
        "gate_up_proj_bias": getattr(module, "gate_up_proj_bias", None),
        "down_proj_bias": getattr(module, "down_proj_bias", None),
        "selection_bias": bias[0].reshape(-1) if bias else None,
    }


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - ALIASES.keys()))
def test_family_is_read_and_computes_what_its_module_computes(family: str, tmp_path: Path) -> None:
    model = tiny_models.tiny_model(family)
    opened = checkpoint.open(tiny_models.saved(model, tmp_path))
    blocks = tiny_models.blocks(model)
    assert len(opened.layers) == len(blocks) > 0
    x = torch.randn(tiny_models.TOKENS, tiny_models.HIDDEN, generator=torch.Generator().manual_seed(1))
    for layer, block in zip(opened.layers, blocks, strict=True):
        assert f"layers.{layer.index}." in layer.prefix
        assert f"layers.{layer.index}." in f"{block.name}."
        weights = opened.weights(layer)
        for name, value in parameters(family, block).items():
            read = getattr(weights, name)
            assert (read is None) == (value is None), name
            assert value is None or (read.dtype == value.dtype and torch.equal(read, value)), name
        logits, of_experts, of_block = tiny_models.outputs(block, x)
        own = opened.router(layer).logits(x)
        torch.testing.assert_close(own, logits, rtol=1e-5, atol=1e-5)
        y = executors.get("native")(x, own, weights)
        expected = [of_block] if family in BLOCK_SCALES else [of_experts]
        expected += [] if family == NORM_BEHIND else [of_block]
        for wanted in expected:
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - ALIASES.keys()))
def test_router_product_is_rounded_where_the_family_rounds_it(family: str, tmp_path: Path) -> None:
    model = in_dtype(tiny_models.tiny_model(family), torch.bfloat16)
    opened = checkpoint.open(tiny_models.saved(model, tmp_path))
    x = torch.randn(tiny_models.TOKENS, tiny_models.HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits, _, _ = tiny_models.outputs(tiny_models.blocks(model)[0], x)
    own = opened.router(opened.layers[0]).logits(x)
    assert own.dtype == (torch.float32 if FAMILIES[family].router_in_fp32 else torch.bfloat16)
    assert torch.equal(own.float(), logits.float())


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - ALIASES.keys()))
def test_defaults_are_those_of_the_family_s_own_class(family: str) -> None:
    """What an old config.json leaves out, the class fills in."""
    config = transformers.CONFIG_MAPPING[family]().to_dict()
    entries = [(entry, entry.default) for entry in FAMILIES[family].fields.values() if isinstance(entry, Key)]
    entries += [(entry, entry.default) for entry in FAMILIES[family].cases]
    there = [(name, default) for entry, default in entries for name in entry.names if name in config]
    assert there
    assert [(n, d, config[n]) for n, d in there if d is not MISSING and d != config[n]] == []


def test_every_family_of_the_experts_interface_is_in_a_table() -> None:
    """A new one in transformers must be added, or refused by name."""
    models = resources.files("transformers") / "models"
    decorated = {
        folder.name
        for folder in models.iterdir()
        for file in (folder.iterdir() if folder.is_dir() else ())
        if file.name.startswith("modeling_") and "\n@use_experts_implementation" in file.read_text()
    }
    named = {*FAMILIES, *REFUSED}
    assert len(decorated) > 60
    assert sorted(each for each in decorated if not named & {each, f"{each}_text"}) == []
    assert sorted(named - {n for each in decorated for n in (each, f"{each}_text")} - ALIASES.keys()) == sorted(
        WITHOUT_INTERFACE | {"llama4_text", "qwen3_omni_moe_talker_text"}
    )


def test_the_page_lists_every_family() -> None:
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    listed = text[text.index("## Families") : text.index("A layer is the routed experts")]
    assert sorted(set(re.findall(r"`(\w+)`", listed)) - {"save_pretrained", "native"}) == checkpoint.families()


def test_an_alias_is_the_family_itself() -> None:
    assert {name: FAMILIES[name] for name in ALIASES} == {name: FAMILIES[of] for name, of in ALIASES.items()}


@pytest.mark.parametrize("name", sorted({*configs.GATED, *configs.PLAIN}))
def test_activations_are_those_of_the_library(name: str) -> None:
    from transformers.activations import ACT2FN

    z = torch.linspace(-6, 6, 1001)
    function = torch.nn.functional
    computed = {
        "silu": function.silu(z),
        "gelu": function.gelu(z),
        "gelu_tanh": function.gelu(z, approximate="tanh"),
        "relu2": function.relu(z).square(),
    }
    gates = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}
    plain = configs.PLAIN[name]
    torch.testing.assert_close(ACT2FN[name](z), computed[plain], rtol=1e-5, atol=1e-6)
    assert configs.GATED.get(name) == gates.get(plain)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}, {"scoring": "sigmoid"}),
        ("deepseek_v2", {"topk_method": "greedy"}, {"num_groups": 1}),
        ("qwen2_moe", {"norm_topk_prob": True}, {"renormalize": True}),
        ("lfm2_moe", {"use_expert_bias": False}, {"scoring": "sigmoid"}),
        ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}, {"activation": "geglu_tanh"}),
        ("inkling2_text", {"scoring_func": "sqrtsoftplus"}, {"scoring": "sqrtsoftplus", "gate_softcap": 0.5}),
        ("deepseek_v4", {"scoring_func": "sigmoid"}, {"scoring": "sigmoid"}),
        ("kolibri1", {"norm_topk_prob": False}, {"selection_key": "logit", "renormalize": False}),
        ("ernie4_5_moe", {"moe_norm_min": 0.75}, {"renormalize_form": "max", "renormalize_eps": 0.75}),
        ("nemotron_h", {"mlp_hidden_act": "gelu"}, {"activation": "gelu"}),
        ("mistral4", {"n_group": 4, "topk_group": 2}, {"num_groups": 4, "topk_groups": 2}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}, {"renormalize": False}),
    ],
)
def test_what_config_json_says_is_heeded(
    family: str, changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_models.tiny_model(family, **changes)
    opened = checkpoint.open(tiny_models.saved(model, tmp_path))
    layer, block = opened.layers[0], tiny_models.blocks(model)[0]
    config = opened.config(layer)
    assert {name: getattr(config, name) for name in expected} == expected
    x = torch.randn(tiny_models.TOKENS, tiny_models.HIDDEN, generator=torch.Generator().manual_seed(1))
    y = executors.get("native")(x, opened.router(layer).logits(x), opened.weights(layer))
    torch.testing.assert_close(y, tiny_models.outputs(block, x)[1], rtol=1e-5, atol=1e-5)
