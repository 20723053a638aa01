"""bitsandbytes: on a CPU, dequantize_4bit ignores the strides of packed bytes and reads others (E4, Q1).

Exit 0: reproduced, 1: gone.
"""

import sys

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

code = get_4bit_type("nf4", device="cpu")
state = QuantState(torch.ones(1), (2, 2), code, 64, "nf4", torch.float32)
packed = torch.tensor([0x7F, 0x11, 0x0F, 0x22], dtype=torch.uint8)[::2]  # a view: 7F, 0F
found = dequantize_4bit(packed.view(-1, 1), state).flatten().tolist()
right = [code[nibble].item() for nibble in (0x7, 0xF, 0x0, 0xF)]
print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}: bytes 7F 0F in every second place, nf4")
print(f"observed: {found}")
print(f"right: {right}")
sys.exit(0 if found != right else 1)
