"""Stateless pseudo-random numbers: each depends only on a key, a value and, if asked for, a position.

So splitting an array, reordering its parts or using more threads changes no number.
"""

from __future__ import annotations

from functools import lru_cache
from zlib import crc32

import numpy as np

BLOCK = 1 << 14  # numbers mixed at once: they fit in a core's cache
STRIDE = np.uint32(0x9E3779B1)  # odd, so that the positions of one row differ
SPARE = np.uint64(20)  # last bits of a float64's mantissa, which are ignored
HALF = np.uint64(1 << 19)


@lru_cache(maxsize=1024)
def keys_of(seed: int, site: str, first: int, count: int) -> np.ndarray:
    """Keys of a site.

    Args:
        seed: the seed of all sites.
        site: the name of the site.
        first: number of the first sample.
        count: number of samples.

    Returns:
        [count] uint32, read-only. The key of a sample does not depend on where its chunk begins.
    """
    generator = np.random.default_rng([seed, crc32(site.encode())])
    keys = generator.integers(0, 2**32, first + count, dtype=np.uint32)[first:]
    keys.flags.writeable = False
    return keys


def uniform_of(value: np.ndarray, keys: np.ndarray, placed: np.ndarray, size: float = 1.0) -> np.ndarray:
    """Numbers in [-size, size), one for each key and element.

    They depend on the key and on the leading 32 bits of the value's mantissa. So equal values get equal numbers, and v,
    -v and 2v get the same number. The last 20 bits are ignored, so that float64's own rounding makes no difference.

    The mixing is lowbias32 (Wellons, "Prospecting for hash functions", 2018). It has 32 bits because processors mix
    many such numbers at once; AVX2 has no product of 64 bits.

    Args:
        value: [N or 1, ...] float64.
        keys: [N] uint32.
        placed: [N] bool: rows in which numbers also depend on the position, so that equal values get different numbers.
        size: the bound of the numbers.

    Returns:
        [N, ...] float64.
    """
    rows, columns = len(keys), value[0].size
    bits = np.ascontiguousarray(value).view(np.uint64).reshape(len(value), columns)
    strides = STRIDE * placed.astype(np.uint32)
    noise = np.empty((rows, columns))
    high, wide = max(1, BLOCK // max(1, columns)), max(1, min(columns, BLOCK))
    for top in range(0, rows, high):
        some = slice(top, top + high)
        own = bits[some] if len(bits) > 1 else bits
        for left in range(0, columns, wide):
            where = slice(left, left + wide)
            _mix(own[:, where], keys[some, None], strides[some, None], left, noise[some, where])
    noise *= size * 2.0**-31
    return noise.reshape(rows, *value.shape[1:])


def _mix(bits: np.ndarray, keys: np.ndarray, strides: np.ndarray, left: int, out: np.ndarray) -> None:
    """Fills ``out`` with whole numbers in [-2**31, 2**31); ``out`` also holds an intermediate array."""
    leading = out.view(np.uint64)[: len(bits)]
    np.add(bits, HALF, out=leading)
    np.right_shift(leading, SPARE, out=leading)
    mixed = leading.astype(np.uint32) ^ keys
    if strides.any():
        mixed ^= strides * np.arange(left, left + bits.shape[1], dtype=np.uint32)
    shifted = mixed >> 16
    mixed ^= shifted
    mixed *= np.uint32(0x7FEB352D)
    mixed ^= np.right_shift(mixed, 15, out=shifted)
    mixed *= np.uint32(0x846CA68B)
    mixed ^= np.right_shift(mixed, 16, out=shifted)
    out[...] = mixed.view(np.int32)
