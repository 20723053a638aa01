"""What each vector was when it was last changed on purpose; ``python tests/support/vector_digests.py`` writes that.

A case has a hash of all that has one right value to the last bit (inputs, ids, grouping, bytes, decoded numbers, and
where floats are NaN or infinite), and one number in which every float of the answers counts.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from moe_ref.conformance.vectors.cases import Case, every_case
from moe_ref.conformance.vectors.contents import Contents
from moe_ref.conformance.vectors.layout import to_bytes

FILE = Path(__file__).parents[1] / "conformance" / "vector_digests.json"


def digest(case: Case) -> tuple[str, float]:
    """The hash of what is exact, and the number of what is not."""
    floats = case.content.floats()
    exact = hashlib.sha256(to_bytes(case.content.inputs() | case.content.exact()))
    for name, value in floats.items():
        exact.update(name.encode())
        for test in (np.isnan, np.isposinf, np.isneginf):
            exact.update(test(value.array).tobytes())
    return exact.hexdigest()[:16], number_of(floats)


def number_of(floats: Contents) -> float:
    """A sum of all floats, each weighed otherwise, and relative to its array: an error of 1e-10 in one shows."""
    total = 0.0
    for value in floats.values():
        finite = np.where(np.isfinite(value.array), value.array, 0.0).ravel()
        size = np.abs(finite).max(initial=0.0) or 1.0
        total += float((np.cos(np.arange(1, finite.size + 1)) * finite / size).sum())
    return total


def digests() -> dict[str, tuple[str, float]]:
    """Of every case."""
    return {name: digest(case) for name, case in every_case().items()}


def kept() -> dict[str, tuple[str, float]]:
    """What the file says."""
    return {name: (exact, number) for name, (exact, number) in json.loads(FILE.read_text()).items()}


if __name__ == "__main__":
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in digests().items())
    FILE.write_text("{\n" + lines + "\n}\n")
