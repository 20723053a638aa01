"""transformers: under grouped_mm and batched_mm, gpt-oss' bias gradients in bf16 stop growing at 256 (E2).

The bias of each row is ``bias[expert_ids]``, whose backward adds up rows in bf16. Exit 0: reproduced, 1: gone.
"""

import sys

import torch
import transformers
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

T, H = 4096, 32
config = GptOssConfig(num_local_experts=2, hidden_size=H, intermediate_size=H, num_experts_per_tok=1)
torch.manual_seed(0)
experts = GptOssExperts(config).to(torch.bfloat16)
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
x, ids = torch.randn(T, H).bfloat16(), torch.zeros(T, 1, dtype=torch.long)
right = float(T)  # dy is 1 and every weight is 1: each of T rows of expert 0 adds 1 to each number of its bias
found = {}
for config._experts_implementation in ("eager", "grouped_mm", "batched_mm"):
    experts.zero_grad()
    experts(x, ids, torch.ones(T, 1).bfloat16()).sum().backward()
    found[config._experts_implementation] = experts.down_proj_bias.grad[0, 0].item()
print(f"transformers {transformers.__version__}, torch {torch.__version__}: {T} rows of one expert, bf16")
print(f"observed down_proj_bias.grad[0, 0]: {found}")
print(f"right: {right}")
sys.exit(0 if max(found["grouped_mm"], found["batched_mm"]) < 0.9 * right else 1)
