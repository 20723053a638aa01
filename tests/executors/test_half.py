"""Products of fp16 that may pass its range (E7): what is scaled, and what is not."""

import torch

from executors._pipeline.half import multiply

SMALLEST = 2.0**-24  # fp16's smallest subnormal number


def product(row: list[float]) -> torch.Tensor:
    """The row times the unit matrix: what is left of each number in fp16."""
    eye = torch.eye(len(row), dtype=torch.float16)
    out = torch.empty(1, len(row))
    multiply(torch.tensor([row]), eye, out)
    return out[0]


def test_a_row_within_the_range_is_not_scaled() -> None:
    for largest in (1.0, 2.0**15, 40_000.0, 65_504.0):
        assert product([largest, SMALLEST]).tolist() == [torch.tensor(largest).half().item(), SMALLEST]


def test_a_row_past_the_range_fits_and_loses_only_what_is_far_smaller() -> None:
    for largest in (65_536.0, 2.0**100):
        found = product([largest, largest * 2.0**-28, SMALLEST])
        assert found.tolist() == [largest, largest * 2.0**-28, 0.0]


def test_what_is_not_finite_stays() -> None:
    assert product([torch.inf, 1.0])[0] == torch.inf
    assert product([torch.nan, 1.0])[0].isnan()
