"""One collective, with an end: rows of bytes to and from every rank, or an error that says who is missing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from executors._files.text import one_line

SHORTEST, LONGEST = 2e-5, 5e-3  # seconds between looks at a collective
EVERY = 0.5  # seconds between looks at what other ranks say
GRACE = 4 * EVERY  # seconds in which the others, once one rank has given up, say that they wait too


Arriving = Callable[[], Tensor]  # waits for what is on its way, and gives it


class RankError(RuntimeError):
    """Another rank raised, differs, or did not come; the message names it, in one line."""


@dataclass
class Standing:
    """What all executors on one group know of it.

    Attributes:
        name: of the group in the store, where its ranks say why they went; no other group has it, before or after.
        calls: how many calls its ranks have begun together.
        broken: why its ranks have parted; "" as long as they go together.
    """

    name: str
    calls: int = 0
    broken: str = ""


_standings: MutableMapping[Any, Standing] = WeakKeyDictionary()
_named: Counter[str] = Counter()  # torch names the groups of a second init_process_group like those of the first


@dataclass
class Wire:
    """The group of one executor, and what its ranks tell each other when something goes wrong.

    Attributes:
        group: the process group.
        timeout: seconds that a rank waits for the others at each step.
    """

    group: Any
    timeout: float

    @property
    def standing(self) -> Standing:
        """Of the group, whichever executor uses it."""
        found = _standings.get(self.group)
        if found is None:
            name = self.group.group_name
            _named[name] += 1
            found = _standings[self.group] = Standing(f"moe_ref/parallel/{name}/{_named[name]}")
        return found

    @property
    def rank(self) -> int:
        """This rank, in the group."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """W."""
        return dist.get_world_size(self.group)

    @property
    def device(self) -> torch.device:
        """Where the group's collectives of words are."""
        return torch.device(distributed_c10d._get_object_coll_device(self.group))

    def exchange(self, rows: Tensor, send: list[int], receive: list[int], step: str) -> Arriving:
        """Begins to send rows to every rank, and to receive theirs.

        Args:
            rows: [sum(send), ...] in the order of the ranks that get them.
            send: [W] how many each rank gets.
            receive: [W] how many each rank gives.
            step: what it is for, for a message.

        Returns:
            What waits for them: [sum(receive), ...] in the order of the ranks that gave them. It raises RankError if
            some rank did not come in time.
        """
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        if self.ranks == 1:
            out.copy_(rows)
            return lambda: out
        sent = rows.contiguous()
        work = dist.all_to_all_single(as_bytes(out), as_bytes(sent), receive, send, group=self.group, async_op=True)

        def arrived() -> Tensor:
            self.wait(work, step, on_host(sent))
            return out

        return arrived

    def wait(self, work: Any, step: str, watched: bool = True) -> None:
        """Waits for a collective: on the host, or as a GPU waits, in its own order and with the group's own timeout.

        Raises:
            RankError: some rank did not come in time, or said that it failed.
        """
        try:
            if watched:
                self._watch(work, step)
            work.wait()
        except RankError:
            raise
        except (RuntimeError, ValueError) as error:
            raise RankError(self._blame(step, one_line(error))) from error

    def _watch(self, work: Any, step: str) -> None:
        """Waits until a collective is complete, and looks for what other ranks say."""
        start, asked, pause = time.monotonic(), time.monotonic(), SHORTEST
        while not work.is_completed():
            now = time.monotonic()
            if now - start > self.timeout:
                raise RankError(self._blame(step, ""))
            if now - asked > EVERY:
                asked = now
                if any(_store().check([self._key(rank)]) for rank in range(self.ranks) if rank != self.rank):
                    raise RankError(self._blame(step, ""))
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST)

    @contextmanager
    def together(self) -> Iterator[None]:
        """For what ranks do in step: where one fails, the others, which may wait for it, hear of it.

        Raises:
            RankError: the group's ranks have parted before.
        """
        if self.standing.broken:
            raise RankError(f"the group is out of step since {self.standing.broken}; make another, as by new_group")
        try:
            yield
        except RankError:
            raise
        except BaseException as error:  # be it an interrupt: the others wait
            self._part(f"raised {one_line(f'{type(error).__name__}: {error}').rstrip(': ')}")
            raise

    def _key(self, rank: int) -> str:
        return f"{self.standing.name}/{dist.get_global_rank(self.group, rank)}"

    def _part(self, words: str) -> None:
        """Says to the other ranks why this one waits for them no more."""
        self.standing.broken = f"rank {self.rank} {words}"
        with suppress(RuntimeError):  # a store whose process has ended hears nothing
            _store().set(self._key(self.rank), words)

    def _blame(self, step: str, otherwise: str) -> str:
        """Which ranks failed or did not come, as far as the others say."""
        try:
            found = self._heard(step, otherwise)
        except RuntimeError as error:
            found = f"the exchange {step} failed, and the store of the process group: {otherwise or one_line(error)}"
        self.standing.broken = found
        return found

    def _heard(self, step: str, otherwise: str) -> str:
        """What the others say."""
        store, others = _store(), [rank for rank in range(self.ranks) if rank != self.rank]
        self._part(f"gave up {step}")
        end, missing = time.monotonic() + GRACE, others
        while missing and time.monotonic() < end:
            missing = [rank for rank in others if not store.check([self._key(rank)])]
            time.sleep(LONGEST)
        said = {rank: store.get(self._key(rank)).decode() for rank in others if rank not in missing}
        told = [f"rank {rank} {words}" for rank, words in said.items() if words.startswith("raised ")]
        if missing and not told:
            ranks = ", ".join(map(str, missing))
            why = f": {otherwise}" if otherwise else f" within {self.timeout:g} s"
            told.append(f"rank{'s' * (len(missing) > 1)} {ranks} did not come {step}{why}")
        told = told or [f"rank {rank} {words}" for rank, words in said.items() if words != f"gave up {step}"]
        return "; ".join(told) or f"the exchange {step} failed{': ' * bool(otherwise)}{otherwise}"


def check_timeout(timeout: Any) -> None:
    """Checks seconds to wait.

    Raises:
        ValueError: in one line.
    """
    if not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(f"timeout={timeout!r:.60}: must be a number of seconds above 0")


def on_host(value: Tensor) -> bool:
    """Whether the host waits for what is exchanged: for a GPU, its own order and the group's timeout do."""
    return value.device.type == "cpu"


def as_bytes(rows: Tensor) -> Tensor:
    """[n, bytes of a row]: every backend sends bytes, and not every dtype."""
    return rows.reshape(rows.shape[0], prod(rows.shape[1:])).view(torch.uint8)


def _store() -> Any:
    """The store by which the processes found each other."""
    return distributed_c10d._get_default_store()
