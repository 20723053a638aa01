"""Tiny models of transformers' families with random weights, for tests that read what `save_pretrained` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS = 9, 32, 24, 8
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), INTERMEDIATE),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"), 8),
    **dict.fromkeys(("num_attention_heads",), 4),
    **dict.fromkeys(("num_hidden_layers", "num_key_value_heads", "n_group"), 2),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "pad_token_id"), 0),
    **dict.fromkeys(("decoder_sparse_step", "moe_layer_interval", "topk_group", "bos_token_id"), 1),
    **dict.fromkeys(("expert_layer_period", "attn_layer_period"), 1),
    **dict.fromkeys(("expert_layer_offset", "attn_layer_offset"), 0),
    "num_expert_group": 2,
    "num_attention_groups": 2,
    "eos_token_id": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "mlp_only_layers": [],
    "moe_shared_expert_intermediate_size": INTERMEDIATE,
}
# What a family needs beside it. Some of its own to be worth a test: a factor that is not 1, renormalisation switched.
OWN: dict[str, dict[str, Any]] = {
    "dots3_note_text": {"num_key_value_heads": 4},
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "swiglu_limit": 0.5},
    "axk2": {"n_group": None, "topk_group": None},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["sparse"] * 2,
        "n_group": None,
        "topk_group": None,
        "routed_scaling_factor": 1.5,
    },
    "unlimited_ocr_text": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "granitemoehybrid": {"layer_types": ["attention", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "routed_scaling_factor": 1.5},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": INTERMEDIATE},
    "qwen4_exp_text": {"layer_types": ["linear_attention"] * 2},
    "afmoe": {"route_scale": 1.5},
    "glm4_moe": {"routed_scaling_factor": 1.5},
    "dots1": {"routed_scaling_factor": 1.5, "norm_topk_prob": True},
    "laguna": {"moe_routed_scaling_factor": 1.5},
    "llama4_text": {"interleave_moe_layer_step": 1, "num_experts_per_tok": 2, "intermediate_size_mlp": INTERMEDIATE},
    "nemotron_h": {"layers_block_type": ["mamba", "moe"], "moe_shared_expert_intermediate_size": INTERMEDIATE},
    "gpt_oss": {"swiglu_limit": 0.5},
    "openai_privacy_filter": {"swiglu_limit": 0.5},
    "minimax_m3_vl_text": {"swiglu_limit": 0.5},
    "hy_v4": {"swiglu_limit": 0.5},
    "deepseek_v4": {"mlp_layer_types": ["moe", "moe"], "swiglu_limit": 0.5},
    "inkling2_text": {"mlp_gate_softcap": 0.5, "mlp_up_softcap": 0.75},
    "kolibri1": {"norm_topk_prob": True},
}
# Classes that no auto class knows.
CLASSES = {
    "deepseek_ocr2_text": ("deepseek_ocr2", "DeepseekOcr2TextModel"),
    "unlimited_ocr_text": ("unlimited_ocr", "UnlimitedOcrTextModel"),
    "minimax_m3_vl_text": ("minimax_m3_vl", "MiniMaxM3VLTextModel"),
    "mistral_large4_text": ("mistral_large4", "MistralLarge4TextModel"),
    "glm5_next_text": ("glm5_next", "Glm5NextTextModel"),
    "dots3_note_text": ("dots3_note", "Dots3NoteTextModel"),
    "qwen3_omni_moe_text": ("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel"),
    "qwen3_omni_moe_talker_text": ("qwen3_omni_moe", "Qwen3OmniMoeTalkerModel"),
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A configuration of the family with sizes as small as they go."""
    logging.set_verbosity_error()
    known = CONFIG_MAPPING[model_type]().to_dict()
    chosen = {name: value for name, value in SIZES.items() if name in known}
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(known.get(name), list):
            chosen[name] = known[name][-2:]
    return CONFIG_MAPPING[model_type](**{**chosen, **OWN.get(model_type, {}), **changes})


def tiny_model(model_type: str, **changes: Any) -> nn.Module:
    """The family's text model, with random weights and biases."""
    config = tiny_config(model_type, **changes)
    if model_type in CLASSES:
        module, name = CLASSES[model_type]
        model = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), name)(config)
    else:
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError:
            model = AutoModel.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and any(part in name for part in ("experts", "gate", "router", "bias", "statics")):
            value.data = torch.randn(value.shape, generator=generator).to(value.dtype) / 4
    return model.eval()


@dataclass(frozen=True)
class Block:
    """One Mixture-of-Experts block of a model.

    Attributes:
        module: the block.
        experts: its experts module, whose parameters are the layer's.
        router: its router module.
    """

    name: str
    module: nn.Module
    experts: nn.Module
    router: nn.Module


def blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model, in order."""
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        router = next((children[each] for each in ("gate", "router") if each in children), None)
        if "experts" in children and router is not None:
            found.append(Block(name, module, children["experts"], router))
    return found


def outputs(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Router logits [T, E], the experts' output [T, H], and the block's without shared experts [T, H]."""
    seen: dict[str, Any] = {}
    hooks = [
        block.router.register_forward_hook(lambda _m, _i, out: seen.update(router=out)),
        block.experts.register_forward_hook(lambda _m, _i, out: seen.update(experts=out)),
    ]
    for name, parameter in block.module.named_parameters():
        if "shared" in name:
            parameter.data.zero_()
    with torch.no_grad():
        out = block.module(x[None])
    for hook in hooks:
        hook.remove()
    out = out[0] if isinstance(out, tuple) else out
    results = seen["router"] if isinstance(seen["router"], tuple) else (seen["router"],)
    logits = [each for each in results if each.is_floating_point() and each.shape[-1] == EXPERTS][-1]
    return logits.reshape(-1, EXPERTS), seen["experts"].reshape(-1, HIDDEN)[: len(x)], out.reshape(-1, HIDDEN)


def saved(model: Any, folder: Path, **arguments: Any) -> Path:
    """The folder that `save_pretrained` wrote."""
    model.save_pretrained(folder, **arguments)
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes config.json."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
