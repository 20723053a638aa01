"""An executor among threads, processes and copies of itself."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from moe_ref.conformance.citizen.case import Case, NotApplicableError
from moe_ref.conformance.judgement.call import Inputs
from moe_ref.conformance.judgement.faults import RAISED

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 60.0  # seconds after which a thread or a process counts as hanging
THREADS = 4
DIFFERS = 3  # exit status of a child whose results differ


def threads(case: Case) -> None:
    """Threads that call one executor on shared weights at once, forward and backward, get the same bits as alone."""
    calls = 1 if case.executor.capabilities.interpreted else 8
    count = 2 if case.executor.capabilities.interpreted else THREADS
    shared = case.inputs()
    own = [_of_thread(shared, place) for place in range(count)]
    alone = [_run_alone(case, inputs) for inputs in own]
    start, ended = threading.Barrier(count), dict[int, str]()

    def work(place: int) -> None:
        ended[place] = "a thread ends early"  # unless it tells another reason, or none
        start.wait()
        try:
            results = [_run_alone(case, own[place]) for _ in range(calls)]
        except RAISED as error:
            ended[place] = repr(error)
        else:
            ended[place] = next(filter(None, (case.difference(result, alone[place]) for result in results)), "")

    workers = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(count)]
    with _switching_often():
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(LIMIT)
    case.demand(not any(worker.is_alive() for worker in workers), f"{count} threads at once do not end")
    faults = list(filter(None, ended.values()))
    case.demand(not faults, f"{count} threads at once: {'; '.join(faults[:1])}")


def _of_thread(shared: Inputs, place: int) -> Inputs:
    """The shared weights beside tokens of the thread's own."""
    x, dy = (value.detach().roll(place, 0) * 2.0**-place for value in (shared.x, shared.dy))
    return replace(shared, x=x.requires_grad_(), dy=dy)


def _run_alone(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Y and gradients that are added to nobody's ``.grad``."""
    y = case.call(inputs)
    if not case.executor.capabilities.backward:
        return {"y": y.detach()}
    leaves = {name: leaf for name, leaf in inputs.tensors().items() if leaf.requires_grad}
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


@contextmanager
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def fork(case: Case) -> None:
    """A process that is forked after a call gets the same bits or a RuntimeError that says "fork", and never hangs."""
    _needs_fork(case)
    sys.stdout.flush()
    sys.stderr.flush()
    with _quiet_forks():
        child = os.fork()
    if child == 0:
        _end_with_result(case)
    status = _status_of(child)
    case.demand(status is not None, f"a forked process hangs for {LIMIT:.0f} s")
    case.demand(status != DIFFERS, "a forked process gets other bits")
    case.demand(status == 0, f"a forked process ends with status {status}")


def _end_with_result(case: Case) -> None:
    """Calls in the child, and ends it there without anything that the parent has still to do."""
    status = 1
    try:
        status = 0 if not _fault_in_child(case) else DIFFERS
    except RAISED:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _status_of(child: int) -> int | None:
    """The exit status of a child; None, and an end to it, if it hangs."""
    for _ in range(int(LIMIT / 0.005)):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def data_loader(case: Case) -> None:
    """A worker of DataLoader that is forked gets the same bits, or a RuntimeError that says "fork"."""
    _needs_fork(case)
    fault = _fault_in_worker(case)
    case.demand(not fault, f"in a worker of DataLoader: {fault}")


def _fault_in_worker(case: Case) -> str:
    loader = DataLoader(_Calls(case), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=LIMIT)
    try:
        with _quiet_forks():
            return str(next(iter(loader)))
    except RuntimeError as error:
        error.__traceback__ = None  # its frames would keep the worker
        return repr(error)


class _Calls(Dataset[str]):
    """One element: what is wrong with a call in the process that asks for it."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: int) -> str:
        try:
            return _fault_in_child(self.case)
        except RAISED as error:
            return repr(error)


def _fault_in_child(case: Case) -> str:
    """What differs in a forked process, as DataLoader sets one up; or "", also where the executor refuses it."""
    torch.set_num_threads(1)
    inputs = case.inputs()
    try:
        with torch.no_grad():
            y = case.call(inputs)
    except RuntimeError as error:
        if "fork" in str(error) and "\n" not in str(error):
            return ""
        raise
    actual: Mapping[str, Tensor] = {"y": y}
    if not torch.accelerator.is_available():  # torch's autograd has threads then, and refuses to go on in a fork
        actual = case.run(inputs)
    return case.difference(actual, {name: case.plain[name] for name in actual})


def _needs_fork(case: Case) -> None:
    case.needs_cpu()
    if sys.platform != "linux":
        raise NotApplicableError("processes are forked on Linux only")


@contextmanager
def _quiet_forks() -> Iterator[None]:
    """Python 3.12 warns of any fork of a process with threads, and JAX of any fork."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        yield


def copies(case: Case) -> None:
    """Copies of the executor, by deepcopy and by pickle, have its name and capabilities and give the same bits."""
    for how in ("deepcopy", "pickle"):
        try:
            other = copy.deepcopy(case.executor) if how == "deepcopy" else pickle.loads(pickle.dumps(case.executor))
        except (*RAISED, pickle.PickleError) as error:
            case.fail(f"{how} of the executor: {error!r}")
        case.demand(other.name == case.executor.name, f"{how}: name={other.name!r}")
        case.demand(other.capabilities == case.executor.capabilities, f"{how}: other capabilities")
        with torch.no_grad():
            y = replace(case, executor=other).call(case.inputs())
        case.demand_same({"y": y}, f"{how} of the executor", {"y": case.plain["y"]})
