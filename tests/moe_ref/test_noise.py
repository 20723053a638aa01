"""Stateless numbers are uniform, independent, and the same however they are computed."""

import numpy as np
import pytest

from moe_ref.noise import keys_of, uniform_of

NOWHERE, EVERYWHERE = np.zeros(8, dtype=bool), np.ones(8, dtype=bool)
KEYS = keys_of(0, "z", 0, 8)
VALUES = {
    "normal": np.random.default_rng(0).standard_normal((1, 20_000)),
    "whole": np.arange(1.0, 20_001.0)[None],
    "bfloat16": np.round(np.random.default_rng(0).uniform(1, 2, (1, 20_000)) * 128) / 128,
    "equal": np.ones((1, 20_000)),
}


@pytest.mark.parametrize("kind", VALUES)
def test_numbers_are_even_and_independent(kind: str) -> None:
    """Between keys and between neighbours: with positions for any values, without them for different values."""
    for placed in (EVERYWHERE, NOWHERE) if kind in ("normal", "whole") else (EVERYWHERE,):
        noise = uniform_of(VALUES[kind], KEYS, placed)
        counts = np.array([np.histogram(row, 16, (-1, 1))[0] for row in noise]) - 20_000 / 16
        assert np.abs(counts).max() < 6 * np.sqrt(20_000 / 16)
        together = np.corrcoef(np.concatenate([noise, np.roll(noise, 1, axis=1), np.abs(noise)]))
        np.testing.assert_allclose(together, np.eye(24), atol=6 / np.sqrt(20_000))


def test_the_mantissa_alone_counts_but_for_its_end() -> None:
    v = np.array([[1.5, 3.0, -0.75, 1.5 + 2.0**-52, 1.5 - 2.0**-52, 1.0, 1.0 - 2.0**-53, 1.5 + 2.0**-30]])
    noise = uniform_of(v, KEYS, NOWHERE)
    assert (noise[:, :5] == noise[:, :1]).all()
    assert (noise[:, 5] == noise[:, 6]).all()
    assert (noise[:, 7] != noise[:, 0]).all()


@pytest.mark.parametrize("block", [1, 7, 100_000])
def test_blocks_do_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    v = VALUES["normal"][:, :60].reshape(1, 5, 12)
    several = np.broadcast_to(v, (8, 5, 12))
    placed = np.arange(8) % 2 == 1
    expected = uniform_of(v, KEYS, placed, 3.0)
    monkeypatch.setattr("moe_ref.noise.BLOCK", block)
    np.testing.assert_array_equal(uniform_of(v, KEYS, placed, 3.0), expected)
    np.testing.assert_array_equal(uniform_of(several, KEYS, placed, 3.0), expected)


def test_keys_do_not_depend_on_where_a_chunk_begins() -> None:
    np.testing.assert_array_equal(keys_of(3, "z", 5, 3), keys_of(3, "z", 0, 8)[5:])
    assert len(set(KEYS.tolist()) | set(keys_of(1, "z", 0, 8).tolist()) | set(keys_of(0, "h", 0, 8).tolist())) == 24


def test_no_element_is_no_number() -> None:
    assert uniform_of(np.zeros((1, 0, 3)), KEYS, NOWHERE).shape == (8, 0, 3)
