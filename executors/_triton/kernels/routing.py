"""Choosing and weighing experts: one program for a block of tokens (clauses R1 to R6)."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def ordered(keys):
    """Integers that order as the keys do: equal for +0 and -0, and none is the smallest integer."""
    keys = tl.where(keys == 0.0, 0.0, keys)
    if keys.dtype == tl.float64:
        bits = keys.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = keys.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def without_nan(keys):
    """A NaN counts as the smallest key: ids stay in range and distinct (R4)."""
    return tl.where(keys == keys, keys, LOWEST)


@triton.jit
def outside(ranks):
    """Ranks below every key, for positions that do not exist or are taken."""
    if ranks.dtype == tl.int64:
        return tl.full(ranks.shape, -0x8000000000000000, tl.int64)
    else:
        return tl.full(ranks.shape, -0x80000000, tl.int32)


@triton.jit
def sigmoid(value):
    """1 / (1 + exp(-v)) without overflow."""
    small = tl.exp(-tl.abs(value))
    return tl.where(value >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def log1p_of_exp(value):
    """log(1 + exp(v)) for v at most 0, from the series of atanh(e / (2 + e)): all digits, whatever tl.log gives."""
    small = tl.exp(value)
    ratio = small / (2.0 + small)  # at most 1/3
    square = ratio * ratio
    total = tl.zeros_like(ratio)
    for n in tl.static_range(16, -1, -1):
        total = total * square + tl.full(ratio.shape, 1.0, ratio.dtype) / (2 * n + 1)
    return 2.0 * ratio * total


@triton.jit
def sqrtsoftplus(value):
    """sqrt(log(1 + exp(v))): exp(v / 2) far below 0, where exp(v) underflows."""
    near = tl.where(value > 0, value, 0.0) + log1p_of_exp(-tl.abs(value))
    return tl.where(value < -40.0, tl.exp(0.5 * value), tl.sqrt(near))


@triton.jit
def sqrtsoftplus_slope(value, score):
    """The derivative of `sqrtsoftplus`, whose value is the score: 0 at -inf."""
    return tl.where(value < -40.0, 0.5 * score, sigmoid(value) / (2.0 * score))


@triton.jit
def softmax(values):
    """The softmax of each row."""
    exponentials = tl.exp(values - tl.max(values, axis=1)[:, None])
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit
def divisor(total, EPS, MAX):
    """What renormalisation divides by; 1 where that is 0 (R5)."""
    if MAX:
        total = tl.where(total < EPS, EPS, total)
    else:
        total += EPS
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def load_logits(router_logits, strides, tokens, experts, num_tokens, num_experts, SCORING, dtype):
    """Logits, -inf outside of them, and which rows hold a NaN or an infinite score: 1 or 0."""
    mask = (tokens < num_tokens)[:, None] & (experts < num_experts)
    offsets = tokens[:, None] * strides[0] + experts.to(tl.int64) * strides[1]
    logits = tl.load(router_logits + offsets, mask=mask, other=LOWEST).to(dtype)
    broken = logits != logits  # a softmax itself makes NaN of +inf, and of -inf alone
    if SCORING == "sqrtsoftplus":
        broken = broken | (logits == -LOWEST)
    return logits, tl.max(broken.to(tl.int32), axis=1)


@triton.jit
def scores_of(logits, broken, experts, num_experts, SCORING):
    """Scores of all experts, from logits in which 0 replaces rows with NaN; for "topk_softmax", those logits."""
    sound = tl.where(broken[:, None] == 1, 0.0, logits)
    sound = tl.where(experts < num_experts, sound, LOWEST)
    if SCORING == "softmax":
        sound = softmax(sound)
    if SCORING == "sigmoid":
        sound = sigmoid(sound)
    if SCORING == "sqrtsoftplus":
        sound = sqrtsoftplus(sound)
    return sound


@triton.jit
def keys_within_groups(keys, experts, NUM_GROUPS, TOPK_GROUPS, GROUP_SIZE, TOP2, BLOCK_G):
    """The keys, -inf outside the groups with the largest keys; of equal groups the lower one is kept (R2)."""
    groups = tl.arange(0, BLOCK_G)[None, :]
    of_groups = tl.full((keys.shape[0], BLOCK_G), LOWEST, keys.dtype)
    for g in range(NUM_GROUPS):
        of_group = tl.where(experts // GROUP_SIZE == g, keys, LOWEST)
        best, place = tl.max(of_group, axis=1, return_indices=True, return_indices_tie_break_left=True)
        if TOP2:
            best += tl.max(tl.where(experts == place[:, None], LOWEST, of_group), axis=1)
        of_groups = tl.where(groups == g, best[:, None], of_groups)
    ranks = ordered(without_nan(of_groups))
    ranks = tl.where(groups < NUM_GROUPS, ranks, outside(ranks))
    kept = tl.zeros(keys.shape, tl.int32)
    for _ in range(TOPK_GROUPS):
        group = tl.argmax(ranks, axis=1, tie_break_left=True)[:, None]
        ranks = tl.where(groups == group, outside(ranks), ranks)
        kept = tl.where(experts // GROUP_SIZE == group, 1, kept)
    return tl.where(kept == 1, keys, LOWEST)


@triton.jit
def route_kernel(
    router_logits,  # [T, E]
    selection_bias,  # [E], or anything where HAS_BIAS is False
    topk_ids,  # [T, K] out
    topk_weights,  # [T, K] out, in the dtype of scores
    num_tokens,
    num_experts: tl.constexpr,
    strides,
    bias_stride,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    MAX: tl.constexpr,
    EPS: tl.constexpr,
    SCALING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    BY_LOGIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Ids by (key descending, id ascending), and their weights, which are NaN in undefined rows."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)[None, :]
    dtype: tl.constexpr = topk_weights.dtype.element_ty
    logits, broken = load_logits(router_logits, strides, tokens, experts, num_tokens, num_experts, SCORING, dtype)
    scores = scores_of(logits, broken, experts, num_experts, SCORING)

    keys = logits  # every scoring keeps the order of the logits, which is exact in any dtype
    if HAS_BIAS or NUM_GROUPS > 1:
        keys = logits if BY_LOGIT else scores
        if HAS_BIAS:
            bias = tl.load(selection_bias + experts.to(tl.int64) * bias_stride, mask=experts < num_experts, other=0.0)
            keys += bias.to(keys.dtype)
        keys = tl.where(logits > LOWEST, without_nan(keys), LOWEST)
        if NUM_GROUPS > 1:
            keys = keys_within_groups(keys, experts, NUM_GROUPS, TOPK_GROUPS, num_experts // NUM_GROUPS, TOP2, BLOCK_G)
    ranks = ordered(without_nan(keys))
    ranks = tl.where(experts < num_experts, ranks, outside(ranks))

    slots = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), scores.dtype)
    for k in range(TOP_K):
        best = tl.argmax(ranks, axis=1, tie_break_left=True)[:, None]
        score = tl.sum(tl.where(experts == best, scores, 0.0), axis=1)
        ranks = tl.where(experts == best, outside(ranks), ranks)
        ids = tl.where(slots == k, best, ids)
        chosen = tl.where(slots == k, score[:, None], chosen)

    if SCORING == "topk_softmax":
        chosen = softmax(tl.where(slots < TOP_K, chosen, LOWEST))  # all of them -inf: NaN (R4)
    if RENORMALIZE:
        chosen = chosen / divisor(tl.sum(tl.where(slots < TOP_K, chosen, 0.0), axis=1)[:, None], EPS, MAX)
    chosen = tl.where(broken[:, None] == 1, float("nan"), chosen * SCALING)
    out = tokens[:, None] * TOP_K + slots
    wanted = (tokens < num_tokens)[:, None] & (slots < TOP_K)
    tl.store(topk_ids + out, ids, mask=wanted)
    tl.store(topk_weights + out, chosen, mask=wanted)


@triton.jit
def route_backward_kernel(
    gradients,  # [T, K] of topk_weights, in the dtype of scores
    router_logits,  # [T, E]
    topk_ids,  # [T, K]
    out,  # [T, E] out
    num_tokens,
    num_experts: tl.constexpr,
    strides,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    MAX: tl.constexpr,
    EPS: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of the logits, through the weights of the chosen experts (D1); 0 in rows with undefined weights."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)[None, :]
    dtype: tl.constexpr = gradients.dtype.element_ty
    logits, broken = load_logits(router_logits, strides, tokens, experts, num_tokens, num_experts, SCORING, dtype)
    scores = scores_of(logits, broken, experts, num_experts, SCORING)
    slots = tl.arange(0, BLOCK_K)[None, :]
    wanted = (tokens < num_tokens)[:, None] & (slots < TOP_K)
    given = tokens[:, None] * TOP_K + slots
    ids = tl.load(topk_ids + given, mask=wanted, other=0)
    of_weights = tl.load(gradients + given, mask=wanted, other=0.0) * SCALING
    chosen = tl.zeros((BLOCK_T, BLOCK_K), scores.dtype)
    for k in range(TOP_K):
        expert = tl.sum(tl.where(slots == k, ids, 0), axis=1)[:, None]
        score = tl.sum(tl.where(experts == expert, scores, 0.0), axis=1)
        chosen = tl.where(slots == k, score[:, None], chosen)
    if SCORING == "topk_softmax":
        chosen = softmax(tl.where(slots < TOP_K, chosen, LOWEST))
    chosen = tl.where(slots < TOP_K, chosen, 0.0)
    whole = tl.sum(chosen, axis=1)[:, None]
    if RENORMALIZE:  # w = c s / (sum of s + eps); if eps is the larger of the two and stands alone, w = c s / eps
        total = divisor(whole, EPS, MAX)
        of_sum = tl.sum(of_weights * chosen, axis=1)[:, None] / total
        if MAX:
            of_sum = tl.where(whole < EPS, 0.0, of_sum)
        of_weights = (of_weights - of_sum) / total
    mean = tl.sum(of_weights * chosen, axis=1)[:, None]  # of a softmax
    of_slots = of_weights
    if SCORING == "topk_softmax":
        of_slots = chosen * (of_weights - mean)
    if SCORING == "sigmoid":
        of_slots = of_weights * chosen * (1.0 - chosen)
    if SCORING == "sqrtsoftplus":
        own_logits = tl.zeros((BLOCK_T, BLOCK_K), scores.dtype)
        for k in range(TOP_K):
            own = tl.sum(tl.where(slots == k, ids, 0), axis=1)[:, None]
            logit = tl.sum(tl.where(experts == own, logits, 0.0), axis=1)
            own_logits = tl.where(slots == k, logit[:, None], own_logits)
        of_slots = of_weights * sqrtsoftplus_slope(own_logits, chosen)
    of_slots = tl.where(slots < TOP_K, of_slots, 0.0)
    found = tl.zeros((BLOCK_T, BLOCK_E), scores.dtype)
    for k in range(TOP_K):
        expert = tl.sum(tl.where(slots == k, ids, 0), axis=1)[:, None]
        value = tl.sum(tl.where(slots == k, of_slots, 0.0), axis=1)[:, None]
        found = tl.where(experts == expert, value, found)
    if SCORING == "softmax":
        found = scores * (found - mean)
    undefined = (broken[:, None] == 1) | (whole != whole)
    found = tl.where(undefined, 0.0, found)
    mask = (tokens < num_tokens)[:, None] & (experts < num_experts)
    tl.store(out + tokens[:, None] * num_experts + experts, found.to(out.dtype.element_ty), mask=mask)
