"""From slots back to tokens (clause C1)."""

import triton
import triton.language as tl


@triton.jit
def combine_kernel(
    slots,  # [T, K, H]; empty slots hold anything
    topk_ids,  # [T, K]
    topk_weights,  # [T, K], read where WEIGHTED
    out,  # [T, H]
    num_tokens,
    num_experts,
    hidden,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Sums each token's slots in fp32, in increasing k, times their weights where WEIGHTED, and rounds once."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (tokens < num_tokens)[:, None] & (columns < hidden)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for k in range(TOP_K):
        slot = tokens * TOP_K + k
        ids = tl.load(topk_ids + slot, mask=tokens < num_tokens, other=-1)
        full = (ids >= 0) & (ids < num_experts)
        offsets = slot[:, None] * hidden + columns[None, :]
        values = tl.load(slots + offsets, mask=mask & full[:, None], other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(topk_weights + slot, mask=full, other=0.0).to(tl.float32)[:, None]
        total += values
    tl.store(out + tokens[:, None] * hidden + columns[None, :], total.to(out.dtype.element_ty), mask=mask)
