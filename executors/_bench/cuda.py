"""Measurements that need a GPU: times by events from a cold cache, CUDA graphs, and launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

MS = 1e-3
FLUSHED = 4  # times the size of the L2 cache
SMALLEST_FLUSH = 2**26  # bytes
NO_KERNELS = ("Memcpy", "Memset")


class NotCaptured(RuntimeError):
    """A call cannot be captured in a CUDA graph; the message says why."""


class ColdClock:
    """Times calls by events, each from a cold L2 cache.

    Reads fill the cache. After writes the call would also pay for writing their lines back.

    Args:
        device: the GPU.
        queued: whether the call waits on the GPU behind that reading, so that its own launch costs nothing (a graph);
            otherwise it starts on an idle GPU, and what the host takes between launches counts.
    """

    def __init__(self, device: str, queued: bool = False) -> None:
        size = max(SMALLEST_FLUSH, FLUSHED * torch.cuda.get_device_properties(device).L2_cache_size)
        self.device, self.queued = device, queued
        self.filler = torch.ones(size // 4, dtype=torch.int32, device=device)

    def __call__(self, action: Callable[[], None]) -> float:
        """Seconds."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            self.filler.max()
            if not self.queued:
                torch.cuda.synchronize()
            return event_seconds(action, self.device)


def event_seconds(action: Callable[[], None], device: str) -> float:
    """Seconds between an event before a call and one after it; waits for the GPU afterwards."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * MS


def captured(action: Callable[[], None], device: str, after: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Captures a call in a CUDA graph, after calls that warm it up.

    Args:
        action: the call; it must have run before.
        device: where it runs.
        after: called after each call: drops gradients, so that the graph makes its own and adds to none.

    Returns:
        A function that replays it.

    Raises:
        NotCaptured: it waits for the GPU, or CUDA refuses to capture it.
    """
    with torch.cuda.device(device):
        try:
            with waiting_forbidden():
                action()
        except RuntimeError as error:
            raise NotCaptured(f"waits for the GPU: {_first_line(error)}") from error
        finally:
            after()
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                action()
            torch.cuda.current_stream().wait_stream(stream)
            after()
            with torch.cuda.graph(graph):
                action()
        except RuntimeError as error:
            raise NotCaptured(_first_line(error)) from error
        finally:
            after()
    return graph.replay


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Makes torch raise a RuntimeError where it would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def launches(action: Callable[[], None], device: str) -> int | None:
    """Kernels that a call launches, by torch's profiler; None where that sees none."""
    with (
        torch.cuda.device(device),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler,
    ):
        action()
        torch.cuda.synchronize()
    return kernels(profiler.events() or ()) or None


def kernels(events: Iterable[Any]) -> int:
    """How many of a profile's events are kernels: work of the GPU that neither copies nor fills."""
    on_gpu = (event for event in events if event.device_type.name == "CUDA")
    return sum(not event.name.startswith(NO_KERNELS) and not event.is_user_annotation for event in on_gpu)


def _first_line(error: RuntimeError) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
