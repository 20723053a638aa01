"""Error bars: how far an implementation that rounds only where clause E2 allows may stray, element by element.

They are sampled, with no second derivation: the specification's own forward and backward pass runs with random errors
at every site (`moe_ref.numerics.Perturbed`). The variance has a storage part (values rounded to x's dtype) and an
accumulation part (sums and activations in fp32 or better), each for unit roundoff 1 and to be scaled by u**2, so one
set of samples serves every dtype and every executor. Only fp16, whose subnormals lie within reach, wants its own set.

ADR 2 records why tolerances are measured this way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from moe_ref._typing import Array
from moe_ref.experts import RowsOf
from moe_ref.layer import layer, layer_vjp
from moe_ref.noise import keys_of, uniform_of
from moe_ref.numerics import FORMATS, Perturbed, Rounding, accumulator
from moe_ref.routing import weigh
from moe_ref.samples import LEAST_WITH_A_GAIN, Measured, Recorded, Replayed, Sums, Total, in_order, processors
from moe_ref.types import MoEGradients, MoEWeights

KINDS = ("storage", "accumulation")
CHUNK_ELEMENTS = 1_000_000  # values of one intermediate array that all samples of a chunk may hold
THREADS_ELEMENTS = 2**28  # values that all threads together may hold


@dataclass(frozen=True, eq=False)
class Part:
    """One kind of error, for unit roundoff 1.

    Attributes:
        variance: of each element; the shape of the tensor.
        gains: [samples], <error, y> / <y, y>.
        probes: [samples, P], the errors of up to `PROBES` elements.
    """

    variance: np.ndarray
    gains: np.ndarray
    probes: np.ndarray


@dataclass(frozen=True, eq=False)
class TensorBars:
    """The exact value of an output or a gradient, and its error bars.

    Attributes:
        exact: float64.
        storage: errors of values stored in x's dtype.
        accumulation: errors of sums and activations, in the accumulator's format.
        probed: flat indices of the elements in ``probes``.
    """

    exact: np.ndarray
    storage: Part
    accumulation: Part
    probed: np.ndarray

    def sd(self, dtype: str, out_dtype: str) -> np.ndarray:
        """Standard deviation of each element's error.

        Args:
            dtype: x's dtype, in which an implementation stores.
            out_dtype: the dtype of this output or gradient itself, rounded to once.

        Returns:
            float64, the shape of ``exact``. At least half its row's root mean square, because the sampled deviation
            of a single element is noisy; exactly 0 where no error can reach (structural zeros).
        """
        u, ua, out = FORMATS[dtype].unit_roundoff, accumulator(dtype).unit_roundoff, FORMATS[out_dtype]
        size = np.abs(self._finite())
        inner = u**2 * self.storage.variance + ua**2 * self.accumulation.variance
        inner = 2 * inner if dtype == "float64" else inner  # the specification's own float64 errs by as much
        reached = (inner > 0) | (size > 0)
        rounding = (out.unit_roundoff * np.maximum(size, out.smallest_normal)) ** 2 / 3
        variance = np.where(reached, inner + rounding, 0.0)
        row = variance.sum(axis=-1, keepdims=True) / np.maximum(reached.sum(axis=-1, keepdims=True), 1)
        return np.sqrt(np.where(reached, np.maximum(variance, row / 4), 0.0))

    def gain_sd(self, dtype: str, out_dtype: str) -> float:
        """Standard deviation of the gain <error, y> / <y, y>; 0 where y is so small that it has none."""
        gains = self._scaled(dtype, self.storage.gains, self.accumulation.gains)
        y = np.abs(self._finite()).ravel()
        largest = float(y.max(initial=0.0)) or 1.0
        if largest < LEAST_WITH_A_GAIN:
            return 0.0
        y, out = y / largest, FORMATS[out_dtype]  # so that no square of a tiny tensor underflows
        _, groups = np.unique(y.astype(np.float32), return_inverse=True)  # equal values round equally
        together = np.bincount(groups, weights=y * np.maximum(y, out.smallest_normal / largest), minlength=1)
        rounding = out.unit_roundoff / math.sqrt(3) * float(np.linalg.norm(together)) / (float(y @ y) or 1.0)
        return math.hypot(math.sqrt(np.mean(gains**2)), rounding)

    def rms_sd(self, dtype: str, out_dtype: str) -> float:
        """Standard deviation, over the samples, of the root mean square of z: how far errors move together."""
        exact, sd = self._finite().ravel()[self.probed], self.sd(dtype, out_dtype).ravel()[self.probed]
        errors = self._scaled(dtype, self.storage.probes, self.accumulation.probes)
        out = FORMATS[out_dtype]
        noise = uniform_of(
            exact[None], keys_of(0, "out", 0, len(errors)), np.zeros(len(errors), dtype=bool), out.unit_roundoff
        )
        errors = errors + noise * np.maximum(np.abs(exact), out.smallest_normal)
        z = np.divide(errors, sd, out=np.zeros_like(errors), where=sd > 0)
        return float(np.std(np.sqrt(np.mean(z**2, axis=1)))) if z.size else 0.0

    def _finite(self) -> np.ndarray:
        """The exact value, with 0 where it is NaN or infinite: there is nothing to measure."""
        return np.where(np.isfinite(self.exact), self.exact, 0.0)

    @staticmethod
    def _scaled(dtype: str, storage: np.ndarray, accumulation: np.ndarray) -> np.ndarray:
        return FORMATS[dtype].unit_roundoff * storage + accumulator(dtype).unit_roundoff * accumulation


def error_bars(
    x: Array,
    topk_ids: Array,
    weights: MoEWeights,
    dy: Array | None,
    *,
    router_logits: Array | None = None,
    topk_weights: Array | None = None,
    dtype: str,
    samples: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    rows_of: RowsOf | None = None,
) -> dict[str, TensorBars]:
    """Samples the error bars of y and of every gradient.

    Args:
        x: [T, H] float64.
        topk_ids: [T, K], from the exact run: no sample chooses again.
        weights: the layer's parameters.
        dy: [T, H] float64, the upstream gradient; None for y alone.
        router_logits: [T, E] float64, or
        topk_weights: [T, K] float64; exactly one of the two.
        dtype: x's dtype; only its smallest normal number matters here.
        samples: samples of each part.
        seed: of the random errors.
        progress: called with (samples done, samples in all).
        rows_of: of the gradients of matrices and factors, the rows that are wanted, by name; all where there is none.

    Returns:
        {"y": ..., "x": ..., "router_logits": ..., ...}, one entry for each output and gradient of the layer.
    """
    if (router_logits is None) == (topk_weights is None):
        raise TypeError("router_logits, topk_weights: exactly one of the two must be given")
    routing = [None if a is None else a[None] for a in (router_logits, topk_weights)]

    def run(rounding: Rounding) -> dict[str, np.ndarray]:
        logits, slot_weights = routing
        if dy is None:
            if slot_weights is None:
                slot_weights = weigh(logits, topk_ids, weights.config, rounding, weights.expert_scale)
            return {"y": np.asarray(layer(x[None], topk_ids, slot_weights, weights, rounding))}
        y, gradients = layer_vjp(x[None], logits, topk_ids, slot_weights, weights, dy[None], rounding, rows_of)
        return named(y, gradients)

    recorded = Recorded()
    exact = {name: value[0] for name, value in run(recorded).items()}
    measured = {name: Measured(value, seed) for name, value in exact.items()}
    floor = FORMATS[dtype].smallest_normal

    def sample(kind: str, first: int, count: int) -> dict[str, Sums]:
        errors = Perturbed(kind, count, seed, first, floor)
        values = run(errors if kind == "storage" else Replayed(errors, recorded))
        return {name: measured[name].sums(value, errors.scale, count) for name, value in values.items()}

    both = weights.gate_up_proj.shape[1]
    largest = max(1, topk_ids.shape[0] * topk_ids.shape[1] * max(both, weights.hidden_size))
    chunk = max(1, min(samples, CHUNK_ELEMENTS // largest))
    chunks = [(kind, first, min(chunk, samples - first)) for kind in KINDS for first in range(0, samples, chunk)]
    live = chunk * (8 * largest + 3 * sum(value.size for value in exact.values()))
    threads = max(1, min(len(chunks) // 2, processors(), THREADS_ELEMENTS // live))
    totals = {(kind, name): Total(value.shape) for kind in KINDS for name, value in exact.items()}
    done = 0
    found = in_order([partial(sample, *which) for which in chunks], threads)
    for (kind, _, count), sums in zip(chunks, found, strict=True):
        for name, own in sums.items():
            totals[kind, name].add(own)
        done += count
        if progress is not None:
            progress(done, len(KINDS) * samples)

    def part(kind: str, name: str) -> Part:
        total = totals[kind, name]
        return Part(total.squares / samples, np.concatenate(total.gains), np.concatenate(total.probes))

    return {
        name: TensorBars(value, part("storage", name), part("accumulation", name), measured[name].probed)
        for name, value in exact.items()
    }


def named(y: Array, gradients: MoEGradients) -> dict[str, np.ndarray]:
    """{"y": y, "x": dx, "router_logits": ...}, without what the layer does not have."""
    pairs = [("y", y), *((f.name, getattr(gradients, f.name)) for f in fields(gradients))]
    return {name: np.asarray(value) for name, value in pairs if value is not None}
