"""A layer's experts as a module of torch, for whoever builds a model without transformers (docs/module.md)."""

from executors.nn.experts import Experts

__all__ = ["Experts"]
