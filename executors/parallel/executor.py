"""The executor: routing here, experts where they are, and results back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from executors._base.local import check_local
from executors._base.routing import route_checked
from executors._declared import ID_DTYPES
from executors._protocol import Capabilities, Executor, Unsupported, check_norm
from executors._registry import get
from executors.parallel.agreement import Call, failed
from executors.parallel.autograd import Nothing, needing
from executors.parallel.experts import ExpertMap, check_part, shard
from executors.parallel.groups import group_of
from executors.parallel.planning import all_reduce, all_to_all
from executors.parallel.started import Started
from executors.parallel.transport import Needs, Transport
from executors.parallel.waiting import Wire, check_timeout
from moe_ref.types import MoEWeights
from moe_ref.validation import check_experts_inputs, check_inputs, dtype_name

if TYPE_CHECKING:
    from moe_ref.types import Routing

Prepared = Callable[[], tuple[Tensor, Tensor, MoEWeights, ExpertMap]]  # ids, weights, this rank's part, and the map
Dispatch = Literal["all_to_all", "all_reduce"]
Returns = Literal["slot", "rank"]
DTYPES = frozenset({"float64", "float32", "bfloat16"})


@dataclass(frozen=True, eq=False)
class ExpertParallel:
    """An executor whose experts are spread over the ranks of a group, around another executor.

    Every rank calls it, in the same order, with its own part of the weights (`shard`), also a rank without tokens or
    without experts. If any rank needs a gradient, y needs one on all, and each runs its backward pass, in the same
    order. What ranks do out of step is an error on all of them.

    Gradients of what every rank has are this rank's share, to be added over ranks: of a norm after each expert always,
    of expert scales under "all_to_all", where each rank has its own tokens. Selection needs none.

    After a RankError because ranks pass something else, or one refuses its input, the group can be used further. After
    any other its ranks are out of step: each further call is refused at once, by every executor on that group, and
    training goes on with another group, as ``new_group`` makes.

    Limits:
        A call at a time on each group: not from two threads, nor while other code of the process uses the group.
        A rank that raises in the backward pass of its experts, or elsewhere between its steps, cannot tell: the others
        hear of it when it calls again, or when their time is up. On a GPU, time in the backward pass and after the
        comparison of calls is that of the group, not ``timeout``; ranks in another order of backward passes end in an
        assertion there.
        A checkpoint with ``use_reentrant=True`` needs an input that requires a gradient on every rank or on none.
        In torch.compile the call is a graph break; ``fullgraph=True`` refuses it.
        Under "all_reduce" that all ranks have the same tokens, ids and gradients of y is not compared, but for T.
        Under "all_reduce", and with ``max_slots``, all ranks need the same gradients, or none: it is compared.
        DTensors and plain parameters may be mixed if the plain ones are whole; else give parts alone.

    Attributes:
        executor: the name of the executor that each rank runs on its experts, or an executor.
        mesh_or_group: a process group, or a mesh of one dimension; None is the default group.
        dispatch: "all_to_all": each rank has its own tokens, which go to the ranks of their experts. "all_reduce": all
            ranks have the same tokens, and sums meet.
        returns: "slot": each slot's result comes back in x's dtype, and they are added in increasing k. "rank": each
            rank adds a token's slots in fp32 and sends the sum: less to send where a token has many experts on a rank.
        num_experts: E of all ranks; needed by ``.experts()`` alone, since logits tell it.
        timeout: seconds that a rank waits for the others at each step.
        overlap: whether a rank's own tokens go through its experts while others travel. It reads the experts twice.
            Only without gradients: those of a parameter would be rounded twice.
        max_slots: how many slots a rank may send to another at most; more is an error on all ranks. Exchanges have that
            size then, so on a GPU the host waits for nothing. None tells sizes first.

    Raises:
        ValueError, TypeError, RuntimeError: one line naming the argument, its value, and what is allowed.
        Unavailable: the executor cannot be used on this machine.
    """

    executor: str | Executor = "auto"
    mesh_or_group: Any = None
    dispatch: Dispatch = "all_to_all"
    returns: Returns = "slot"
    num_experts: int | None = None
    timeout: float = 120.0
    overlap: bool = False
    max_slots: int | None = None
    inner: Executor = field(init=False, repr=False)
    wire: Wire = field(init=False, repr=False)

    name: ClassVar[str] = "expert_parallel"

    def __post_init__(self) -> None:
        for option, allowed in (("dispatch", get_args(Dispatch)), ("returns", get_args(Returns))):
            if (value := getattr(self, option)) not in allowed:
                raise ValueError(f"{option}={value!r:.60}: must be {' or '.join(map(repr, allowed))}")
        check_timeout(self.timeout)
        for option in ("num_experts", "max_slots"):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{option}={value!r:.60}: must be an integer of at least 1, or None")
        if not isinstance(self.overlap, bool):
            raise TypeError(f"overlap={self.overlap!r:.60}: must be True or False")
        if self.dispatch == "all_reduce" and (self.overlap or self.max_slots is not None):
            option = "max_slots" if self.max_slots is not None else "overlap"
            raise ValueError(f"{option}={getattr(self, option)}: must be left out for dispatch='all_reduce'")
        inner = get(self.executor) if isinstance(self.executor, str) else self.executor
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "wire", Wire(group_of(self.mesh_or_group), float(self.timeout)))

    def __deepcopy__(self, _memo: dict[int, Any]) -> ExpertParallel:
        """Itself: copies of a model share the group, which cannot be copied."""
        return self

    @property
    def capabilities(self) -> Capabilities:
        """Those of the executor inside, but for fp16: a slot's result may pass its range on the way (E7).

        Ranks without tokens, ids of any dtype, and an expert in several slots of a token are no matter of the executor
        inside, which gets one slot in each row.
        """
        able = self.inner.capabilities
        return replace(
            able,
            dtypes=able.dtypes & DTYPES,
            empty_batch=True,
            duplicate_ids=True,
            topk_ids_dtypes=ID_DTYPES,
            empty_slots=able.empty_slots or self.dispatch == "all_to_all",  # they go nowhere
        )

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """The layer.

        Args:
            x: [..., H] this rank's tokens; with "all_reduce" those of all ranks.
            router_logits: [..., E] for the experts of all ranks, any float dtype.
            weights: this rank's part of the parameters, or DTensors with ``Shard(0)``.

        Returns:
            y, of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
            Unsupported: right input that the executor inside cannot take.
            RankError: another rank raised, differs, or did not come.
        """
        return self._run(x, self._routed(x, router_logits, weights))

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """The layer with routing done elsewhere; ids are those of all ranks' experts, others name empty slots (R7).

        Args:
            x: [..., H] this rank's tokens; with "all_reduce" those of all ranks.
            topk_ids: [..., K], int32 or int64.
            topk_weights: [..., K], any float dtype.
            weights: this rank's part of the parameters, or DTensors with ``Shard(0)``.

        Returns:
            y, of x's shape, dtype and device.

        Raises:
            ValueError, TypeError: bad input, in one line naming argument, value, and what is allowed.
            Unsupported: right input that the executor inside cannot take.
            RankError: another rank raised, differs, or did not come.
        """
        return self._run(x, self._given(x, topk_ids, topk_weights, weights))

    def start(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Started:
        """As a call, whose tokens travel while the caller does something else, such as a model's shared experts.

        Args:
            x: as of a call, and so the others.
            router_logits: as of a call.
            weights: as of a call.

        Returns:
            A call under way; ``wait()`` gives y. Every rank must come to it.

        Raises:
            ValueError, TypeError, Unsupported, RankError: as a call.
        """
        return self._start(x, self._routed(x, router_logits, weights))

    def start_experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Started:
        """As `experts`, whose tokens travel while the caller does something else.

        Args:
            x: as of `experts`, and so the others.
            topk_ids: as of `experts`.
            topk_weights: as of `experts`.
            weights: as of `experts`.

        Returns:
            A call under way; ``wait()`` gives y. Every rank must come to it.

        Raises:
            ValueError, TypeError, Unsupported, RankError: as `experts`.
        """
        return self._start(x, self._given(x, topk_ids, topk_weights, weights))

    def route(self, router_logits: Tensor, weights: MoEWeights) -> Routing:
        """The choice that ``__call__`` makes, for a layer that has the configuration and E experts."""
        inner = getattr(self.inner, "route", None)
        return inner(router_logits, weights) if inner is not None else route_checked(router_logits, weights)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for what the executor inside cannot take, and for fp16."""
        if isinstance(x, Tensor) and dtype_name(x) not in self.capabilities.dtypes:
            allowed = ", ".join(sorted(self.capabilities.dtypes))
            raise Unsupported(f"x.dtype={dtype_name(x)}: must be one of {allowed} for {self.name}")
        check_norm(self.inner, weights)
        if not self.inner.capabilities.empty_slots:
            self._check_without_empty_slots()
        if weights.num_experts and (self.inner.capabilities.empty_batch or x.numel()):
            self.inner.check(x, weights)

    def _check_without_empty_slots(self) -> None:
        """Raises Unsupported for what makes empty slots of other ranks' experts, or of what fills up a bound."""
        why = f"for {self.inner.name}: no empty slots"
        if self.dispatch == "all_reduce":
            raise Unsupported(f"dispatch='all_reduce': must be 'all_to_all' {why}")
        if self.max_slots is not None or self.overlap:
            option = "overlap" if self.max_slots is None else "max_slots"
            raise Unsupported(f"{option}={getattr(self, option)}: must be left out {why}")

    def _routed(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Prepared:
        """Checks a call's arguments and chooses experts, where others hear of what is wrong."""

        def routed() -> tuple[Tensor, Tensor, MoEWeights, ExpertMap]:
            local, experts = self._part(weights, _last(router_logits))
            view = _for_routing(x, local, experts.num_experts)
            check_inputs(x, router_logits, view)
            check_local(view, x=x, router_logits=router_logits)
            routing = self.route(router_logits, view)
            return routing.topk_ids, routing.topk_weights, local, experts

        return routed

    def _given(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Prepared:
        """Checks the arguments of a call with ids, where others hear of what is wrong."""

        def given() -> tuple[Tensor, Tensor, MoEWeights, ExpertMap]:
            if self.num_experts is None:
                raise ValueError("num_experts=None: must be given to ExpertParallel, since ids do not tell it")
            local, experts = self._part(weights, self.num_experts)
            check_experts_inputs(x, topk_ids, topk_weights, _for_routing(x, local, experts.num_experts))
            check_local(local, x=x, topk_ids=topk_ids, topk_weights=topk_weights)
            return topk_ids, topk_weights, local, experts

        return given

    def _part(self, weights: MoEWeights, num_experts: int) -> tuple[MoEWeights, ExpertMap]:
        """This rank's part and the map."""
        if not isinstance(weights, MoEWeights):
            raise TypeError(f"weights is a {type(weights).__name__}: must be a moe_ref.MoEWeights")
        if any(hasattr(value, "placements") for value in weights.parameters().values()):
            weights, _ = shard(weights, self.wire.group)
        experts = ExpertMap(num_experts, self.wire.ranks)
        check_part(weights, experts, self.wire.rank)
        return weights, experts

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, x: Tensor, prepared: Prepared) -> Tensor:
        """Y of this rank's tokens."""
        return self._start(x, prepared).wait()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _start(self, x: Tensor, prepared: Prepared) -> Started:
        """The call of this rank's tokens. What this rank raises, others hear of."""
        try:
            topk_ids, topk_weights, weights, experts = prepared()
            self.check(x, weights)
            top_k = topk_ids.shape[-1]
            ids, slot_weights = topk_ids.reshape(-1, top_k), topk_weights.reshape(-1, top_k)
            rows = x.reshape(-1, x.shape[-1])
            call = self._call(rows, slot_weights, weights, experts)
            needs = _needs(rows, slot_weights, weights)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            failed(self.wire, error, x.device if isinstance(x, Tensor) else torch.device("cpu"))
            raise
        with self.wire.together():
            transport = self._transport(ids, experts, call, needs)
            needs = transport.needs
            sent = needing(rows, needs.rows), needing(slot_weights, needs.weights)
            return Started(transport, *sent, weights, x.shape, self._experts, self.overlap)

    def _transport(self, ids: Tensor, experts: ExpertMap, call: Call, needs: Needs) -> Transport:
        """How tokens travel in this call. All ranks compare it here."""
        plan = all_to_all if self.dispatch == "all_to_all" else all_reduce
        return plan(self.wire, call, needs, ids, experts, self.returns == "rank")

    def _experts(self, rows: Tensor, weights: Tensor, ids: Tensor, own: MoEWeights) -> Tensor:
        """[S, H] the results of slots, each with its weight; zeros on a rank without experts."""
        able = self.inner.capabilities
        ids = ids if dtype_name(ids) in able.topk_ids_dtypes else ids.int()
        if own.num_experts == 0 or (len(rows) == 0 and not able.empty_batch):
            zeros: Tensor = Nothing.apply(rows, weights, *own.parameters().values())  # type: ignore[no-untyped-call]
            return zeros
        return self.inner.experts(rows, topk_ids=ids, topk_weights=weights, weights=own)

    def _call(self, rows: Tensor, weights: Tensor, own: MoEWeights, experts: ExpertMap) -> Call:
        """What must be the same on every rank."""
        return Call(
            self.dispatch,
            self.returns,
            rows.shape[1],
            dtype_name(rows),
            experts.num_experts,
            weights.shape[1],
            rows.shape[0] if self.dispatch == "all_reduce" else -1,
            self.max_slots or 0,
            torch.is_grad_enabled(),
            dtype_name(weights),
            own.config,
        )


def _needs(rows: Tensor, slot_weights: Tensor, own: MoEWeights) -> Needs:
    """What gradients this rank needs."""
    if not torch.is_grad_enabled():
        return Needs(False, False, False)
    of_own = any(value.requires_grad for value in own.parameters().values())
    return Needs(
        rows.requires_grad, slot_weights.requires_grad, rows.requires_grad or slot_weights.requires_grad or of_own
    )


def _last(value: Any) -> int:
    """E, as logits tell it."""
    if not isinstance(value, Tensor) or not value.ndim or not value.shape[-1]:
        said = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"router_logits={said}: must be a tensor [..., E]")
    return int(value.shape[-1])


def _for_routing(x: Tensor, local: MoEWeights, num_experts: int) -> MoEWeights:
    """A layer of all experts as routing sees it: one number stands for all of its projections."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}: must be a torch.Tensor")
    dtype = getattr(torch, dtype_name(local.gate_up_proj))
    one, hidden = torch.empty(1, 1, 1, dtype=dtype, device=x.device), local.hidden_size
    gate_up = one.expand(num_experts, 2 if local.config.gated else 1, hidden)
    return MoEWeights(
        gate_up,
        one.expand(num_experts, hidden, 1),
        selection_bias=local.selection_bias,
        expert_scale=local.expert_scale,
        config=local.config,
    )
