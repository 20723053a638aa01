"""transformers: eager experts that get no token give an output without a graph, and backward raises (E3, D2).

A rank of expert parallelism whose experts nobody chose is such a case; its parameters get no gradient, not zeros.
Exit 0: reproduced, 1: gone.
"""

import sys

import torch
import transformers
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

E, H = 4, 16
config = Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=H)
torch.manual_seed(0)
experts = Qwen3MoeExperts(config)
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter)
experts._is_expert_parallel = True
found = {}
for case, ids in (("all slots foreign", torch.full((3, 2), E)), ("no tokens", torch.zeros(0, 2, dtype=torch.long))):
    for config._experts_implementation in ("eager", "grouped_mm", "batched_mm"):
        x = torch.randn(len(ids), H, requires_grad=True)
        experts.zero_grad()
        try:
            experts(x, ids, torch.zeros(ids.shape)).sum().backward()
            said = f"down_proj.grad is {experts.down_proj.grad.abs().max().item()}"
        except RuntimeError as error:
            said = str(error)
        found[f"{case}, {config._experts_implementation}"] = said
print(f"transformers {transformers.__version__}, torch {torch.__version__}: {E} experts, fp32")
for case, said in found.items():
    print(f"observed {case}: {said}")
print("right: zeros in all six")
sys.exit(0 if "does not require grad" in found["all slots foreign, eager"] else 1)
