"""Declares safe for ``torch.load(weights_only=True)`` what `moe_ref.types` needs, as soon as there is torch."""

from __future__ import annotations

import sys

from executors._after_import import after_import
from moe_ref.types import rebuild


def declare_safe() -> None:
    """Declares it now if torch is imported, or else when it is: this imports no torch."""
    after_import("torch", lambda: sys.modules["torch"].serialization.add_safe_globals([rebuild]))
