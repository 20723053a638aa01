"""transformers: under batched_mm, gradients of expert weights in bf16 add up rows in bf16, and lose them (E2).

The weights of each row are ``gate_up_proj[expert_ids]``, whose backward adds up rows in bf16.
Exit 0: reproduced, 1: gone.
"""

import sys

import torch
import transformers
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

T, H = 4096, 32
config = Qwen3MoeConfig(num_experts=2, hidden_size=H, moe_intermediate_size=H, num_experts_per_tok=1)
torch.manual_seed(0)
experts = Qwen3MoeExperts(config).to(torch.bfloat16)
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
x, ids = torch.rand(T, H).bfloat16(), torch.zeros(T, 1, dtype=torch.long)
gate, up = (x.double() @ experts.gate_up_proj[0].double().T).chunk(2, dim=1)
right = (gate * torch.sigmoid(gate) * up).sum(0).expand(H, H).detach()  # dW[i, j] = sum of rows of h[j], for dy = 1
found = {}
for config._experts_implementation in ("eager", "grouped_mm", "batched_mm"):
    experts.zero_grad()
    experts(x, ids, torch.ones(T, 1).bfloat16()).sum().backward()
    wrong = experts.down_proj.grad[0].double() - right
    found[config._experts_implementation] = round((wrong.norm() / right.norm()).item(), 4)
print(f"transformers {transformers.__version__}, torch {torch.__version__}: {T} rows of one expert, bf16")
print(f"observed relative error of down_proj.grad: {found}")
print("right: about 0.002, as eager and grouped_mm have it")
sys.exit(0 if found["batched_mm"] > 10 * found["eager"] else 1)
