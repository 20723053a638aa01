"""liger-kernel: a gradient penalty through LigerExperts silently lacks the experts' second derivative (D1).

A linear layer, then the experts; the penalty is the squared gradient of the output's sum in the input. In Triton's
interpreter. Exit 0: reproduced, 1: gone, also where it has become an error.
"""

import os
import sys
from importlib.metadata import version

os.environ |= {"TRITON_INTERPRET": "1", "LIGER_FUSED_MOE_AUTOTUNE": "0"}

import torch
from liger_kernel.transformers.swiglu import LigerExperts
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

E, H = 4, 16
config = Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=H)
config._experts_implementation = "eager"
torch.manual_seed(0)
right, found = Qwen3MoeExperts(config), LigerExperts(config)
for parameter in right.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
found.load_state_dict(right.state_dict())
x, before = torch.randn(8, H), torch.nn.Linear(H, H)
ids, weights = torch.rand(8, E).argsort(1)[:, :2], torch.rand(8, 2)


def gradients(experts):
    """Of the sum and of the penalty, in the linear layer's weight."""
    rows = x.clone().requires_grad_()
    total = experts(before(rows), ids, weights).sum()
    (first,) = torch.autograd.grad(total, before.weight, retain_graph=True)
    (slope,) = torch.autograd.grad(total, rows, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), before.weight)
    return first, second


(first, second), exact = gradients(found), gradients(right)
errors = [((a - b).norm() / b.norm()).item() for a, b in zip((first, second), exact, strict=True)]
names = ("liger_kernel", "triton", "transformers", "torch")
print(f"{', '.join(f'{name} {version(name)}' for name in names)}: a linear layer, then 4 experts, 8 tokens, top 2")
print(
    f"observed error of the penalty's gradient: {errors[1]:.2g}, without a warning; of the first one: {errors[0]:.2g}"
)
print("right: 1e-06 for both, as transformers' eager experts; or an error, as torch's once_differentiable gives")
sys.exit(0 if errors[0] < 1e-4 < 0.01 < errors[1] else 1)
