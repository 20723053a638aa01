"""4 bits on a GPU: up to how many rows fused decoding pays."""
