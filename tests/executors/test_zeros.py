"""Memory for gradients."""

import pytest
import torch

from executors._pipeline.zeros import zeros_like


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 5, 7), (3, 0, 7), (1, 1, 1)])
def test_zeros_are_stored_as_empty_like_is(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The order of memory of any stack; aligned, and nobody else's."""
    stack = torch.ones(shape, dtype=torch.bfloat16)
    room = torch.ones(shape[0], shape[1] + 2, shape[2] + 3)
    spread = torch.ones(1, *shape[1:]).expand(shape)
    for like in (stack, stack.transpose(1, 2), stack.permute(2, 0, 1), room[:, 1:-1, 1:-2], spread):
        wanted = torch.empty_like(like, dtype=dtype)
        made = zeros_like(like, dtype)
        assert made.dtype == dtype
        assert made.shape == wanted.shape
        assert made.stride() == wanted.stride()
        assert not made.any()
        if made.numel():
            assert made.data_ptr() % 64 == 0
            made.fill_(1)
            assert not zeros_like(like, dtype).any()


def test_a_gradient_of_zeros_may_be_used_as_any_other() -> None:
    """Written in place, saved, moved to shared memory, and kept while everything else is gone."""
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    parameter.grad = zeros_like(parameter, torch.float32)
    parameter.grad.add_(1)
    torch.optim.SGD([parameter], lr=0.5).step()
    assert (parameter == 0.5).all()
    shared = parameter.grad.share_memory_()
    assert (shared == 1).all()
