"""torchtitan: on a CPU, the router of a bf16 model computes its scores in bf16, not in fp32 as it says (R1).

``torch.autocast("cpu", dtype=torch.float32)`` is no autocast: torch warns and switches it off.
Exit 0: reproduced, 1: gone.
"""

import sys
import warnings
from importlib.metadata import version

import torch
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import TokenChoiceTopKRouter

T, E, K, H = 2000, 64, 4, 32
torch.manual_seed(0)
gate = Linear.Config(in_features=H, out_features=E, bias=False)
router = TokenChoiceTopKRouter(TokenChoiceTopKRouter.Config(num_experts=E, gate=gate, top_k=K)).bfloat16()
torch.nn.init.normal_(router.gate.weight, std=0.2)
x = torch.randn(1, T, H).bfloat16()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    _, ids, scores = router(x)
logits = x.double() @ router.gate.weight.double().T
differ = {}
for name, keys in (("router", None), ("fp32", torch.sigmoid(logits.float())), ("float64", torch.sigmoid(logits))):
    chosen = ids if keys is None else keys.topk(K).indices
    differ[name] = (chosen.sort(-1).values != logits.topk(K).indices.sort(-1).values).any(-1).sum().item()
print(f"torchtitan {version('torchtitan')}, torch {torch.__version__}: {T} tokens, {E} experts, top {K}, bf16")
print(f"observed dtype of scores: {scores.dtype}; tokens with other experts: {differ}")
print(f"observed warnings: {[str(each.message).splitlines()[0] for each in caught]}")
print("right: torch.float32, and 0 tokens")
sys.exit(0 if scores.dtype == torch.bfloat16 and differ["router"] > 0 else 1)
