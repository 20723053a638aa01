"""Bugs to plant in the text of the Triton kernels that keep fp16 from overflowing (E7)."""

# file, what stands there, what a mutant has instead, and a case of moe_ref.conformance.judgement.ranges, or a problem
RANGE_MUTANTS = {
    "nothing is scaled": (
        "narrow",
        "tl.where(largest > LARGEST, power, 1.0)",
        "tl.where(largest < 0, power, 1.0)",
        "activations",
    ),
    "scaled too little": ("narrow", "(14 << 23)", "(18 << 23)", "activations"),
    "small columns are not scaled": (
        "narrow",
        "tl.where(largest > 0, (bits",
        "tl.where(largest > LARGEST, (bits",
        "small weights",
    ),
    "scaled twice": ("narrow", "(0x7F000000 - power", "(0x7E800000 - power", "activations"),
    "rows by their first columns": (
        "narrow",
        "for first in range(0, N, BLOCK_N):\n        columns = first + tl.arange(0, BLOCK_N)\n"
        "        mask = (rows < end)[:, None] & (columns < N)[None, :]\n        largest",
        "for first in range(0, BLOCK_N, BLOCK_N):\n        columns = first + tl.arange(0, BLOCK_N)\n"
        "        mask = (rows < end)[:, None] & (columns < N)[None, :]\n        largest",
        "activations",
    ),
    "rows by their first row": (
        "narrow",
        "power_of(tl.max(largest, axis=1))",
        "power_of(tl.max(largest, axis=1) * (tl.arange(0, BLOCK_M) == 0))",
        "activations",
    ),
    "columns by their first rows": (
        "narrow",
        "for row in range(start, end, BLOCK_M):\n        rows = row + tl.arange(0, BLOCK_M)\n        block, _",
        "for row in range(start, start + 1, BLOCK_M):\n        rows = row + tl.arange(0, BLOCK_M)\n        block, _",
        "activations",
    ),
    "the last row of a group is not narrowed": (
        "narrow",
        "end = tl.load(group_offsets + num_experts)",
        "end = tl.load(group_offsets + num_experts) - 1",
        "activations",
    ),
    "columns without the input's weight": ("narrow", "    if WEIGHTED:", "    if WEIGHTED and N < 0:", "scaled inputs"),
    "columns with the row's weight": ("narrow", "topk_weights + slots", "topk_weights + rows", "scaled inputs"),
    "the powers of columns of the first expert": (
        "narrow",
        "tl.store(powers + offset(expert, N) + columns",
        "tl.store(powers + columns",
        "activations",
    ),
    "h stays divided": (
        "products",
        "o *= tl.load(h_powers + sources)[:, None]",
        "o *= 1.0",
        "activations",
    ),
    "h with the power of a tile's first row": (
        "products",
        "tl.load(h_powers + sources)",
        "tl.load(h_powers + row + 0 * rows)",
        "outputs of one token",
    ),
    "h with the power of its slot": (
        "products",
        "o *= tl.load(h_powers + sources)[:, None]",
        "o *= tl.load(h_powers + tl.load(order + sources))[:, None]",
        "outputs of one token",
    ),
    "an adapter's part stays divided": (
        "products",
        "        total *= power\n",
        "        total *= 1.0\n",
        "between factors",
    ),
    "what an adapter is added to is not divided": (
        "products",
        "        total *= inverse_of(power)\n",
        "",
        "between factors",
    ),
    "an adapter with the power of another row": (
        "products",
        "tl.load(powers + sources)",
        "tl.load(powers + tl.min(sources, 0) + 0 * sources)",
        "past the range",
    ),
    "rows of the first factor stay divided": (
        "adapters",
        "total *= tl.load(powers + within)[:, None]",
        "total *= 1.0",
        "past the range",
    ),
    "dW's columns of a stay divided": (
        "outer",
        "total *= tl.load(a_powers + offset(expert, M) + ms, mask=ms < M, other=1.0)[:, None]",
        "total *= 1.0",
        "gradients of preactivations",
    ),
    "dW's columns of b stay divided": (
        "outer",
        "total *= tl.load(b_powers + offset(expert, N) + ns, mask=ns < N, other=1.0)[None, :]",
        "total *= 1.0",
        "activations",
    ),
    "dW with the first expert's powers of a": ("outer", "a_powers + offset(expert, M)", "a_powers", "past the range"),
    "dW with the first expert's powers of b": (
        "outer",
        "b_powers + offset(expert, N)",
        "b_powers",
        "activations of one token",
    ),
}
