"""Real text that every machine has: the source of Python's own library, which the bundled model has never read."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import json
import textwrap
import typing

import torch
from torch import Tensor

MODULES = (argparse, dataclasses, functools, json, textwrap, typing, ast)


def source() -> bytes:
    """The modules' text, one after the other. It belongs to the version of Python."""
    return "".join(inspect.getsource(module) for module in MODULES).encode()


def windows_of(tokens: Tensor, steps: int, per_step: int, context: int) -> Tensor:
    """[steps, per_step, context + 1] tokens, in order; each window begins where the last one ends.

    Raises:
        ValueError: the text is shorter than that.
    """
    needed = steps * per_step * context + 1
    if needed > len(tokens):
        raise ValueError(f"{needed} tokens in {steps} steps: must be at most {len(tokens)}, those of the text")
    return tokens[:needed].unfold(0, context + 1, context).view(steps, per_step, context + 1)


def held_out(tokens: Tensor, per_step: int, context: int) -> Tensor:
    """[per_step, context + 1] tokens from the end of the text."""
    return torch.stack([tokens[len(tokens) - (n + 1) * context - 1 :][: context + 1] for n in range(per_step)])
