"""What the benchmark measured: cases, and a row for each contender."""

from __future__ import annotations

from dataclasses import dataclass, field

from executors._bench.layers import DENSE, Shape, Storage
from executors._bench.measure import Spread, ratios, spread
from executors._bench.routing import Load
from moe_ref.conformance.judgement.faults import Judgement

FORWARD, WITH_BACKWARD, LORA = "forward", "forward_backward", "lora"
DENSE_WEIGHTS = "triton[bf16]"  # a contender in 4 bits


@dataclass(eq=False)
class BenchRow:
    """What came of one contender in one case.

    Attributes:
        name: the contender.
        ours: whether it must be right.
        reason: why it was not run, or "".
        judgement: its verdicts, if it ran.
        seconds: timed calls, one for each round.
        peak: bytes that a call takes at most, above layer and input; None where that was not measured.
        no_peak: why it could not be measured, or "".
        untimed: why it was not timed although it ran, or "".
        interpreted: whether its kernels were interpreted: ``seconds`` are then no measurement.
        launches: kernels that a call launches on a GPU; None where they were not counted.
        graph: timed replays of a call captured in a CUDA graph, one for each round.
        no_graph: why it was not captured, or "".
    """

    name: str
    ours: bool
    reason: str = ""
    judgement: Judgement | None = None
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    no_peak: str = ""
    untimed: str = ""
    interpreted: bool = False
    launches: int | None = None
    graph: list[float] = field(default_factory=list)
    no_graph: str = ""

    @property
    def failed(self) -> bool:
        """Whether it ran and is wrong. The peers may round elsewhere than the specification allows."""
        if self.judgement is None:
            return False
        return bool(self.judgement.failure if self.ours else self.judgement.fault)


@dataclass(eq=False)
class BenchCase:
    """One layer, T, routing and direction.

    Attributes:
        shape: the layer.
        tokens: T.
        routing: how the tokens were spread.
        direction: FORWARD, WITH_BACKWARD, or LORA, which is with backward and with adapters.
        load: how unevenly they were spread.
        active: experts that have tokens.
        rows: the contenders.
        reference: the contender that was timed twice in each round, or "".
        again: its second times.
        storage: how the weights are kept.
        stack: the contender that decodes the whole stack in every call, or "" where none does.
        gpu: whether it was measured on a GPU.
    """

    shape: Shape
    tokens: int
    routing: str
    direction: str
    load: Load
    active: int
    rows: list[BenchRow]
    reference: str = ""
    again: list[float] = field(default_factory=list)
    storage: Storage = DENSE
    stack: str = ""
    gpu: bool = False

    @property
    def backward(self) -> bool:
        """Whether a call has a backward pass."""
        return self.direction != FORWARD

    @property
    def flops(self) -> int:
        """Of the products of one call."""
        return self.shape.flops(self.tokens, self.backward, self.storage)

    @property
    def bytes_moved(self) -> int:
        """The least that one call must move."""
        return self.shape.bytes_moved(self.tokens, self.active, self.backward, self.storage)

    def decoded(self) -> tuple[int, int]:
        """Bytes in bf16 of the active experts' projections, and of all experts'."""
        one = 2 * self.shape.expert_matrices
        return self.active * one, self.shape.experts * one

    def best_peer(self) -> BenchRow | None:
        """The fastest contender that is not ours, by the median."""
        timed = [row for row in self.rows if row.seconds and not row.ours]
        return min(timed, key=lambda row: spread(row.seconds).median, default=None)

    def control(self) -> Spread | None:
        """The reference against itself."""
        own = [row.seconds for row in self.rows if row.name == self.reference]
        return spread(ratios(own[0], self.again)) if own and self.again else None

    def ratio(self, row: BenchRow) -> Spread | None:
        """How many times as fast as the best peer, over the rounds."""
        return _times_as_fast(row, self.best_peer())

    def graph_ratio(self, row: BenchRow) -> Spread | None:
        """How many times as fast as the best peer, both in a graph."""
        peers = [peer for peer in self.rows if peer.graph and not peer.ours]
        best = min(peers, key=lambda peer: spread(peer.graph).median, default=None)
        return spread(ratios(best.graph, row.graph)) if best is not None and row.graph else None

    def stack_row(self) -> BenchRow | None:
        """The contender that decodes the whole stack, where it was timed."""
        return next((row for row in self.rows if row.name == self.stack and row.seconds), None)

    def stack_ratio(self, row: BenchRow) -> Spread | None:
        """How many times as fast as `stack_row`."""
        return _times_as_fast(row, self.stack_row())

    def dense_row(self) -> BenchRow | None:
        """Our kernels on weights that were decoded beforehand, if they were timed: what 4 bits must beat."""
        timed = (row for row in self.rows if row.seconds and not row.interpreted)
        return next((row for row in timed if row.name == DENSE_WEIGHTS), None)

    def dense_ratio(self, row: BenchRow) -> Spread | None:
        """How many times as fast as `dense_row`."""
        return _times_as_fast(row, self.dense_row())

    def dense_graph_ratio(self, row: BenchRow) -> Spread | None:
        """How many times as fast as `dense_row`, both in a graph."""
        dense = self.dense_row()
        return spread(ratios(dense.graph, row.graph)) if dense is not None and dense.graph and row.graph else None


def _times_as_fast(row: BenchRow, reference: BenchRow | None) -> Spread | None:
    if reference is None or not row.seconds or row.interpreted:
        return None
    return spread(ratios(reference.seconds, row.seconds))
