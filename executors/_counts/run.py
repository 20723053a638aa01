"""Counts a whole layer: its slices, what follows from them, and the kernels that are executed as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

import torch

from executors._bench.layers import Shape
from executors._counts import whole
from executors._counts.cards import Card
from executors._counts.fit import Axes, Counts, Sizes, differences, extrapolated
from executors._counts.slices import BLOCKSIZE, Slice, count
from executors._triton.launch.decode import PARTS
from executors._triton.launch.packed import MOST_HELD, MX_BLOCKSIZE

FEW = 16  # rows up to which tiles are small, and each has a program of its own
MOST_ROWS = 1024  # of an expert: more take too long
APART = 8  # experts at least: then an expert's slots are a sector apart, as in the layer
LARGEST_BLOCK = 128  # of columns or steps, in any tile of sm80

Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CountPlan:
    """What to count.

    Attributes:
        shape: the layer.
        tokens: T, as it was asked for.
        dtype: of x.
        packed: a name of `executors._counts.slices.FORMATS`, or "" for dense weights.
        backward: whether the backward pass is counted too.
        card: for whose multiprocessors programs are made.
    """

    shape: Shape
    tokens: int
    dtype: torch.dtype
    packed: str
    backward: bool
    card: Card

    @property
    def weights(self) -> str:
        """The format of the weights, or their dtype."""
        return self.packed or str(self.dtype).removeprefix("torch.")

    @property
    def active(self) -> int:
        """Experts that have rows, if slots are spread as evenly as they can be."""
        return min(self.shape.experts, self.tokens * self.shape.top_k)

    @property
    def rows(self) -> int:
        """Of each of them."""
        return max(1, round(self.tokens * self.shape.top_k / self.active))

    @property
    def counted_tokens(self) -> int:
        """T for which all of them have so many rows."""
        return -(-self.active * self.rows // self.shape.top_k)

    @property
    def sizes(self) -> Sizes:
        """The layer's, of experts that have rows."""
        return Sizes(self.active, self.shape.hidden, self.shape.intermediate, self.card.multiprocessors)

    def slice_of(self, sizes: Sizes) -> Slice:
        """A slice with the layer's rows, dtype and format."""
        return Slice(self.shape, sizes, self.rows, self.dtype, self.packed, self.backward)

    def axes(self) -> Axes:
        """Sizes of the slices: what blocks leave of the layer's sizes is left of theirs too."""
        few = self.rows <= FEW
        step = LARGEST_BLOCK
        if self.packed and not self.slice_of(self.sizes).decoded:  # runs of scales that are held have one length then
            step = MOST_HELD * (BLOCKSIZE if self.packed == "nf4-nested" else MX_BLOCKSIZE)
        top_k = self.shape.top_k
        experts = top_k * -(-(FEW if few else APART) // top_k)
        if self.slice_of(self.sizes).decoded:
            experts = lcm(experts, PARTS)
        return Axes(
            _values(self.active, experts, experts),
            _values(self.shape.hidden, step + self.shape.hidden % step, step),
            _values(self.shape.intermediate, step + self.shape.intermediate % step, step),
            (1, 2) if not few or self.dtype == torch.float32 else (1,),
        )


def _values(size: int, first: int, step: int) -> tuple[int, ...]:
    """Two sizes to execute, or the layer's own where it is no larger."""
    return (size,) if size <= first + step else (first, first + step)


@dataclass(frozen=True)
class LayerCounts:
    """The counts of a layer.

    Attributes:
        plan: what was asked for.
        kernels: by step, in the order in which they run.
        slices: sizes that were executed.
        beyond: sizes of the slice that was foretold and executed too; None where nothing was extrapolated.
        differences: of its counts from those foretold, relative, the largest by field; none where all are the same.
    """

    plan: CountPlan
    kernels: Counts
    slices: list[Sizes]
    beyond: Sizes | None
    differences: dict[str, float]


def count_layer(plan: CountPlan, show: Show) -> LayerCounts:
    """Counts the kernels of one call.

    Args:
        plan: what to count.
        show: called with a text, what is done and how much there is.
    """
    axes = plan.axes()
    points, beyond = axes.points(), axes.beyond()
    steps = len(points) + 2
    found = []
    for number, sizes in enumerate(points):
        show(f"executing a slice, E={sizes.experts} H={sizes.hidden} I={sizes.intermediate}", number, steps)
        found.append(count(plan.slice_of(sizes)))
    found_out: dict[str, float] = {}
    is_exact = len(axes.hidden) == len(axes.intermediate) == 1
    if not is_exact:
        show("executing a slice that was foretold", len(points), steps)
        found_out = differences(extrapolated(found, axes, beyond), count(plan.slice_of(beyond)))
    show("executing routing, sorting and sums", len(points) + 1, steps)
    kernels = _in_order(plan, extrapolated(found, axes, plan.sizes))
    return LayerCounts(plan, kernels, points, None if is_exact else beyond, found_out)


def _in_order(plan: CountPlan, of_slices: Counts) -> Counts:
    """All kernels of a call, as they run."""
    tokens, shape = plan.counted_tokens, plan.shape
    block_m = plan.slice_of(plan.sizes).config(aligned=True).up.block_m
    routing = whole.routing(shape, tokens, plan.backward)
    summing = whole.summing(shape, tokens, plan.dtype, plan.backward)
    sorting = whole.sorting(shape, tokens, block_m)
    route_backward = {label: routing.pop(label) for label in ["route_backward"] if label in routing}
    combine_dx = {label: summing.pop(label) for label in ["combine dx"] if label in summing}
    labels = list(of_slices)
    end = 1 + labels.index("down")
    of_forward, of_backward = ({label: of_slices[label] for label in own} for own in (labels[:end], labels[end:]))
    return routing | sorting | of_forward | summing | of_backward | combine_dx | route_backward
