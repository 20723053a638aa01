"""The adapter as PEFT's files: written, read back into a new model, and put to work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from executors import hf
from qlora.setup import Setup, base_model, reader

PROMPT = b"def "


def reloaded(folder: Path, setup: Setup, executor: str) -> nn.Module:
    """A new model in 4 bits, with the adapter that PEFT finds in the folder."""
    base: Any = base_model(setup)
    with hf.peft(base):
        model = PeftModel.from_pretrained(base, str(folder))
    hf.use(model, executor)
    return model.eval()


def logits(model: nn.Module, windows: Tensor) -> Tensor:
    """Of the windows' tokens."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=windows[:, :-1], use_cache=False).logits


def written(model: Any, setup: Setup, tokens: int) -> str:
    """What the model goes on to write after "def "."""
    how = reader(setup)
    prompt = how.encode(PROMPT)[None].to(setup.device)
    out = model.eval().generate(input_ids=prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return how.decode(out[0].cpu())
