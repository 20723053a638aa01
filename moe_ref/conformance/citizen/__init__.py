"""A good citizen of torch: what training loops, hooks, modes, threads and processes expect of an executor.

Each behaviour is a function of `BEHAVIOURS`. It takes one executor on one small layer, and its first line says what
must hold. Numbers are judged elsewhere: here results must have the bits of a plain call of the same executor (C1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_ref.conformance.citizen import arguments, company, gradients, graph, modes, saved
from moe_ref.conformance.citizen.case import Case, NotApplicableError, cases
from moe_ref.conformance.judgement.checks import ConformanceError
from moe_ref.conformance.judgement.faults import RAISED

if TYPE_CHECKING:
    from executors import Executor

Behaviour = Callable[[Case], None]

_ALL: tuple[Behaviour, ...] = (
    graph.change_in_place,
    graph.retain_graph,
    graph.tensor_hooks,
    graph.optimizer_in_backward,
    saved.save_on_cpu,
    saved.saved_tensors_hooks,
    saved.checkpoints,
    modes.grad_mode,
    modes.inference_weights,
    modes.deterministic_algorithms,
    modes.default_dtype,
    modes.default_device,
    modes.autocast,
    company.threads,
    company.fork,
    company.data_loader,
    company.copies,
    gradients.micro_batches,
    gradients.frozen,
    gradients.upstream_gradient,
    gradients.views,
    gradients.no_tokens,
    gradients.toggled,
    gradients.functional_call,
    arguments.local_experts,
    arguments.forward_mode,
    arguments.ids_of_route,
    arguments.padding,
    arguments.other_device,
)
BEHAVIOURS: dict[str, Behaviour] = {behaviour.__name__: behaviour for behaviour in _ALL}


def check_citizen(executor: Executor, behaviour: str, device: str = "cpu") -> str:
    """Checks one of `BEHAVIOURS`, on a layer of each kind of weights.

    Returns:
        The reason why the behaviour does not apply to the executor, or "".

    Raises:
        ConformanceError: if the executor behaves otherwise.
    """
    reason = ""
    for case in cases(executor, device, behaviour):
        try:
            BEHAVIOURS[behaviour](case)
        except NotApplicableError as error:
            reason = str(error)
        except ConformanceError:
            raise
        except RAISED as error:
            raise ConformanceError(executor, case.problem, case.clause, f"raises {error!r}") from error
    return reason
