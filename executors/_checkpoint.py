"""What an activation checkpoint must keep of a layer (clause D5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.checkpoint import CheckpointPolicy

CHOICES = ("moe_ref.choose.default", "moe_ref.triton_route.default")  # operators that choose experts


def checkpoint_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy for torch's selective activation checkpoints: keep the chosen experts, recompute everything else.

    Under it, a replay never chooses again: a token cannot flip to another expert between forward and backward, even if
    the replayed logits differ in their last bits. The ids are T*K integers.

        from functools import partial
        from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

        contexts = partial(create_selective_checkpoint_contexts, executors.checkpoint_policy)
        y = checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    Args:
        ctx: given by torch.
        op: the operator that runs.
        *args: its arguments.
        **kwargs: its arguments.

    Returns:
        MUST_SAVE for the choice of experts, PREFER_RECOMPUTE otherwise. For a policy of your own, return MUST_SAVE
        where ``str(op)`` is "moe_ref.choose.default" or "moe_ref.triton_route.default".
    """
    from torch.utils.checkpoint import CheckpointPolicy

    chosen = str(op) in CHOICES
    return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE
