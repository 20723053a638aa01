"""The families of models that are understood, by config.json's model_type, and those that are refused.

Facts from the families' own classes in transformers 5.23, read and run; `tests/executors/test_checkpoint_families.py`
runs each of them. Defaults are those of the families' configuration classes.
"""

from __future__ import annotations

from executors.checkpoint.family import (
    DEEPSEEK_BIAS,
    Family,
    clamped_silu,
    deepseek_v2,
    deepseek_v3,
    gpt_oss_gate,
    granite,
    grouped,
    key,
    normalized,
    scaled,
    sigmoid,
    softmax,
    sqrtsoftplus,
    topk_softmax,
)

EXPERT_BIAS = ("expert_bias", "e_score_correction_bias", *DEEPSEEK_BIAS)  # of the block; some move it to the router
BLOCK_BIAS = ("e_score_correction_bias", *DEEPSEEK_BIAS)
KIMI_TOP_K = key("num_experts_per_token", "num_experts_per_tok")
KIMI_NORM = key("moe_renormalize", "norm_topk_prob", default=True)

SOFTMAX = {
    "mixtral": Family(softmax(renormalize=True)),
    "minimax": Family(softmax(renormalize=True)),
    "qwen2_moe": Family(softmax(renormalize=normalized(False))),
    "qwen3_moe": Family(softmax(renormalize=normalized(False))),
    "qwen3_next": Family(softmax(renormalize=normalized(True))),
    "qwen3_5_moe_text": Family(softmax(renormalize=True)),
    "qwen3_vl_moe_text": Family(
        softmax(renormalize=True), stacks="either"
    ),  # released [E, H, 2I], saved anew the other
    "qwen3_omni_moe_text": Family(softmax(renormalize=normalized(True))),
    "qwen3_omni_moe_talker_text": Family(softmax(renormalize=normalized(False))),
    "qwen4_exp_text": Family(softmax(renormalize=normalized(True))),
    "olmoe": Family(softmax(renormalize=normalized(False))),
    "flex_olmo": Family(softmax(renormalize=normalized(False))),
    "mellum": Family(softmax(renormalize=normalized(True))),
    "jamba": Family(softmax(), router=("router.weight",)),
    "hunyuan_v1_moe": Family(
        softmax(top_k=key("moe_topk", "num_experts_per_tok"), renormalize=True), router=("gate.wg.weight",)
    ),
    "ernie4_5_moe": Family(
        softmax(
            top_k=key("moe_k", "num_experts_per_tok"),
            renormalize=True,
            renormalize_eps=key("moe_norm_min", default=1e-12),
            renormalize_form="max",
        ),
        selection_bias=("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),
        router_in_fp32=True,
    ),
    "deepseek_v2": deepseek_v2(None, None),
    "deepseek_ocr2_text": deepseek_v2(None, None),
    "unlimited_ocr_text": deepseek_v2(1, 1),
    "mistral4": Family(
        softmax(renormalize=normalized(True), renormalize_eps=1e-20, routed_scaling_factor=scaled(1.0), **grouped(1, 1))
    ),
    "mistral_large4_text": Family(
        softmax(renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=scaled(1.0), **grouped(1, 1)),
        router_in_fp32=True,
    ),
}

TOPK_SOFTMAX = {
    "gpt_oss": Family(
        topk_softmax(**gpt_oss_gate()),
        stacks="columns",
        interleaved=True,
        router=("router.weight",),
        router_bias=("router.bias",),
    ),
    "openai_privacy_filter": Family(  # the router divides by K, the block multiplies by it
        topk_softmax(**gpt_oss_gate()),
        stacks="columns",
        router=("router.weight",),
        router_bias=("router.bias",),
        router_in_fp32=True,
    ),
    "aria_text": Family(
        topk_softmax(top_k=key("moe_topk", "num_experts_per_tok"), activation="silu"),
        stacks="columns",
        router=("router.weight",),
    ),
    "granitemoe": granite(),
    "granitemoe_swa": granite(),
    "granitemoehybrid": granite(),
    "granitemoeshared": granite(),
    "cohere2_moe": Family(
        topk_softmax(),
        cases={
            key("expert_selection_fn", default="softmax"): {
                "softmax": {},
                "sigmoid": {"scoring": "sigmoid", "renormalize": normalized(True), "renormalize_eps": 0.0},
            }
        },
    ),
}

SIGMOID = {
    "deepseek_v3": deepseek_v3(),
    "kimi_k2": deepseek_v3(),  # the same model by another name
    "deepseek_v32": deepseek_v3(),
    "axk1": deepseek_v3(),
    "axk2": deepseek_v3(  # with groups, its mask is 0 where others have -inf
        groups=None, kept=None, cases={key("n_group", default=None): {None: {}, 1: {}}}
    ),
    "dots1": deepseek_v3(norm=False, scaling=1.0, groups=1, kept=1),
    "dots3_note_text": deepseek_v3(scaling=1.0, groups=1, kept=1),
    "exaone_moe": deepseek_v3(groups=1, kept=1, selection_bias=BLOCK_BIAS),
    "glm4_moe": deepseek_v3(scaling=1.0, groups=1, kept=1),
    "glm4_moe_lite": deepseek_v3(scaling=1.8, groups=1, kept=1),
    "glm4v_moe_text": deepseek_v3(scaling=1.0, groups=1, kept=1),
    "glm5_next_text": deepseek_v3(groups=1, kept=1, fields=clamped_silu(10.0)),
    "glm_moe_dsa": deepseek_v3(groups=1, kept=1),
    "solar_open": deepseek_v3(scaling=1.0, groups=1, kept=1),
    "mimo_v2_flash": deepseek_v3(scaling=1.0, groups=1, kept=1),
    "hy_v4": deepseek_v3(scaling=2.827, groups=1, kept=1, fields=clamped_silu(10.0)),
    "nemotron_h": deepseek_v3(
        scaling=1.0,
        groups=1,
        kept=1,
        gated=False,
        fields={"activation": key("mlp_hidden_act", default="relu2")},
    ),
    "beam": deepseek_v3(),  # the factor is the block's
    "bailing_hybrid": deepseek_v3(
        fields={"top_k": KIMI_TOP_K, "renormalize": KIMI_NORM, **grouped(8, 4, "num_expert_group")},
        cases={key("score_function", "moe_router_activation_func", default="sigmoid"): {"sigmoid": {}}},
        selection_bias=("gate.expert_bias", *DEEPSEEK_BIAS),
    ),
    "kimi_linear": deepseek_v3(
        scaling=2.446,
        fields={"top_k": KIMI_TOP_K, "renormalize": KIMI_NORM, **grouped(1, 1, "num_expert_group")},
        cases={key("moe_router_activation_func", default="sigmoid"): {"sigmoid": {}}},
    ),
    "afmoe": Family(
        sigmoid(renormalize=True, routed_scaling_factor=key("route_scale", default=1.0)),
        router=("router.gate.weight",),
        selection_bias=EXPERT_BIAS,
    ),
    "hy_v3": Family(
        sigmoid(renormalize=True, routed_scaling_factor=key("router_scaling_factor", default=2.826)),
        router=("router.gate.weight", "gate.weight"),
        selection_bias=EXPERT_BIAS,
        router_in_fp32=True,
    ),
    "flint": Family(sigmoid(renormalize=normalized(True), renormalize_eps=0.0), router_in_fp32=True),
    "inkling2_text": Family(
        sigmoid(
            renormalize=True,
            renormalize_eps=1e-20,
            routed_scaling_factor=key("route_scale", "routed_scaling_factor", default=8.0),
            activation="silu",
            gate_softcap=key("mlp_gate_softcap", default=4.0),
            up_softcap=key("mlp_up_softcap", default=25.0),
        ),
        cases={key("scoring_func", default="sigmoid"): {"sigmoid": {}, "sqrtsoftplus": {"scoring": "sqrtsoftplus"}}},
        interleaved=True,
        selection_bias=("gate.bias", *DEEPSEEK_BIAS),
        router_in_fp32=True,
    ),
    "kolibri1": Family(
        sigmoid(renormalize=normalized(False), renormalize_eps=0.0, selection_key="logit"),
        selection_bias=("../moe.router.expert_bias", *DEEPSEEK_BIAS),
        router_in_fp32=True,
    ),
    "laguna": Family(  # the factor is the block's
        sigmoid(
            renormalize=True,
            renormalize_eps=0.0,
            routed_scaling_factor=key("moe_routed_scaling_factor", default=1.0),
        ),
        cases={key("moe_router_logit_softcapping", default=0.0): {0.0: {}}},
        selection_bias=("experts.e_score_correction_bias", *DEEPSEEK_BIAS),
    ),
    "lfm2_moe": Family(
        sigmoid(
            activation="silu",
            renormalize=normalized(True),
            renormalize_eps=1e-6,
            routed_scaling_factor=scaled(1.0),
        ),
        cases={key("use_expert_bias", default=True): {True: {}, False: {"selection_bias": False}}},
        selection_bias=("expert_bias",),
    ),
    "llama4_text": Family(sigmoid(scale_input=True), stacks="columns", router=("router.weight",)),
    "minimax_m2": Family(sigmoid(renormalize=True, renormalize_eps=0.0), selection_bias=BLOCK_BIAS),
    "minimax_m3_vl_text": Family(  # the factor is the block's
        sigmoid(renormalize=True, renormalize_eps=0.0, routed_scaling_factor=scaled(2.0)) | gpt_oss_gate(),
        selection_bias=BLOCK_BIAS,
    ),
}

SQRTSOFTPLUS = {
    "deepseek_v4": Family(
        sqrtsoftplus(renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=scaled(1.5), **clamped_silu(10.0)),
        cases={
            key("scoring_func", default="sqrtsoftplus"): {"sqrtsoftplus": {}, "sigmoid": {"scoring": "sigmoid"}},
            key("mlp_layer_types"): {"moe": {}},  # of a layer; others choose experts by a hash of the token
        },
        selection_bias=("gate.bias", *DEEPSEEK_BIAS),
    ),
}

FAMILIES: dict[str, Family] = {**SOFTMAX, **TOPK_SOFTMAX, **SIGMOID, **SQRTSOFTPLUS}

OTHER_INPUT = "its router takes other hidden states than its experts, through a norm and a scale of its own"
SHARED_SUM = "its router's scores are divided by a sum that has shared experts in it"
CAPACITY = "its experts have a capacity, beyond which tokens are dropped"
REFUSED: dict[str, str] = {
    "phimoe": "its router is a sparsemixer, which MoEConfig cannot express",
    "gemma4_text": OTHER_INPUT,
    "diffusion_gemma_text": OTHER_INPUT,
    "inkling_text": SHARED_SUM,
    "muse_spark_text": "its experts take a projection of what its router takes, and a norm follows each",
    "zaya": "its router is a network of its own with a state, and may skip a layer",
    "step3p5": "its stacks are called moe.gate_proj.weight and the like, which this reader does not know",
    "longcat_flash": "some of its experts have no weights and return their input",
    "ernie4_5_vl_moe_text": "one list holds its text experts and its vision experts, in two sizes",
    "jetmoe": "its layer has a bias of its own, and its attention has experts too",
    "dbrx": "its stacks have experts and rows in one dimension, which this reader does not take apart",
    "doge": "its experts are of rank one, and retrieved by product keys",
    "nllb-moe": CAPACITY,
    "switch_transformers": CAPACITY,
}
