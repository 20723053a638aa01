"""PTX spoiled in one place: a barrier, a wait, a fence, a group of copies or a guard taken out."""

from __future__ import annotations

import re
from collections.abc import Iterator

KINDS = {
    "barrier": r"^\s*bar\.sync\s+0;$",
    "wait": r"^\s*cp\.async\.wait_group\s+\d+;$",
    "commit": r"^\s*cp\.async\.commit_group;$",
    "guard": r"^\s*@!?%p\d+ (?:ld|st)\.global",
    "shared guard": r"^\s*@!?%p\d+ (?:ld|st)\.shared",
    "zeros": r"^\s*(?:@!?%p\d+ )?cp\.async\.c[ag]\.shared\.global \[.*\], 0x\w+, %r\d+;$",
}
# Of sm_90 beyond that.
KINDS |= {
    "landing": r"^\s*mbarrier\.try_wait\.parity",
    "bytes": r"^.*mbarrier\.arrive\.expect_tx.*, \d+;$",
    "issue": r"^.*cp\.async\.bulk\.tensor",
    "proxies fenced": r"^\s*fence\.proxy\.async",
    "products waited for": r"^\s*wgmma\.wait_group",
    "products committed": r"^\s*wgmma\.commit_group",
    "products fenced": r"^\s*wgmma\.fence",
}
REMOVED = set(KINDS) - {"guard", "shared guard", "zeros", "bytes", "landing"}


def places(ptx: str, kind: str) -> list[int]:
    """The lines, from 0, that can be spoiled in that way."""
    return [number for number, line in enumerate(ptx.splitlines()) if re.match(KINDS[kind], line)]


def spoiled(ptx: str, kind: str, place: int) -> str:
    """The text with one line spoiled."""
    lines = ptx.splitlines()
    line = lines[place]
    if kind in REMOVED:
        lines[place] = ""
    elif kind == "landing":  # with the branch of its loop
        lines[place : place + 2] = ["", ""]
    elif kind == "bytes":  # more than come
        lines[place] = re.sub(r", (\d+);$", lambda match: f", {2 * int(match[1])};", line)
    elif kind in ("guard", "shared guard"):
        lines[place] = re.sub(r"@!?%p\d+ ", "", line, count=1)
    else:  # all bytes are copied, where some threads asked for zeros
        lines[place] = re.sub(r", (0x\w+), %r\d+;$", r", \1, \1;", line)
    return "\n".join(lines)


def all_spoiled(ptx: str) -> Iterator[tuple[str, int, str]]:
    """Every text that is spoiled in one place: how, where, and the text."""
    for kind in KINDS:
        for place in places(ptx, kind):
            yield kind, place, spoiled(ptx, kind, place)
