"""What nf4.fuse refuses, what it keeps, and that its result is a tensor like any other."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from executors import nf4
from moe_ref import nf4 as specification
from nf4_cases import decoded, joined, random, same, small


def parts(**form: Any) -> list[Any]:
    return [nf4.quantize_tensor(random(3, 32, 64, seed=seed), **form) for seed in (0, 1)]


def test_q5_bytes_and_scales_are_joined_expert_by_expert() -> None:
    gate, up = parts(dtype="bfloat16")
    fused = nf4.fuse(gate, up)
    of_gate, of_up, of_both = (tensor.packed.view(3, -1) for tensor in (gate, up, fused))
    assert torch.equal(of_both, torch.cat([of_gate, of_up], dim=1))
    assert torch.equal(fused.absmax.view(3, -1), torch.cat([gate.absmax.view(3, -1), up.absmax.view(3, -1)], dim=1))
    assert (fused.shape, fused.dtype, fused.blocksize) == ((3, 64, 64), "bfloat16", 64)


def test_q3_nested_parts_keep_the_numbers_of_their_own_offsets() -> None:
    """Each part has an offset and nested blocks of its own; absmax is decoded once, and nothing else changes."""
    gate, up = parts(nested=True)
    assert gate.nested_offset != up.nested_offset
    fused = nf4.fuse(gate, up)
    same(fused, nf4.fuse(nf4.unnest(gate), nf4.unnest(up)))
    halves = specification.decode(fused).split(32, dim=1)
    assert [half.contiguous().numpy().tobytes() for half in halves] == [decoded(gate), decoded(up)]


def test_segments_and_plain_statistics_may_meet() -> None:
    """Experts that were quantised one by one beside a stack that was quantised whole."""
    gate, up = joined(nested=True), small(3, 40, 96, seed=9)
    assert gate.segments == 3
    fused = nf4.fuse(gate, up)
    halves = specification.decode(fused).split(40, dim=1)
    assert [half.contiguous().numpy().tobytes() for half in halves] == [decoded(gate), decoded(up)]


def test_a_fused_tensor_can_be_saved_and_loaded() -> None:
    fused = nf4.fuse(*parts(nested=True))
    same(nf4.from_state_dict(nf4.to_state_dict(fused, "w"), "w"), fused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "up.dtype=bfloat16: must be float32, that of gate"),
        ({"quant_type": "fp4"}, "up.quant_type=fp4: must be nf4, that of gate"),
        ({"transposed": True}, "up.transposed=True: must be False, that of gate"),
        ({"shape": (3, 64, 32)}, r"up.shape=\(3, 64, 32\): must be \(3, 32, 64\), that of gate"),
    ],
)
def test_parts_that_differ_are_refused(change: dict[str, Any], message: str) -> None:
    gate, up = parts()
    with pytest.raises(ValueError, match=f"^{message}$"):
        nf4.fuse(gate, replace(up, **change))


def test_what_is_no_pair_of_stacks_is_refused() -> None:
    gate, up = parts()
    with pytest.raises(TypeError, match=r"^up=tensor\(.*: must be a moe_ref.NF4Tensor$"):
        nf4.fuse(gate, random(3, 32, 64))
    with pytest.raises(TypeError, match=r"^gate.packed is a numpy.ndarray: must be a torch.Tensor$"):
        nf4.fuse(gate.map(np.asarray), up)
    for shape in ((32, 64), (0, 32, 64)):
        with pytest.raises(
            ValueError, match=rf"^gate.shape={re.escape(str(shape))}: must be \(E, I, H\), each at least 1$"
        ):
            nf4.fuse(*(nf4.quantize_tensor(random(*shape)) for _ in range(2)))
    with pytest.raises(ValueError, match=r"^layout='mixed': must be one of 'concatenated', 'interleaved'$"):
        nf4.fuse(gate, up, "mixed")  # type: ignore[arg-type]


def test_q5_blocks_with_numbers_of_both_are_refused() -> None:
    message = (
        r"^layout='concatenated' of \(3, 20, 33\), not transposed: gate and up alternate every 660 numbers in storage: "
        r"must be a multiple of 32, or else blocks would have numbers of both$"
    )
    with pytest.raises(ValueError, match=message):
        nf4.fuse(small(), small(seed=1))
