"""transformers: eager gpt-oss and Nemotron-H refuse the slots of other ranks that other implementations take (R7).

Other classes make room for id = num_experts in their one-hot mask, and skip it. Exit 0: reproduced, 1: gone.
"""

import sys

import torch
import transformers
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

E, H = 4, 16
x, ids, weights = torch.randn(2, H), torch.tensor([[0, E], [1, 2]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
found = {}
for name, kind, config in (
    ("gpt-oss", GptOssExperts, GptOssConfig(num_local_experts=E, hidden_size=H, intermediate_size=H)),
    ("nemotron-h", NemotronHExperts, NemotronHConfig(n_routed_experts=E, hidden_size=H, moe_intermediate_size=H)),
    ("qwen3", Qwen3MoeExperts, Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=H)),
):
    experts = kind(config)
    experts._is_expert_parallel = True  # as transformers' own tensor parallelism sets it
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    for config._experts_implementation in ("eager", "grouped_mm", "batched_mm"):
        try:
            said = "finite" if experts(x, ids, weights).isfinite().all() else "NaN"
        except (IndexError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}"
        found[f"{name} {config._experts_implementation}"] = said
print(f"transformers {transformers.__version__}, torch {torch.__version__}: ids {ids.tolist()} of {E} experts")
for case, said in found.items():
    print(f"observed {case}: {said}")
print("right: finite in all nine; id = num_experts is how transformers marks the slots of other ranks")
sys.exit(0 if "Error" in found["gpt-oss eager"] + found["nemotron-h eager"] and found["qwen3 eager"] == "finite" else 1)
