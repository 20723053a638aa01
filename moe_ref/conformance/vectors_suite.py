"""Judges executors on a folder of vectors (docs/vectors.md), as another language would be judged on it.

Write the folder once, or unpack a release's, and run this on an installed package, from anywhere::

    python -m moe_ref.conformance vectors DIR
    pytest --pyargs moe_ref.conformance.vectors_suite --vectors DIR --executor mine

The plugin makes a test of each case and each executor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from moe_ref.conformance.vectors.judging import check_vector

if TYPE_CHECKING:
    from moe_ref.conformance.reporting.judge import Judge
    from moe_ref.conformance.vectors.reading import Folder

__all__ = ["test_vector"]


def test_vector(judge: Judge, vectors: Folder, vector: str) -> None:
    """The executor's answers to one case of the folder, in the error bars that it holds."""
    lacking = judge(check_vector, vectors, vector)
    if lacking:
        pytest.skip(lacking)
