"""bitsandbytes: on a CPU, rows that end within a block get the scales of other blocks (Q1, Q2).

With AVX-512, a last dimension that is a multiple of 16 but not of the blocksize. No error. Exit 0: reproduced, 1: gone.
"""

import sys

import bitsandbytes
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit

torch.manual_seed(0)
experts = torch.nn.Module()
experts.down_proj = torch.nn.Parameter(torch.randn(4, 32, 96))  # I = 96, and blocks of 64
plain = experts.down_proj.data.clone()
replace_parameter_4bit(experts, "down_proj", quant_type="nf4", blocksize=64)
state = experts.parametrizations.down_proj[0].quant_state
packed = experts.parametrizations.down_proj.original.flatten().long()
codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()  # the high nibble first
right = (state.code.double()[codes].view(-1, 64) * state.absmax.double()[:, None]).view_as(plain)
found = experts.down_proj
processor = torch.backends.cpu.get_cpu_capability()
print(
    f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}, {processor}: shape (4, 32, 96), blocks of 64"
)
print(f"observed error of the weights, of what was quantised: {((found - plain).norm() / plain.norm()).item():.3f}")
print(f"observed numbers that are wrong: {(found.double() - right).abs().gt(1e-6).sum().item()} of {plain.numel()}")
print(f"right, by a table and the same bytes: {((right - plain).norm() / plain.norm()).item():.3f}")
sys.exit(0 if (found.double() - right).abs().max() > 0.01 else 1)
