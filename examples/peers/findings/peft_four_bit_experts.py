"""PEFT: adapters on two 4-bit parameters of one module change what a second call computes (E6, Q2).

``target_parameters`` on what bitsandbytes quantised: the first call leaves out one adapter, and later calls keep what
an earlier one registered. On dense parameters all is well. Exit 0: reproduced, 1: gone.
"""

import sys
import warnings

import bitsandbytes
import peft
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = torch.nn.Parameter(torch.randn(2, 64, 64))
        self.down_proj = torch.nn.Parameter(torch.randn(2, 64, 64))

    def forward(self, x):  # every expert on every row
        return sum(torch.relu(x @ up.T) @ down.T for up, down in zip(self.up_proj, self.down_proj))


def errors_of_three_calls(four_bits):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(), torch.randn(3, 64)
    model.experts = Experts()
    for name in ("up_proj", "down_proj") if four_bits else ():
        replace_parameter_4bit(model.experts, name)
    merged = {name: getattr(model.experts, name).double() for name in ("up_proj", "down_proj")}
    config = peft.LoraConfig(r=2, target_parameters=[f"experts.{name}" for name in merged], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    for name, a in model.named_parameters():  # A [E r, in], the expert slowest; B [out, r E], the expert fastest
        if "lora_A" in name:
            b = model.get_parameter(name.replace("lora_A", "lora_B")).double().view(64, 2, 2)
            target = model.get_submodule(name.split(".lora_A")[0]).parameter_name
            merged[target] = merged[target] + config.lora_alpha / 2 * torch.einsum(
                "ore,eri->eoi", b, a.double().view(2, 2, 64)
            )
    right = sum(torch.relu(x.double() @ up.T) @ down.T for up, down in zip(merged["up_proj"], merged["down_proj"]))
    with torch.no_grad():
        return [round(((model(x).double() - right).norm() / right.norm()).item(), 4) for _ in range(3)]


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    dense, found = errors_of_three_calls(False), errors_of_three_calls(True)
print(f"peft {peft.__version__}, bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}: 2 experts, r=2")
print(f"observed error of three calls that change nothing, in nf4: {found}")
print(f"observed warnings: {sorted({str(each.message).splitlines()[0][:120] for each in caught})}")
print(f"right, against W + scaling B A in float64: 0.0, three times; dense parameters: {dense}")
sys.exit(0 if max(found) > 0.01 > max(dense) else 1)
