"""Processes of this machine, one for each rank, that find each other by gloo and tell their parent how far they are."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

HOURS = 2  # that a rank waits for the others; a rank that fails ends the others at once
TOLD, FAILED, DONE = "told", "failed", "done"

Tell = Callable[[Any], None]


class RankFailed(RuntimeError):
    """A rank raised or ended; which one, and how, in one line."""


def run_ranks(program: Callable[..., None], ranks: int, *arguments: Any, hear: Tell) -> None:
    """Runs ``program(tell, *arguments)`` in new processes, each with one thread, in a process group of all of them.

    Args:
        program: of a module that a process can import.
        ranks: W.
        *arguments: the same for all; they are pickled.
        hear: called here with what any of them tells.

    Raises:
        RankFailed: a rank did. No process is left then, nor after any other error.
    """
    context = mp.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(ranks):
                here, there = context.Pipe(duplex=False)
                given = rank, ranks, str(Path(folder) / "store"), there, program, arguments
                processes.append(context.Process(target=_serve, args=given, daemon=True))
                processes[-1].start()
                pipes.append(here)
                there.close()
            _listen(pipes, processes, hear)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _listen(pipes: list[Connection], processes: list[Any], hear: Tell) -> None:
    """Passes on what ranks tell, until all are done."""
    left = list(pipes)
    while left:
        for ready in wait(left):
            rank = pipes.index(ready)  # type: ignore[arg-type]
            try:
                kind, said = pipes[rank].recv()
            except EOFError:
                processes[rank].join()
                raise RankFailed(f"rank {rank} ended with exit status {processes[rank].exitcode}") from None
            if kind == FAILED:
                raise RankFailed(f"rank {rank}: {said}")
            if kind == DONE:
                left.remove(pipes[rank])
            else:
                hear(said)


def _serve(
    rank: int, ranks: int, store: str, pipe: Connection, program: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """The life of one process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends this process
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(hours=HOURS)
        )
        program(lambda said: pipe.send((TOLD, said)), *arguments)
        dist.barrier()
    except BaseException as error:  # the parent must hear of anything
        pipe.send((FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}"))
        threading.Event().wait()  # others must not hear that this process ended before the parent hears why
    pipe.send((DONE, None))
