"""liger-kernel: LigerExperts writes outside its buffers for ids that the class it replaces takes (R7).

They mark the slots of other ranks. ``apply_liger_kernel_to_qwen3_moe`` puts it in the place of Qwen3MoeExperts. Run in
a child process, in Triton's interpreter, because memory is lost. Exit 0: reproduced, 1: gone.
"""

import os
import subprocess
import sys
from importlib.metadata import version

CODE = """
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from liger_kernel.transformers.swiglu import LigerExperts
E, H = 4, 16
config = Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=H)
config._experts_implementation = "eager"
torch.manual_seed(0)
right, found = Qwen3MoeExperts(config), LigerExperts(config)
for parameter in right.parameters():
    torch.nn.init.normal_(parameter)
found.load_state_dict(right.state_dict())
x, ids, weights = torch.randn(64, H), torch.randint(E, (64, 2)), torch.rand(64, 2)
print("local ids: differ by", (right(x, ids, weights) - found(x, ids, weights)).abs().max().item(), flush=True)
ids[:, 1], weights[:, 1] = E, 0.0
for _ in range(5):
    print("id 4 of 4: differ by", (right(x, ids, weights) - found(x, ids, weights)).abs().max().item(), flush=True)
"""

environment = os.environ | {"TRITON_INTERPRET": "1", "LIGER_FUSED_MOE_AUTOTUNE": "0"}
ran = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
lines = [line for line in ran.stdout.splitlines() if "differ by" in line]
if not lines:
    sys.exit(f"local ids: {(ran.stderr.strip().splitlines() or [f'ended with {ran.returncode}'])[-1]}")
errors = [float(line.split()[-1]) for line in lines]
versions = ", ".join(f"{name} {version(name)}" for name in ("liger-kernel", "triton", "transformers", "torch"))
print(f"{versions}: LigerExperts beside Qwen3MoeExperts, 4 experts, fp32, five calls with ids of 4")
print(f"observed: {'; '.join(lines)}; exit code {ran.returncode} {' '.join(ran.stderr.strip().splitlines()[-1:])}")
print("right: all differ by less than 1e-04, and exit code 0 (-11 is a segmentation fault, -6 an abort)")
local = errors[0] < 1e-3
sys.exit(0 if local and (ran.returncode < 0 or any(not error < 1e-3 for error in errors[1:])) else 1)
