"""transformers: the gradient of Gemma 4's per-expert scale stops growing at 256 in bf16 (E2, R9).

The scale of each slot is ``per_expert_scale[top_k_index]``, whose backward adds up tokens in bf16.
Exit 0: reproduced, 1: gone.
"""

import sys

import torch
import transformers
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

T, E, H = 8192, 4, 32
torch.manual_seed(0)
router = Gemma4TextRouter(Gemma4TextConfig(hidden_size=H, num_experts=E, top_k_experts=2)).to(torch.bfloat16)
_, weights, ids = router(torch.randn(T, H).bfloat16())
weights.sum().backward()
right = [weights[ids == e].double().sum().item() for e in range(E)]  # the scales are 1, and the upstream gradient too
found = router.per_expert_scale.grad.tolist()
print(f"transformers {transformers.__version__}, torch {torch.__version__}: {T} tokens, {E} experts, top 2, bf16")
print(f"observed per_expert_scale.grad: {found}")
print(f"right: {[round(value, 1) for value in right]}")
sys.exit(0 if max(found) < 0.5 * min(right) else 1)
