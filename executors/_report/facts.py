"""What the figures were measured on, with what, and when."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import entry_points

from executors._bench.report import commit
from executors._compare.report import machine, version_of
from executors._registry import GROUP

GIB = 2**30


def facts(arguments: Sequence[str], executors: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Pairs of what and its value.

    Args:
        arguments: of the command line.
        executors: who is judged; the packages that they come from are told, and what these ask for.
    """
    found, own = machine(), version_of("moe-ref")
    at = commit()
    versions = {name: found[name] for name in ("torch", "triton", "numpy")}
    versions |= {name: version_of(name) for name in ("bitsandbytes", "numba", "hypothesis", "pytest")}
    versions |= {name: version_of(name) for name in _behind(executors) if name != "moe-ref"}
    return [
        ("processor", f"{found['processor']}, {found['cores']} cores, {found['threads']} threads"),
        *([("GPU", str(found["gpu"]))] if found["gpu"] else []),
        ("memory", f"{memory() / GIB:.0f} GiB" if memory() else "unknown"),
        ("system", found["platform"]),
        ("moe-ref", f"{own or 'not installed'}{f', commit {at}' if at else ''}"),
        ("Python", found["python"]),
        ("packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("date", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
        ("command", shlex.join(["python", "-m", "executors", *arguments])),
    ]


def _behind(executors: Sequence[str]) -> list[str]:
    """Distributions that executors come from, and all that these ask for in any of their extras."""
    found = [point.dist for point in entry_points(group=GROUP) if point.name in executors and point.dist]
    asked = (re.match(r"[\w.-]+", each) for distribution in found for each in distribution.requires or ())
    return list(dict.fromkeys([*(each.name for each in found), *(name[0] for name in asked if name)]))


def memory() -> int:
    """Bytes of this machine's memory; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
