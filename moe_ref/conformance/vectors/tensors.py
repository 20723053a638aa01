"""The same arrays in safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save

from moe_ref.conformance.vectors.layout import Stored


def to_safetensors(arrays: Mapping[str, Stored], case: Mapping[str, Any]) -> bytes:
    """A safetensors file with one entry of metadata, "case", in JSON: several would have no fixed order."""
    text = json.dumps(case, sort_keys=True)
    return save({name: value.tensor() for name, value in arrays.items()}, {"case": text})
