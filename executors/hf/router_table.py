"""Which rule a router of transformers follows, by the name of its class.

To add a router, name its class in `RULES`, or in `REFUSED` with what the specification lacks. The tests then compare
the rule with the router itself.
"""

from __future__ import annotations

from executors.hf.router_rules import (
    Rule,
    afmoe,
    axk2,
    beam,
    chosen_softmax,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    ernie,
    flint,
    gemma4,
    hy_v3,
    inkling2,
    kolibri1,
    lfm2,
    llama4,
    minimax_m2,
    minimax_m3,
    mistral4,
    mistral_large4,
    muse_spark,
    privacy_filter,
    softmax,
    softmax_if_asked_renormalized,
    softmax_renormalized,
)

CHECKED = "5.23.0"  # the version of transformers whose routers were compared with this table

_NAMES: dict[Rule, str] = {
    softmax: "JambaTopKRouter",
    softmax_renormalized: "HunYuanMoEV1Gate MiniMaxTopKRouter MixtralTopKRouter Qwen3OmniMoeTextTopKRouter "
    "Qwen3VLMoeTextTopKRouter Qwen3_5MoeTopKRouter",
    softmax_if_asked_renormalized: "FlexOlmoTopKRouter MellumTopKRouter OlmoeTopKRouter Qwen2MoeTopKRouter "
    "Qwen3MoeTopKRouter Qwen3NextTopKRouter Qwen3OmniMoeTalkerTextTopKRouter Qwen3OmniMoeThinkerTextTopKRouter "
    "Qwen4ExpTextTopKRouter",
    chosen_softmax: "AriaTextTopKRouter GptOssTopKRouter GraniteMoeHybridTopKRouter GraniteMoeSWATopKRouter "
    "GraniteMoeSharedTopKRouter GraniteMoeTopKRouter",
    ernie: "Ernie4_5_MoeTopKRouter Ernie4_5_VLMoeMoeTopKRouter",
    gemma4: "DiffusionGemmaTextRouter Gemma4TextRouter",
    privacy_filter: "OpenAIPrivacyFilterTopKRouter",
    cohere2: "Cohere2MoeTopKRouter",
    deepseek_v2: "DeepseekOcr2TextTopkRouter DeepseekV2TopkRouter UnlimitedOcrTextTopkRouter",
    mistral4: "Mistral4TopkRouter",
    mistral_large4: "MistralLarge4TextTopkRouter",
    deepseek_v3: "AXK1TopkRouter BailingHybridTopkRouter DeepseekV32TopkRouter DeepseekV3TopkRouter Dots1TopkRouter "
    "Dots3NoteTextTopkRouter ExaoneMoeTopkRouter Glm4MoeLiteTopkRouter Glm4MoeTopkRouter Glm4vMoeTextTopkRouter "
    "Glm5NextTextTopkRouter GlmMoeDsaTopkRouter HYV4TopkRouter KimiLinearTopkRouter MiMoV2FlashTopkRouter "
    "NemotronHTopkRouter SolarOpenTopkRouter",
    axk2: "AXK2TopkRouter",
    beam: "BeamTopKRouter",
    afmoe: "AfmoeTokenChoiceRouter",
    hy_v3: "Dots3NoteVisionTopKRouter HYV3TopKRouter",
    lfm2: "Lfm2MoeTopKRouter",
    minimax_m2: "MiniMaxM2TopKRouter",
    minimax_m3: "LagunaTopKRouter MiniMaxM3VLTopKRouter",
    flint: "FlintTopKRouter",
    llama4: "Llama4Router",
    muse_spark: "MuseSparkTopkRouter",
    kolibri1: "Kolibri1TopKRouter",
    inkling2: "DeepseekV4TopKRouter Inkling2TopKRouter",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
REFUSED = {  # what the specification lacks
    "DeepseekV4HashRouter": "experts are looked up by token id (tid2eid), not chosen from the logits",
    "InklingTopkRouter": "weights are divided by a sum that holds the shared experts too",
    "PhimoeTopKRouter": "sparsemixer: a softmax for each choice, over what lies near its largest logit",
    "ZayaRouter": "there is a logit more than experts, which chooses none",
}
