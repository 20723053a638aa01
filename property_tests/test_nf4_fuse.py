"""Gate and up projections in 4 bits, fused into one: the same numbers, bit for bit, or a refusal in one line."""

from dataclasses import replace
from math import gcd, prod

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from executors import nf4
from moe_ref import MoEConfig, MoEWeights, NF4Tensor, routed_experts
from moe_ref.nf4 import decode, dynamic_code
from random_nf4 import BLOCKSIZES, DTYPES, SEEDS, TYPES, numbers

STATISTICS = ("plain", "nested", "per expert")
LAYOUTS = ("concatenated", "interleaved")
SIZES = st.one_of(st.integers(1, 4), st.sampled_from([8, 16, 32, 48, 64, 96, 160]))


def stack(form: dict[str, object], statistics: str, seed: int) -> NF4Tensor:
    """A stack of any bytes and wild scales; one segment for each expert only where no block straddles experts."""
    rng = np.random.default_rng(seed)
    shape, blocksize = form["shape"], form["blocksize"]
    size, experts = prod(shape), shape[0]
    blocks = -(-size // blocksize)
    codes = torch.from_numpy(rng.integers(0, 256, -(-size // 2), dtype=np.uint8))
    if statistics == "plain":
        return NF4Tensor(codes, torch.from_numpy(numbers(rng, blocks, wild=True)), **form)
    segments = experts if statistics == "per expert" and size // experts % blocksize == 0 else 1
    return NF4Tensor(
        codes,
        torch.from_numpy(rng.integers(0, 256, blocks, dtype=np.uint8)),
        torch.from_numpy(numbers(rng, segments * -(-(blocks // segments) // 3), wild=True)),
        torch.tensor(dynamic_code(), dtype=torch.float32),
        torch.from_numpy(numbers(rng, segments, wild=False).reshape((segments,) if segments > 1 else ())),
        nested_blocksize=3,
        **form,
    )


def together(gate: Tensor, up: Tensor, layout: str) -> Tensor:
    if layout == "concatenated":
        return torch.cat([gate, up], dim=1)
    return torch.stack([gate, up], dim=2).flatten(1, 2)


def bits(value: Tensor) -> Tensor:
    return torch.where(value.isnan(), torch.tensor(0x7FC00000, dtype=torch.int32), value.contiguous().view(torch.int32))


@given(
    shape=st.tuples(st.integers(1, 4), SIZES, SIZES),
    blocksize=BLOCKSIZES,
    quant_type=TYPES,
    dtype=DTYPES,
    statistics=st.tuples(st.sampled_from(STATISTICS), st.sampled_from(STATISTICS)),
    transposed=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    seed=SEEDS,
)
@example((3, 3, 32), 64, "nf4", "bfloat16", ("plain", "nested"), False, "concatenated", 0)  # blocks straddle experts
@example((2, 4, 96), 4096, "fp4", "float32", ("nested", "nested"), False, "interleaved", 0)  # blocks straddle rows
@example((3, 32, 64), 64, "nf4", "bfloat16", ("per expert", "per expert"), False, "interleaved", 0)
@example((2, 64, 5), 64, "nf4", "float16", ("nested", "plain"), True, "concatenated", 0)
@example((1, 1, 33), 32, "nf4", "float32", ("plain", "plain"), False, "concatenated", 0)
def test_q5_fused_numbers_are_those_of_the_parts(
    shape: tuple[int, int, int],
    blocksize: int,
    quant_type: str,
    dtype: str,
    statistics: tuple[str, str],
    transposed: bool,
    layout: str,
    seed: int,
) -> None:
    """Exact wherever each run of one part is a multiple of 32 numbers; refused everywhere else."""
    experts, rows, width = shape
    if transposed:
        shape = (experts, width, rows)
    form = {"shape": shape, "blocksize": blocksize, "quant_type": quant_type, "dtype": dtype}
    gate, up = (stack(form, own, seed + place) for place, own in enumerate(statistics))
    gate, up = ((t.transpose(1, 2) if transposed else t) for t in (gate, up))
    run = {(False, LAYOUTS[0]): rows * width, (False, LAYOUTS[1]): width, (True, LAYOUTS[0]): rows}.get(
        (transposed, layout), 1
    )
    if run % 32:
        with pytest.raises(ValueError, match=rf"every {run} numbers in storage: must be a multiple of 32, .*both$"):
            nf4.fuse(gate, up, layout)
        return
    fused = nf4.fuse(gate, up, layout)
    assert fused.shape == (experts, 2 * rows, width)
    assert (fused.blocksize, fused.transposed, fused.nested_absmax) == (gcd(run, blocksize), transposed, None)
    assert torch.equal(bits(decode(fused)), bits(together(decode(gate), decode(up), layout)))
    assert sorted(fused.packed.tolist()) == sorted(gate.packed.tolist() + up.packed.tolist())


@given(layout=st.sampled_from(LAYOUTS), nested=st.booleans(), seed=st.integers(0, 99))
def test_a_fused_layer_computes_what_its_parts_stand_for(layout: str, nested: bool, seed: int) -> None:
    """Quantised apart, as in checkpoints that hold gate and up apart: the layer of the decoded parts."""
    draw = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(3, 32, 32, generator=draw) for _ in range(3))
    parts = [nf4.quantize_tensor(value, nested=nested) for value in (gate, up)]
    config = MoEConfig(2, gate_up_layout=layout)
    x, ids = torch.randn(5, 32, generator=draw), torch.tensor([[0, 1]] * 5)
    dense = MoEWeights(together(*(decode(part) for part in parts), layout), down, config=config)
    fused = replace(dense, gate_up_proj=nf4.fuse(*parts, layout=layout))
    given_ = x, ids, torch.full((5, 2), 0.5)
    assert torch.equal(routed_experts(*given_, dense), routed_experts(*given_, fused))
