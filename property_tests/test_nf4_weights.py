"""Quantising in torch against the specification, and every way from one form of 4-bit weights to another."""

from dataclasses import replace

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from executors import nf4
from executors.nf4 import quantization
from moe_ref import NF4Tensor
from moe_ref import nf4 as specification

DTYPES = ("float32", "bfloat16", "float16")
BLOCKSIZES = (32, 64, 128, 4096)


@st.composite
def dense(draw: st.DrawFn) -> Tensor:
    """Numbers of any strides: some of them zero, tiny, or on a midpoint of the codes once they are scaled."""
    shape = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3), label="shape")
    dtype = getattr(torch, draw(st.sampled_from(DTYPES), label="dtype"))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99), label="seed"))
    step = draw(st.sampled_from([1, 2]), label="step")
    values = torch.randn([*shape[:-1], shape[-1] * step], generator=generator)
    kind = draw(st.sampled_from(["any", "ties", "rows of zeros", "tiny", "large"]), label="kind")
    if kind == "ties":
        quant_type = draw(st.sampled_from(["nf4", "fp4"]), label="ties of")
        table = torch.tensor(specification.CODES[quant_type]).sort().values
        places = torch.cat([(table[1:] + table[:-1]) / 2, torch.tensor([1.0, -1.0])])
        values = places[torch.randint(len(places), values.shape, generator=generator)]
    elif kind == "rows of zeros":
        values[::2] = 0
    elif kind != "any":
        values = values * (1e-39 if kind == "tiny" else 1e4)
    values = values.to(dtype)[..., ::step]
    axes = draw(st.permutations(range(values.ndim)), label="axes")
    return values.permute(*axes)


def same_bits(found: NF4Tensor, expected: NF4Tensor) -> None:
    assert found.arrays().keys() == expected.arrays().keys()
    for name, value in found.arrays().items():
        other = expected.arrays()[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        assert value.numpy().tobytes() == other.numpy().tobytes(), name


@given(
    values=dense(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from(BLOCKSIZES),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    piece=st.sampled_from([4096, 2**20]),
)
@example(torch.zeros(3), "fp4", 32, True, "float32", 4096)
@example(torch.full((33,), 1e-45), "nf4", 32, True, "float32", 4096)
def test_bits_are_the_specifications(
    values: Tensor, quant_type: str, blocksize: int, nested: bool, dtype: str, piece: int
) -> None:
    """Q4, in storage order, in pieces of any size."""
    form = {"quant_type": quant_type, "blocksize": blocksize, "nested": nested, "dtype": dtype}
    before, quantization.PIECES["cpu"] = quantization.PIECES["cpu"], piece
    try:
        found = nf4.quantize_tensor(values, **form)
    finally:
        quantization.PIECES["cpu"] = before
    transposed = values.ndim > 1 and not values.is_contiguous() and values.mT.is_contiguous()
    stored = values.mT if transposed else values
    expected = specification.quantize(stored.contiguous(), **form)
    assert found.shape == tuple(values.shape)
    assert found.transposed == transposed
    assert found.stored_shape == expected.shape
    same_bits(found, expected)


@given(
    experts=st.integers(1, 4),
    blocks=st.integers(1, 600),
    nested=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_form_decodes_to_the_same_bits(
    experts: int, blocks: int, nested: bool, quant_type: str, transposed: bool, seed: int
) -> None:
    """Q3, Q5: experts written one by one, joined, unnested, and written as one stack."""
    generator = torch.Generator().manual_seed(seed)
    form = {"quant_type": quant_type, "blocksize": 32, "nested": nested}
    singles = [nf4.quantize_tensor(torch.randn(blocks, 32, generator=generator), **form) for _ in range(experts)]
    decoded = torch.stack([specification.decode(single) for single in singles])
    expected = decoded.mT if transposed else decoded
    state = {k: v for e, single in enumerate(singles) for k, v in nf4.to_state_dict(single, f"w.{e}.weight").items()}
    stack = nf4.from_state_dict(state, "w.{}.weight", transposed=transposed)
    assert specification.decode(stack).equal(expected)
    plain = nf4.unnest(stack)
    assert specification.decode(plain).equal(expected)
    again = nf4.from_state_dict(nf4.to_state_dict(stack, "w"), "w", transposed=transposed)
    one_segment = experts == 1 or not nested
    same_bits(
        replace(again, nested_offset=stack.nested_offset) if one_segment else again, stack if one_segment else plain
    )
    assert specification.decode(again).equal(expected)
