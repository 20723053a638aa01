"""A process that runs tests, seen from outside: it answers, ends, or hangs."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from moe_ref.conformance.isolation.worker import JUDGES

WORKER = "moe_ref.conformance.isolation.worker"
STARTING, ENDING = 600.0, 30.0  # seconds that a process may take to collect the tests, and to end
LOOKING = 0.2  # seconds between looks whether it is still there: a child of its own may keep the pipe open
TOLD = 20  # lines of what it printed


class EndedError(Exception):
    """The process ended, or was ended because it hung.

    Args:
        how: the signal's name, such as "SIGSEGV"; "exit" for a status; "hang".
        says: how it ended, in a few words.
        judged: the call that it was about to judge, or "".
        printed: what it printed at the end, or "".
    """

    def __init__(self, how: str, says: str, judged: str, printed: str) -> None:
        super().__init__(says)
        self.how, self.says, self.judged, self.printed = how, says, judged, printed


class StartError(Exception):
    """The process ended before it took a test; the message says how, in one line."""


class TestProcess:
    """A process for tests. It starts with the first that it is asked for, and ends with `close`.

    Args:
        arguments: of pytest.
        limit: seconds after which it hangs: from one thing that it says to the next.
        keeps: whether what it prints is kept, for `EndedError`, and not printed.
    """

    __test__ = False  # of pytest: this is no test

    def __init__(self, arguments: Sequence[str], limit: float, keeps: bool = True) -> None:
        self.arguments, self.limit, self.keeps = arguments, limit, keeps
        self._folder = tempfile.TemporaryDirectory()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def run(self, name: str, following: str) -> list[dict[str, Any]]:
        """Runs a test.

        Args:
            name: of the test.
            following: of the next one, or "".

        Returns:
            Its reports, as pytest hands them from process to process.

        Raises:
            EndedError: the process ended or hung; the next call starts another.
            StartError: it does not start.
        """
        if self._process is None:
            self._start()
        assert self._connection is not None
        with suppress(OSError):  # it has ended since, as the answer will tell
            self._connection.send((name, following))
        return self._answer(self.limit)

    def close(self) -> None:
        """Lets the process end, if there is one."""
        if self._process is not None and self._connection is not None:
            with suppress(OSError):  # it has ended
                self._connection.send(None)
            self._process.join(ENDING)
            self._forget()
        self._folder.cleanup()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads of torch, and JAX would hang
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=pytest.main, args=([*self.arguments, "-p", WORKER], [theirs]))
        self._process.start()
        theirs.close()
        self._connection.send(self._prints())
        try:
            self._answer(STARTING)
        except EndedError as error:
            last = error.printed.splitlines()[-1:]
            raise StartError(": ".join([f"the process of the tests {error.says} before it begins", *last])) from None

    def _prints(self) -> str:
        """The file into which it prints, or ""."""
        return str(Path(self._folder.name) / "printed") if self.keeps else ""

    def _answer(self, limit: float) -> Any:
        """What the process says, but for what it judges on the way."""
        judged = ""
        while True:
            about, said = self._message(limit, judged)
            if about != JUDGES:
                return said
            judged = said

    def _message(self, limit: float, judged: str) -> Any:
        """The next thing that the process says."""
        assert self._connection is not None and self._process is not None  # noqa: PT018
        end = time.monotonic() + limit
        try:
            while not self._connection.poll(LOOKING):
                if self._process.exitcode is not None and not self._connection.poll():
                    raise self._ended(judged)
                if time.monotonic() > end:
                    raise self._hangs(judged, limit)
            return self._connection.recv()
        except (EOFError, OSError):
            raise self._ended(judged) from None

    def _hangs(self, judged: str, limit: float) -> EndedError:
        printed = self._forget()
        return EndedError("hang", f"says nothing for {limit:g} s, and is ended", judged, printed)

    def _ended(self, judged: str) -> EndedError:
        assert self._process is not None
        self._process.join(ENDING)  # the pipe may close a little before
        code = self._process.exitcode
        printed = self._forget()
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return EndedError(name, f"is ended by {name}", judged, printed)
        return EndedError("exit", f"ends with status {code}", judged, printed)

    def _forget(self) -> str:
        """Ends the process whatever it does; returns what it printed at the end."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None
        path = Path(self._prints() or "-")
        return _end_of(path.read_bytes().decode(errors="replace")) if path.is_file() else ""


def _end_of(printed: str) -> str:
    """The beginning of Python's report of a fatal error, if there is one; or else the last lines."""
    _, fatal, rest = printed.rpartition("Fatal Python error")
    lines = (fatal + rest).splitlines()[:TOLD] if fatal else rest.splitlines()[-TOLD:]
    return "\n".join(lines).strip()
