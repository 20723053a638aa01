"""Inputs of calls that are captured in CUDA graphs."""

import torch

from moe_ref.conformance.judgement.call import Inputs


def copy_over(target: Inputs, source: Inputs) -> None:
    """Writes the numbers of ``source`` where those of ``target`` are."""
    with torch.no_grad():
        for name, leaf in target.tensors().items():
            leaf.copy_(source.tensors()[name])
        for name, codes in target.codes().items():
            codes.copy_(source.codes()[name])
        target.dy.copy_(source.dy)
