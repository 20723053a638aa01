"""The forms in which checkpoints lie on disk: shards, stacks in either order, names of models in memory, composites."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import executors
import tiny_models
from checkpoint_cases import GPT_OSS, MIXTRAL, SPARSE, E, H, I, folder, gpt_oss, merged, mixtral, random, same_layer
from executors import checkpoint
from executors.checkpoint.shards import INDEX, Reader


@pytest.fixture
def keys_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of which numbers are read, in order."""
    found: list[str] = []
    original = Reader.tensor

    def tensor(self: Reader, key: str) -> torch.Tensor:
        found.append(key)
        return original(self, key)

    monkeypatch.setattr(Reader, "tensor", tensor)
    return found


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_are_read_with_an_index_and_without(indexed: bool, tmp_path: Path) -> None:
    model = tiny_models.tiny_model("mixtral")
    tiny_models.saved(model, tmp_path, max_shard_size="30KB")
    assert (tmp_path / INDEX).exists()
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    if not indexed:
        (tmp_path / INDEX).unlink()
    opened = checkpoint.open(tmp_path)
    for layer, block in zip(opened.layers, tiny_models.blocks(model), strict=True):
        assert torch.equal(opened.weights(layer).gate_up_proj, block.experts.gate_up_proj)
        assert torch.equal(opened.weights(layer).down_proj, block.experts.down_proj)


def test_one_layer_is_read_and_nothing_else(keys_read: list[str], tmp_path: Path) -> None:
    tiny_models.saved(tiny_models.tiny_model("qwen2_moe"), tmp_path)
    opened = checkpoint.open(tmp_path)
    assert keys_read == []
    opened.weights(1)
    assert sorted(keys_read) == sorted(
        f"model.layers.1.mlp.experts.{e}.{n}_proj.weight" for e in range(8) for n in ("gate", "up", "down")
    )
    keys_read.clear()
    opened.router(1)
    assert keys_read == ["model.layers.1.mlp.gate.weight"]


def test_stacks_are_not_copied(tmp_path: Path) -> None:
    opened = checkpoint.open(folder(tmp_path, gpt_oss(), GPT_OSS))
    weights = opened.weights(0)
    assert weights.gate_up_proj.stride() == (2 * I * H, 1, 2 * I)  # a view of what lies in the file


def test_dtype_of_the_model_says_nothing_about_dense_weights(tmp_path: Path) -> None:
    """Each tensor has its own: a model may be saved in another dtype than config.json names."""
    weights = checkpoint.open(folder(tmp_path, mixtral(), MIXTRAL | {"dtype": "float64"})).weights(0)
    assert weights.gate_up_proj.dtype == torch.bfloat16


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    checkpoint.open(folder(tmp_path, mixtral(), MIXTRAL)).weights(0, lambda done, total: said.append((done, total)))
    assert said == [(n + 1, 3 * E) for n in range(3 * E)]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "lfm2_moe", "granitemoe", "jamba", "minimax_m2", "hy_v3"])
def test_names_of_the_model_in_memory_are_read_too(family: str, tmp_path: Path) -> None:
    model = tiny_models.tiny_model(family)
    opened = checkpoint.open(tiny_models.saved(model, tmp_path, save_original_format=False))
    block = tiny_models.blocks(model)[0]
    assert opened.layers[0].form == "dense, stacked"
    assert torch.equal(opened.weights(0).gate_up_proj, block.experts.gate_up_proj)
    x = random(3, tiny_models.HIDDEN, dtype=torch.float32)
    y = executors.get("native")(x, opened.router(0).logits(x), opened.weights(0))
    torch.testing.assert_close(y, tiny_models.outputs(block, x)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(H, I), (H, H // 2), (H, H)])
@pytest.mark.parametrize("columns", [True, False])
def test_shapes_tell_the_order_of_a_family_that_has_both(columns: bool, sizes: tuple[int, int], tmp_path: Path) -> None:
    """Even with I = H, or 2I = H: no shapes fit both orders."""
    hidden, intermediate = sizes
    up, down = random(E, 2 * intermediate, hidden), random(E, hidden, intermediate, seed=1)
    prefix = "model.language_model.layers.0.mlp.experts."
    stored = [up, down] if not columns else [up.transpose(1, 2), down.transpose(1, 2)]
    state = {f"{prefix}gate_up_proj": stored[0], f"{prefix}down_proj": stored[1]}
    text = {"model_type": "qwen3_vl_moe_text", "num_experts_per_tok": 2}
    config = {"model_type": "qwen3_vl_moe", "text_config": text}
    weights = checkpoint.open(folder(tmp_path, state, config)).weights(0)
    assert torch.equal(weights.gate_up_proj, up)
    assert torch.equal(weights.down_proj, down)


VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
COMPOSITES = {
    "qwen3_vl_moe": {
        "depth": 1,
        "num_heads": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
    "aria": {"model_type": "idefics3_vision", "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
    "llama4": {
        "num_hidden_layers": 1,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
}


@pytest.mark.parametrize("family", sorted(COMPOSITES))
def test_composite_models_are_read_by_their_text_model(family: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    text = tiny_models.tiny_config(f"{family}_text").to_dict()
    config = CONFIG_MAPPING[family](text_config=text, vision_config=VISION | COMPOSITES[family])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    opened = checkpoint.open(tiny_models.saved(model, tmp_path))
    blocks = tiny_models.blocks(model)
    for layer, block in zip(opened.layers, blocks, strict=True):
        stored, found = block.experts.gate_up_proj, opened.weights(layer).gate_up_proj
        assert torch.equal(found, stored if found.shape == stored.shape else stored.transpose(1, 2))
        assert opened.section(layer).name == f"{family}_text"


def test_two_models_in_one_checkpoint_are_told_apart_by_prefix(tmp_path: Path) -> None:
    """Qwen3-Omni's thinker renormalises, its talker does not."""
    prefixes = [f"{tower}.model.layers.0.mlp." for tower in ("thinker", "talker")]
    state = mixtral(prefixes[0]) | mixtral(prefixes[1], seed=7)
    config = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {
            "model_type": "qwen3_omni_moe_thinker",
            "text_config": {"model_type": "qwen3_omni_moe_text", "num_experts_per_tok": 2, "norm_topk_prob": True},
        },
        "talker_config": {
            "model_type": "qwen3_omni_moe_talker",
            "text_config": {"model_type": "qwen3_omni_moe_talker_text", "num_experts_per_tok": 3},
        },
    }
    opened = checkpoint.open(folder(tmp_path, state, config))
    assert [layer.prefix for layer in opened.layers] == sorted(prefixes)
    assert opened.config(prefixes[0]).renormalize
    assert not opened.config(prefixes[1]).renormalize
    assert opened.config(prefixes[1]).top_k == 3
    assert torch.equal(opened.weights(prefixes[1].rstrip(".")).gate_up_proj, merged(state, prefixes[1])[0])
    with pytest.raises(checkpoint.BadCheckpoint) as caught:
        opened.weights(0)
    expected = f"{tmp_path}: layer 0 is there 2 times: must be named, {sorted(prefixes)[0]} or {sorted(prefixes)[1]}"
    assert str(caught.value) == expected


@pytest.mark.parametrize("tower", ["vision_tower", "visual", "model.vision_encoder", "audio_tower"])
def test_experts_of_other_towers_are_no_layers_of_the_text_model(tower: str, tmp_path: Path) -> None:
    state = (
        mixtral() | mixtral(f"{tower}.blocks.0.mlp.") | {"model.layers.0.shared_mlp.input_linear.weight": random(2, 2)}
    )
    opened = checkpoint.open(folder(tmp_path, state, MIXTRAL))
    assert [layer.prefix for layer in opened.layers] == [SPARSE]


def test_lists_in_config_json_are_by_layer(tmp_path: Path) -> None:
    state = mixtral("model.layers.0.mlp.") | mixtral("model.layers.2.mlp.")
    config = {"model_type": "hunyuan_v1_moe", "moe_topk": [1, 2, 3]}
    opened = checkpoint.open(folder(tmp_path, state, config))
    assert [opened.config(layer).top_k for layer in opened.layers] == [1, 3]


def test_family_is_taken_where_the_model_type_is_unknown(tmp_path: Path) -> None:
    config = {**GPT_OSS, "model_type": "our_own"}
    opened = checkpoint.open(folder(tmp_path, gpt_oss(), config), family="gpt_oss")
    same_layer(opened.weights(0), gpt_oss())
    assert opened.config(0).gate_up_layout == "interleaved"
    text = {"model_type": "nobody_s", "text_config": {**config, "model_type": "our_own"}}
    (tmp_path / "config.json").write_text(json.dumps(text))
    same_layer(checkpoint.open(tmp_path, family="gpt_oss").weights(0), gpt_oss())


def test_only_stacks_that_join_gate_and_up_have_a_layout(tmp_path: Path) -> None:
    """gpt-oss' rows alternate in its stacks; gates and ups that lie apart on disk are concatenated by the reader."""
    state = mixtral("model.layers.0.mlp.") | {"model.layers.0.mlp.router.weight": random(E, H)}
    opened = checkpoint.open(folder(tmp_path, state, GPT_OSS))
    assert opened.config(0).gate_up_layout == "concatenated"
    assert torch.equal(opened.weights(0).gate_up_proj, merged(state, "model.layers.0.mlp.")[0])
