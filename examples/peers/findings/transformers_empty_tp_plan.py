"""transformers: expert parallelism alone, ``tp_plan={}`` in a DistributedConfig, is refused when a model is loaded.

The documentation says that an empty ``tp_plan`` applies no tensor-parallel rule, and a warning advises it in place of
``enable_expert_parallel=True``; loading refuses both. Two processes with gloo; loading so needs accelerate.
Exit 0: reproduced, 1: gone.
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

CODE = """
import os, sys, warnings
import torch, transformers
from transformers import Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig
folder, rank = sys.argv[1], int(os.environ["RANK"])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
transformers.utils.logging.disable_progress_bar()
tokens = torch.arange(8)[None]
right = Qwen3MoeForCausalLM.from_pretrained(folder)(tokens).logits
for options in ({"ep_size": 2}, {"ep_size": 2, "tp_plan": {}}, {"enable_expert_parallel": True}):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        try:
            config = DistributedConfig(tp_size=2, **options)
            model = Qwen3MoeForCausalLM.from_pretrained(folder, distributed_config=config)
            said = f"logits differ by {(model(tokens).logits - right).abs().max().item():.0e} from those of one process"
        except ValueError as error:
            said = f"ValueError: {error}"
    said = "".join(f"FutureWarning: {own.message} Then " for own in caught if "ep_size" in str(own.message)) + said
    if rank == 0:
        print("tp_size=2, " + ", ".join(f"{name}={value}" for name, value in options.items()) + f": {said}", flush=True)
"""

sizes = {"hidden_size": 16, "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
config = Qwen3MoeConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **sizes)
torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, folder],
            env={"GLOO_SOCKET_IFNAME": "lo"}
            | os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    lines = [line for own in ranks for line in own.communicate()[0].splitlines() if line.startswith("tp_size=2")]
whole, alone, flag = lines
if "logits differ" not in whole:
    sys.exit(f"what should work does not: {whole}")
versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "accelerate", "torch"))
print(f"{versions}: a tiny Qwen3MoeForCausalLM, two processes")
for line in lines:
    print(f"observed DistributedConfig of {line}")
print("right: all three load, and the logits are those of one process; the last two shard the experts alone")
sys.exit(0 if "ValueError" in alone and "ValueError" in flag else 1)
