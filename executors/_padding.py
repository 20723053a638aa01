"""How a call leaves tokens out (clause R7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def mask_padding(topk_ids: Tensor, mask: Tensor) -> Tensor:
    """The ids with -1, an empty slot, where a token is padding, for ``.experts(topk_ids=...)``.

    Such a token adds exactly 0 to every gradient, and its output is 0, whatever its x, logits and weights are, NaN too.
    Nothing waits for a GPU.

        routing = executor.route(router_logits, weights)
        ids = executors.mask_padding(routing.topk_ids, mask)
        y = executor.experts(x, topk_ids=ids, topk_weights=routing.topk_weights, weights=weights)

    Args:
        topk_ids: [..., K], int32 or int64.
        mask: [...], bool: True for tokens, False for padding, as transformers' attention_mask once it is bool.

    Returns:
        [..., K], new, of the dtype of topk_ids.

    Raises:
        ValueError, TypeError: one line naming the argument, its value, and what is allowed.
    """
    from moe_ref.validation.arrays import ID_DTYPES, check_array, check_devices, check_shape

    check_array("topk_ids", topk_ids, dtypes=ID_DTYPES)
    check_array("mask", mask, like=("topk_ids", topk_ids), dtypes=("bool",))
    check_shape("mask", mask, tuple(topk_ids.shape[:-1]), "the leading dimensions of topk_ids")
    check_devices({"topk_ids": topk_ids, "mask": mask})
    return topk_ids.masked_fill(~mask.unsqueeze(-1), -1)
