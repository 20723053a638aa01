"""The model that is fine-tuned: the bundled one, a random one of any size, or a folder of transformers' files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from tiny import checkpoint
from tiny.model import Shape

BUNDLED = "bundled"
RANDOM = "random"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Sizes:
    """Of a random model of the gpt-oss architecture; those of gpt-oss-20b are in `TWENTY_B`."""

    layers: int = 4
    hidden: int = 512
    intermediate: int = 512
    experts: int = 32
    top_k: int = 4
    heads: int = 8
    key_value_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 256


TWENTY_B = Sizes(24, 2880, 2880, 32, 4, 64, 8, 64, 201088)


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
    shape = Shape()
    sizes = Sizes(
        shape.layers,
        shape.hidden,
        shape.intermediate,
        shape.experts,
        shape.layer.top_k or 0,
        shape.heads,
        shape.key_value_heads,
        shape.head_dim,
        shape.vocabulary,
    )
    model = _made(sizes, dtype)
    model.load_state_dict(
        {name if name.startswith("lm_head") else f"model.{name}": v for name, v in checkpoint.state_dict().items()}
    )
    return model


def random_model(sizes: Sizes, seed: int, dtype: torch.dtype = torch.bfloat16) -> GptOssForCausalLM:
    """A model whose parameters are drawn."""
    torch.manual_seed(seed)
    return _made(sizes, dtype)


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


def in_words(sizes: Sizes) -> str:
    """The sizes, as "layers=4 hidden=512 ..."."""
    return " ".join(f"{name}={value}" for name, value in asdict(sizes).items())


def _made(sizes: Sizes, dtype: torch.dtype) -> GptOssForCausalLM:
    config = GptOssConfig(
        num_hidden_layers=sizes.layers,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_value_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocabulary,
        rope_parameters=ROPE,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: GptOssForCausalLM = GptOssForCausalLM._from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
        return model
    finally:
        torch.set_default_dtype(before)
