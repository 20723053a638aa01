"""kt-kernel: the BF16 experts crash, rather than refuse, without tokens and with sizes that they cannot do (E3).

Each case runs in a child process. Exit 0: reproduced, 1: gone.
"""

import subprocess
import sys
from importlib.metadata import version

CODE = """
import sys, torch
from kt_kernel import kt_kernel_ext
name, E, K, H, I, T = sys.argv[1], 4, 2, *map(int, sys.argv[2:])
gate, up, down = (torch.randn(E, *shape).div(8).bfloat16() for shape in ((I, H), (I, H), (H, I)))
pool = kt_kernel_ext.WorkerPoolConfig()
pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [1]
cpu = kt_kernel_ext.CPUInfer(pool)
on_gpu, order = torch.zeros(E, dtype=torch.bool), torch.arange(E)
config = kt_kernel_ext.moe.MOEConfig(E, K, H, I, on_gpu.data_ptr())
config.pool, config.max_len = cpu.backend_, 16
for part, stack in (("gate", gate), ("up", up), ("down", down)):
    setattr(config, f"{part}_projs", [[expert.data_ptr() for expert in stack]])
    setattr(config, f"{part}_scales", [[0] * E])
moe = getattr(kt_kernel_ext.moe, name)(config)
cpu.submit(moe.load_weights_task(order.data_ptr()))
cpu.sync()
x, ids, weights = torch.randn(T, H).bfloat16(), torch.zeros(T, K).long(), torch.ones(T, K)
tokens = torch.tensor([T]).int()
for _ in range(20):
    y = torch.zeros_like(x)
    cpu.submit(moe.forward_task(tokens.data_ptr(), K, *(t.data_ptr() for t in (ids, weights, x, y)), False))
    cpu.sync()
"""

CASES = {
    "T=4, H=64, I=64": ("AMXBF16_MOE", 64, 64, 4),  # one that works
    "T=0": ("AMXBF16_MOE", 64, 64, 0),
    "H=72": ("AMXBF16_MOE", 72, 64, 4),
    "I=72": ("AMXBF16_MOE", 64, 72, 4),
    "AVX2, H=72": ("AVX2BF16_MOE", 72, 64, 4),
}
ended = {}
for case, arguments in CASES.items():
    ran = subprocess.run([sys.executable, "-c", CODE, *map(str, arguments)], capture_output=True, text=True)
    ended[case] = ran.returncode
    if case == next(iter(CASES)) and ran.returncode != 0:
        sys.exit(f"what should work does not: {(ran.stderr.splitlines() or ['it says nothing'])[-1]}")
print(f"kt-kernel {version('kt_kernel')}, torch {version('torch')}: 4 experts, top 2, T tokens, BF16")
print(f"observed exit codes (-11 is a segmentation fault, -6 an abort): {ended}")
print("right: 0 in the first two; an exception that names the size, or 0, in the others")
sys.exit(0 if min(ended.values()) < 0 else 1)
