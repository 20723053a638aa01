"""Processes on this machine that find each other by gloo, and run what they are sent."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MINUTES = 5  # that a step of a collective may take, before gloo gives up
LIMIT_S = 60.0 * (MINUTES + 1)  # that an answer may take: more than a step, so that gloo's own error comes first


class RanksError(RuntimeError):
    """Some ranks raised; the message has each one's error.

    Attributes:
        errors: by rank, the error in words.
    """

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("; ".join(f"rank {rank}: {said.splitlines()[-1]}" for rank, said in errors.items()))
        self.errors = errors


class Cluster:
    """Processes that wait for work. They start with the first call, and end with `close` or a ``with``.

    Args:
        ranks: how many, each with one thread.
        limit_s: seconds that the answer of a rank may take.
    """

    def __init__(self, ranks: int, limit_s: float = LIMIT_S) -> None:
        self.ranks, self.limit_s = ranks, limit_s
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._folder: Any = None

    def start(self) -> None:
        """Starts the processes, unless they run."""
        if self._processes:
            return
        self._folder = tempfile.TemporaryDirectory()
        context, path = mp.get_context("spawn"), Path(self._folder.name) / "store"
        for rank in range(self.ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.ranks, str(path), there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __repr__(self) -> str:
        return f"Cluster({self.ranks})"

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], *arguments: Any, ranks: int | None = None, goes_on: bool = False
    ) -> list[Any]:
        """Calls ``function(group, *arguments)`` on the first ranks at once.

        Args:
            function: of a module that the processes can import.
            *arguments: the same on every rank.
            ranks: how many take part; None is all.
            goes_on: whether the processes are kept if some raise, since no exchange breaks off.

        Returns:
            What each of them returns.

        Raises:
            RanksError: some raised, ended, or did not answer in time.
        """
        self.start()
        pipes = self._pipes[: ranks or self.ranks]
        for pipe in pipes:
            pipe.send((function, len(pipes), arguments))
        found: dict[int, Any] = {}
        end = time.monotonic() + self.limit_s
        while len(found) < len(pipes):
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
            answers = wait(waiting, max(0.0, end - time.monotonic()))
            if not answers:
                self.close()
                said = ("error", f"no answer within {self.limit_s:g} s")
                found |= {rank: said for rank in range(len(pipes)) if rank not in found}
            for ready in answers:
                rank = pipes.index(ready)  # type: ignore[arg-type]
                try:
                    found[rank] = pipes[rank].recv()
                except EOFError:
                    found[rank] = ("error", "the process ended")
        errors = {rank: said for rank, (kind, said) in sorted(found.items()) if kind == "error"}
        if errors:
            if not goes_on:
                self.close()
            raise RanksError(errors)
        return [found[rank][1] for rank in range(len(pipes))]

    def close(self) -> None:
        """Ends the processes; the next call starts others."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self._pipes, self._processes = [], []
        if self._folder is not None:
            self._folder.cleanup()


def _serve(rank: int, ranks: int, path: str, pipe: Connection) -> None:
    """Waits for calls, in a process of its own."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=ranks, timeout=timedelta(minutes=MINUTES)
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, ranks + 1)}
    while True:
        function, size, arguments = pipe.recv()
        try:
            answer: Sequence[Any] = ("result", function(groups[size], *arguments))
        except BaseException:  # the other process must hear of anything
            answer = ("error", traceback.format_exc().strip())
        pipe.send(answer)
