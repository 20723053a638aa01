"""Sizes of tiny models of transformers' families: one table for all, and what a family needs beside it."""

from __future__ import annotations

from typing import Any

LAYERS, HIDDEN, VOCAB, EXPERTS, CHOSEN = 2, 32, 64, 4, 2

# Whatever of these names a configuration has.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
    # MLPs and experts
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "dense_intermediate_size": 24,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "top_k_experts": CHOSEN,
    "moe_topk": CHOSEN,
    "moe_k": CHOSEN,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "mlp_layer_types": ["sparse"] * LAYERS,
    "mlp_only_layers": [],
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    # attention
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "hc_mult": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}

# By family, what those do not do.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"mlp_layer_types": ["moe"] * LAYERS, "o_groups": 2, "o_lora_rank": 16},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]},
    },
    "gemma4": {"enable_moe_block": True, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "glm5_next": {"index_kpool": 2, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {
        "num_key_value_heads": 1,  # half of those with a sliding window
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "muse_spark": {"moe_hidden_size": 24},
    "nemotron_h": {
        "layer_types": ["linear_attention", "moe"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "qwen4_exp": {"ngram_vocab_size_base": 64, "split_ngram_parts": 2, "hc_lowrank": 8},
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 16},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

# By experts class, the model where its name does not lead there.
CLASSES: dict[str, str] = {
    "DiffusionGemmaTextExperts": "DiffusionGemmaEncoderTextModel",
    "Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel",
}

# Models that take no ids.
WITHOUT_IDS = ("Qwen3OmniMoeTalkerModel",)

# Models that take the kind of each token.
WITH_IMAGES = ("Ernie4_5_VLMoeTextModel",)

# Families that loop over their experts themselves: the class that does, a model that has it, and what makes it small.
OWN_LOOPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dbrx": ("DbrxExperts", "DbrxModel", {"n_layers": 1, "attn_config": {"rope_theta": 1e4}}),
    "doge": ("DogeCDMoE", "DogeModel", {"num_hidden_layers": 1, "is_moe": True}),
    "jetmoe": ("JetMoeParallelExperts", "JetMoeModel", {"num_hidden_layers": 1}),
    "llama4": ("Llama4TextExperts", "Llama4TextModel", {"num_hidden_layers": 1}),
    "longcat_flash": ("LongcatFlashExperts", "LongcatFlashModel", {"num_layers": 1}),
    "nllb_moe": ("NllbMoeExperts", "NllbMoeEncoder", {"encoder_layers": 1, "encoder_sparse_step": 1, "num_experts": 2}),
    "step3p7": ("Step3p7Experts", "Step3p7TextModel", {"num_hidden_layers": 1, "mlp_layer_types": ["sparse"]}),
    "switch_transformers": ("SwitchTransformersExperts", "SwitchTransformersEncoderModel", {"num_layers": 3}),
    "vitpose_backbone": ("VitPoseNaiveMoe", "VitPoseBackbone", {"num_hidden_layers": 1, "num_experts": 2}),
}
WITHOUT_EXPERTS = ("bamba",)  # the word is in its source, the experts are not
