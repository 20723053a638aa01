"""How long a failure is made simpler. Hypothesis itself stops after minutes, for each test that fails."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

KNOWN = 10  # judgements to simplify a failure that an earlier test told


@dataclass
class Search:
    """Which problems a test still judges once one has failed.

    Beyond the limit, only those that failed are judged again, so that Hypothesis ends with the simplest of them. The
    limit counts judgements and not seconds: the same examples come out on every run.

    Attributes:
        limit: judgements after the first failure of a test.
        known: what failures break, and why, that were made simpler before.
    """

    limit: int = 2000
    known: set[str] = field(default_factory=set)
    _failed: set[str] = field(default_factory=set)
    _causes: set[str] = field(default_factory=set)
    _left: int = 0

    def start(self) -> None:
        """Begins with another test."""
        if len(self._failed) > 1:  # where there was something to choose from
            self.known |= self._causes
        self._failed, self._causes, self._left = set(), set(), self.limit

    def wants(self, call: str) -> bool:
        """Whether this call is to be judged."""
        if not self._failed or call in self._failed:
            return True
        self._left -= 1
        return self._left >= 0

    def failed(self, call: str, causes: set[str]) -> None:
        """Notes that a call failed, and of what."""
        new = not causes <= self.known | self._causes
        if not self._failed:
            self._left = self.limit if new else min(self.limit, KNOWN)
        elif new:  # another failure of the same test
            self._left = max(self._left, self.limit // 4)
        self._failed.add(call)
        self._causes |= causes


def cause(says: str, tensor: str = "") -> str:
    """What kind of thing is wrong, without numbers and names: failures of one cause read alike.

    Args:
        says: a failure's message.
        tensor: that it is about, or "".
    """
    if " +- " in says or "but must be exactly" in says or ": rms z=" in says:
        return "wrong values"
    if re.search(r"=-?(nan|inf),|but must be -?(nan|inf)", says):
        return "NaN or infinity"
    if raised := re.search(r"\braises (\w+)", says):
        return raised[0]
    plain = re.sub(r"[\[({].*?[\])}]|=\S+", " ", says.partition("; only where")[0])
    words = [word for word in re.findall(r"\b[A-Za-z_][\w']*", plain) if word != tensor]
    return " ".join(words[:12])
