"""bitsandbytes: packed bytes of shape (1, n) come back transposed, although the state says what shape they have (Q6).

Exit 0: reproduced, 1: gone.
"""

import sys

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

code = get_4bit_type("nf4", device="cpu")
state = QuantState(torch.ones(1), (2, 4), code, 64, "nf4", torch.float32)
packed = torch.tensor([[0x01, 0x23, 0x45, 0x67]], dtype=torch.uint8)  # stored as a row
found = dequantize_4bit(packed, state)
right = code[:8].view(2, 4)
print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}: codes 0 to 7 of shape (2, 4), bytes (1, 4)")
print(f"observed shape {tuple(found.shape)}: {found.tolist()}")
print(f"right    shape {tuple(right.shape)}: {right.tolist()}")
sys.exit(0 if found.shape != right.shape else 1)
