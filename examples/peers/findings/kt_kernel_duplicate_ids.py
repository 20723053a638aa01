"""kt-kernel: the BF16 experts give another answer for one token than for two, if an id stands twice in its row (R7).

Exit 0: reproduced, 1: gone.
"""

import sys
from importlib.metadata import version

import torch
from kt_kernel import kt_kernel_ext

E, K, H, I = 4, 2, 64, 64
torch.manual_seed(0)
gate, up, down = (torch.randn(E, *shape).div(8).bfloat16() for shape in ((I, H), (I, H), (H, I)))
pool = kt_kernel_ext.WorkerPoolConfig()
pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [1]
cpu = kt_kernel_ext.CPUInfer(pool)
on_gpu, order = torch.zeros(E, dtype=torch.bool), torch.arange(E)
config = kt_kernel_ext.moe.MOEConfig(E, K, H, I, on_gpu.data_ptr())
config.pool, config.max_len = cpu.backend_, 16
for name, stack in (("gate", gate), ("up", up), ("down", down)):
    setattr(config, f"{name}_projs", [[expert.data_ptr() for expert in stack]])
    setattr(config, f"{name}_scales", [[0] * E])
moe = kt_kernel_ext.moe.AMXBF16_MOE(config)
cpu.submit(moe.load_weights_task(order.data_ptr()))
cpu.sync()


def experts(x, ids, weights):
    y, tokens = torch.zeros_like(x), torch.tensor([len(x)], dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (ids, weights, x, y))
    cpu.submit(moe.forward_task(tokens.data_ptr(), K, *pointers, False))
    cpu.sync()
    return y.double()


x = torch.randn(1, H).bfloat16().expand(2, H).contiguous()  # one token, twice
weights = torch.tensor([[0.75, 0.5]] * 2)
errors = {}
for ids in ([0, 1], [2, 2]):
    right = torch.zeros(H, dtype=torch.float64)
    for e, weight in zip(ids, weights[0].double()):
        z = gate[e].double() @ x[0].double()
        right += weight * (down[e].double() @ (z * torch.sigmoid(z) * (up[e].double() @ x[0].double())))
    for T in (1, 2):
        y = experts(x[:T].contiguous(), torch.tensor([ids] * T), weights[:T].contiguous())
        errors[f"ids {ids}, T={T}"] = round(((y[0] - right).norm() / right.norm()).item(), 4)
own = f"kt-kernel {version('kt_kernel')} ({kt_kernel_ext.__cpu_variant__})"
print(f"{own}, torch {torch.__version__}: one token (T=1), or the same one twice (T=2), in bf16")
print(f"observed relative errors: {errors}")
print("right: about 0.004 in all four, as bf16 rounds")
sys.exit(0 if errors["ids [2, 2], T=1"] > 0.1 > errors["ids [2, 2], T=2"] else 1)
