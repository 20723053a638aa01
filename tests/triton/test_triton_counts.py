"""Instructions of the loop over k for each tensor-core instruction: counted from the machine code, so no GPU is needed.

With few rows the tensor cores wait for the other instructions, and most of those are on integers. The figures are in
docs/performance-log.md; each limit here has a small margin over them.
"""

import json
import os
import subprocess
import sys

import pytest

# layer, position of the configuration, and of up and down by how their matrix is stored: at most so many instructions
# for each mma. "even": K is a multiple of BLOCK_K.
FEW, MANY = 0, 2
LIMITS = {
    ("GPT_OSS", FEW): {"rows": 6.8, "rows, even": 6.3, "columns": 10.7},
    ("MXFP4", FEW): {"rows, even": 29.5, "columns, even": 30.5},
    ("QWEN3", FEW): {"rows, even": 6.3, "columns, even": 6.6},
    ("QWEN3", MANY): {"rows, even": 2.6, "columns, even": 2.6},
    ("GPT_OSS", MANY): {"rows, even": 2.4, "columns, even": 2.6},
    ("NESTED", FEW): {"rows, even": 35, "columns, even": 32.7},
}
QUICK = (("GPT_OSS", FEW), ("MXFP4", FEW))  # of the others every night

COUNT = """
import json, sys
from executors._triton import configs
from executors._triton.device import Device
from executors._triton.inspect import case_layers, cases
from executors._triton.inspect.compile import compiling
from executors._triton.inspect.resources import resources_of

layer, own = getattr(case_layers, sys.argv[1]), configs.FAMILIES["sm80"]
tiles = own.packed.narrow if layer.packed else own.narrow
with compiling("sm80") as launches:
    list(cases._of_products(layer, tiles, "bfloat16", Device("sm80", 128), True))[int(sys.argv[2])].run()
products = {l.compiled.hash: l for l in launches if l.kernel in ("up_kernel", "down_kernel")}
found = []
for launch, own in zip(products.values(), resources_of([l.compiled for l in products.values()])):
    form, even = launch.constants["FORMAT"], launch.constants["EVEN_K"]
    by_rows = not launch.constants["AHEAD"] if form is None else form.by_rows
    kind = ("rows" if by_rows else "columns") + (", even" if even else "")
    found.append([kind, own.inner_instructions / own.tensor_core, own.spilled])
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("layer", "place"), [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.nightly]) for c in LIMITS]
)
def test_instructions_for_each_mma(layer: str, place: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COUNT, layer, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    limits, most = LIMITS[layer, place], {}
    for kind, each, spilled in json.loads(done.stdout):
        assert spilled == 0, kind
        most[kind] = max(each, most.get(kind, 0.0))
    assert most.keys() == limits.keys()
    assert {kind: each for kind, each in most.items() if each > limits[kind]} == {}, limits
