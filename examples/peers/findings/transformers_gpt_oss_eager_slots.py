"""transformers: gpt-oss' eager experts refuse the slots of other ranks that the other implementations take (R7).

Other classes make room for id = num_experts in their one-hot mask; this one does not. Exit 0: reproduced, 1: gone.
"""

import sys

import torch
import transformers
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

E, H = 4, 16
x, ids, weights = torch.randn(2, H), torch.tensor([[0, E], [1, 2]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
found = {}
for name, kind, config in (
    ("gpt-oss", GptOssExperts, GptOssConfig(num_local_experts=E, hidden_size=H, intermediate_size=H)),
    ("qwen3", Qwen3MoeExperts, Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=H)),
):
    experts = kind(config)
    experts._is_expert_parallel = True
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    for config._experts_implementation in ("eager", "grouped_mm", "batched_mm"):
        try:
            found[f"{name} {config._experts_implementation}"] = bool(experts(x, ids, weights).isfinite().all())
        except RuntimeError as error:
            found[f"{name} {config._experts_implementation}"] = str(error)
print(f"transformers {transformers.__version__}, torch {torch.__version__}: ids {ids.tolist()} of {E} experts")
print(f"observed (finite, or the error): {found}")
print("right: all finite; id = num_experts is how transformers marks the slots of other ranks")
sys.exit(0 if found["gpt-oss eager"] is not True and found["qwen3 eager"] is True else 1)
