"""transformers: under batched_mm and expert parallelism in fp16, an expert that no token chose makes NaN (R7).

A slot of another rank (id = num_experts, weight 0) is computed by the last local expert; inf times 0 is NaN.
Exit 0: reproduced, 1: gone.
"""

import sys

import torch
import transformers
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

T, E, H = 4, 3, 16
config = Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=H)
torch.manual_seed(0)
experts = Qwen3MoeExperts(config).half()
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
experts.gate_up_proj.data[-1] = 8.0  # the last expert overflows fp16, and no token chooses it
experts.down_proj.data[-1] = 1000.0
experts._is_expert_parallel = True  # as transformers' own tensor parallelism sets it
x = torch.rand(T, H).half()
ids, weights = torch.tensor([[0, E], [1, E], [0, E], [1, E]]), torch.tensor([[1.0, 0.0]] * T).half()
found = {}
for config._experts_implementation in ("eager", "grouped_mm", "batched_mm"):
    found[config._experts_implementation] = experts(x, ids, weights).isnan().any(1).tolist()
print(f"transformers {transformers.__version__}, torch {torch.__version__}: ids {ids.tolist()} of {E} experts, fp16")
print(f"observed rows with NaN: {found}")
print(f"right: none, since the empty slots add 0: {[False] * T}")
sys.exit(0 if any(found["batched_mm"]) else 1)
