"""Decodes 4-bit experts, bit for bit as clauses Q1 to Q3 and M1 say. Nothing here waits for a GPU.

Two paths give the same bits: a table of byte values on any device; and on a CPU bitsandbytes' kernel for its own
formats, which is four times as fast (`executors._decode.bitsandbytes`).
"""

from __future__ import annotations

from math import ceil, prod

import torch
from torch import Tensor

from executors._decode.bitsandbytes import decode_blocks
from executors._decode.table import decode_codes, decode_elements, table_of
from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor

MX_BLOCKSIZE = 32
NAN_EXPONENT = 255
SMALLEST, NAN = 0x00400000, 0x7FC00000  # bits of 2**-127, which is subnormal, and of a NaN


def decode_expert(tensor: PackedTensor, index: int) -> Tensor:
    """[m, k] Decodes one expert of [E, m, k], and of the others only what shares a block with it."""
    if isinstance(tensor, MXFP4Tensor):
        return _decode_mxfp4(tensor.blocks[index], tensor.scales[index], tensor)
    assert isinstance(tensor, NF4Tensor)
    size, blocksize = tensor.size // tensor.shape[0], tensor.blocksize
    start, stop = index * size, (index + 1) * size
    first, last = start // blocksize, ceil(stop / blocksize)
    end = min(last * blocksize, tensor.size)
    codes = tensor.packed[first * blocksize // 2 : ceil(end / 2)]
    numbers = _decode(codes, _absmax_between(tensor, first, last), tensor)[start - first * blocksize :][:size]
    return _laid_out(numbers, tensor)


def decode_experts(tensor: PackedTensor, experts: Tensor) -> Tensor:
    """[n, m, k] Decodes several experts of [E, m, k], whose ids [n] only the device knows."""
    if isinstance(tensor, MXFP4Tensor):
        return _decode_mxfp4(tensor.blocks.index_select(0, experts), tensor.scales.index_select(0, experts), tensor)
    assert isinstance(tensor, NF4Tensor)
    size, blocksize = tensor.size // tensor.shape[0], tensor.blocksize
    numbers = torch.empty(len(experts), size, dtype=getattr(torch, tensor.dtype), device=tensor.device)
    table = table_of(tensor.quant_type, tensor.device)
    if size % blocksize:  # blocks straddle experts
        for out, expert in zip(numbers, experts, strict=True):
            places = torch.arange(size, device=tensor.device) + expert * size
            decode_elements(tensor.packed, absmax_of(tensor, places // blocksize), places, table, out)
    else:
        blocks = torch.arange(size // blocksize, device=tensor.device) + experts[:, None] * (size // blocksize)
        codes = tensor.packed.reshape(-1, size // 2).index_select(0, experts)
        decode_codes(codes.view(-1), absmax_of(tensor, blocks.view(-1)), blocksize, table, numbers.view(-1))
    return _laid_out(numbers, tensor)


def _decode_mxfp4(blocks: Tensor, scales: Tensor, tensor: MXFP4Tensor) -> Tensor:
    """[..., m, k] Decodes blocks [..., k / 32, 16] with their scales, in the tensor's order."""
    size = prod(tensor.shape[1:])
    numbers = torch.empty(*blocks.shape[:-3], size, dtype=getattr(torch, tensor.dtype), device=blocks.device)
    table = table_of(tensor.quant_type, blocks.device)
    decode_codes(blocks.reshape(-1), powers_of(scales.reshape(-1)), MX_BLOCKSIZE, table, numbers.view(-1))
    return _laid_out(numbers, tensor)


def scales_of(tensor: PackedTensor, index: int) -> Tensor:
    """[blocks] fp32: the scales of one expert of [E, m, k] that shares no block with another."""
    if isinstance(tensor, MXFP4Tensor):
        return powers_of(tensor.scales[index].reshape(-1))
    assert isinstance(tensor, NF4Tensor)
    blocks = tensor.size // tensor.shape[0] // tensor.blocksize
    return _absmax_between(tensor, index * blocks, (index + 1) * blocks).contiguous()


def powers_of(scales: Tensor) -> Tensor:
    """2 ** (scales - 127) in fp32, and NaN for 255 (M1)."""
    bits = scales.int() << 23
    return bits.masked_fill_(scales == 0, SMALLEST).masked_fill_(scales == NAN_EXPONENT, NAN).view(torch.float32)


def _absmax_between(tensor: NF4Tensor, first: int, last: int) -> Tensor:
    """[last - first] The scales of neighbouring blocks of one segment, as `absmax_of` gives them."""
    absmax: Tensor = tensor.absmax[first:last]
    if tensor.nested_code is None or tensor.nested_absmax is None or tensor.nested_offset is None:
        return absmax
    per_segment, length = tensor.absmax.shape[0] // tensor.segments, tensor.nested_blocksize
    segment = first // per_segment
    first, last = first - segment * per_segment, last - segment * per_segment
    nested = tensor.nested_absmax.view(tensor.segments, -1)[segment, first // length : ceil(last / length)]
    nested = nested.repeat_interleave(length)[first % length :][: last - first]
    return (tensor.nested_code.index_select(0, absmax.int()) * nested).add_(tensor.nested_offset.view(-1)[segment])


def absmax_of(tensor: NF4Tensor, blocks: Tensor) -> Tensor:
    """[n] The scales of some blocks. Nested ones are a product and then a sum, each rounded to fp32 (Q3)."""
    absmax: Tensor = tensor.absmax.index_select(0, blocks)
    if tensor.nested_code is None or tensor.nested_absmax is None or tensor.nested_offset is None:
        return absmax
    per_segment = tensor.absmax.shape[0] // tensor.segments
    segments = blocks // per_segment
    nested = segments * ceil(per_segment / tensor.nested_blocksize) + blocks % per_segment // tensor.nested_blocksize
    products = tensor.nested_code.index_select(0, absmax.int()) * tensor.nested_absmax.index_select(0, nested)
    return products + tensor.nested_offset.reshape(-1).index_select(0, segments)


def _decode(codes: Tensor, scales: Tensor, tensor: NF4Tensor) -> Tensor:
    """[n] Decodes whole blocks and a last block that may end early."""
    whole = codes.shape[0] * 2 // tensor.blocksize
    bytes_of_whole = whole * tensor.blocksize // 2
    fast = decode_blocks(codes[:bytes_of_whole], scales[:whole], tensor)
    if fast is not None and bytes_of_whole == codes.shape[0]:
        return fast
    if fast is None:
        whole, bytes_of_whole = 0, 0
    rest = torch.empty(2 * (codes.shape[0] - bytes_of_whole), dtype=getattr(torch, tensor.dtype), device=codes.device)
    decode_codes(
        codes[bytes_of_whole:], scales[whole:], tensor.blocksize, table_of(tensor.quant_type, tensor.device), rest
    )
    return rest if fast is None else torch.cat([fast, rest])


def _laid_out(numbers: Tensor, tensor: PackedTensor) -> Tensor:
    """A view of [n] or [experts, n] in the shape of a projection."""
    stored = numbers.view(*numbers.shape[:-1], *tensor.stored_shape[1:])
    return stored.transpose(-1, -2) if tensor.transposed else stored
