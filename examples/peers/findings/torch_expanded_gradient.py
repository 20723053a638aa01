"""torch: grouped_mm cannot be differentiated by y.sum(), whose gradient is expanded (E4).

Exit 0: reproduced, 1: gone.
"""

import sys

import torch
from torch.nn.functional import grouped_mm

x = torch.randn(4, 16, requires_grad=True)
stack = torch.randn(2, 16, 16, requires_grad=True)
y = grouped_mm(x, stack, offs=torch.tensor([1, 4], dtype=torch.int32))
right = torch.cat([stack[0].sum(1).expand(1, -1), stack[1].sum(1).expand(3, -1)]).detach().double()
found = "dx"
try:
    y.sum().backward()
except RuntimeError as error:
    found = f"RuntimeError: {str(error).splitlines()[0]}"
y = grouped_mm(x, stack, offs=torch.tensor([1, 4], dtype=torch.int32))
y.backward(torch.ones_like(y))
print(f"torch {torch.__version__}: y.sum().backward() of 4 rows in 2 groups, fp32")
print(f"observed: {found}")
print(f"right: dx, as a contiguous gradient of ones gives it, within {(x.grad - right).abs().max().item():.0e}")
sys.exit(0 if found != "dx" else 1)
