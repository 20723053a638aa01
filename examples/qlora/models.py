"""The model that is fine-tuned: the bundled one, a random one of any size, or a folder of transformers' files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM

from tiny import checkpoint
from tiny.model import Shape

BUNDLED = "bundled"
RANDOM = "random"


_small = Shape()
DEFAULT = replace(_small, layers=4, hidden=512, intermediate=512, heads=8, key_value_heads=2, head_dim=64)
TWENTY_B = replace(  # gpt-oss-20b's
    DEFAULT, layers=24, hidden=2880, intermediate=2880, heads=64, key_value_heads=8, vocabulary=201088
)


@dataclass(frozen=True)
class Text:
    """How a model reads and writes.

    Attributes:
        encode: tokens [n] of a text.
        decode: the text of tokens [n].
        unit: what a token is called.
    """

    encode: Callable[[bytes], Tensor]
    decode: Callable[[Tensor], str]
    unit: str


def bundled_model(dtype: torch.dtype = torch.bfloat16) -> GptOssForCausalLM:
    """The trained model of data/README.md: three layers, 6.2 million parameters, a byte a token."""
    model = _made(Shape(), dtype)
    model.load_state_dict(
        {name if name.startswith("lm_head") else f"model.{name}": v for name, v in checkpoint.state_dict().items()}
    )
    return model


def random_model(
    shape: Shape,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    each: Callable[[nn.Module], object] = lambda layer: None,
) -> GptOssForCausalLM:
    """A model whose parameters are drawn, layer by layer.

    Args:
        shape: its sizes.
        seed: of the draw.
        dtype: of the parameters.
        each: gets each layer as soon as it is drawn, and may make it smaller before the next one is there.
    """
    with init_empty_weights(include_buffers=False):
        model = _made(shape, dtype)
    torch.manual_seed(seed)
    for part in (*model.model.layers, model.model.embed_tokens, model.model.norm, model.lm_head):
        part.to_empty(device="cpu")
        for module in part.modules():
            model._init_weights(module)  # type: ignore[no-untyped-call]
        if part in model.model.layers:
            each(part)
    return model


def bytes_as_tokens() -> Text:
    """A byte is a token."""
    return Text(
        lambda text: torch.frombuffer(bytearray(text), dtype=torch.uint8).long(),
        lambda tokens: bytes(tokens.tolist()).decode(errors="replace"),
        "byte",
    )


def tokens_of(folder: Path) -> Text:
    """The tokenizer of a folder.

    Raises:
        OSError, ValueError: it has none.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Text(
        lambda text: torch.tensor(tokenizer.encode(text.decode(errors="replace"))),
        lambda tokens: str(tokenizer.decode(tokens)),
        "token",
    )


def _made(shape: Shape, dtype: torch.dtype) -> GptOssForCausalLM:
    assert shape.layer.top_k is not None  # the router is in the model
    config = GptOssConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.layer.top_k or 1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        sliding_window=shape.window,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: GptOssForCausalLM = GptOssForCausalLM._from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
        return model
    finally:
        torch.set_default_dtype(before)
