"""Peak memory of contenders: ``python -m executors._bench.memory SPEC NAME``, a process for each of them.

The layer is written once, in its storage form, and each process reads it. A process measures all cases of a layer in
turn. `executors._compare.memory` says how it measures.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from executors._bench.case import LORA, BenchCase, BenchRow
from executors._bench.contenders import action_of
from executors._bench.everyone import contenders
from executors._bench.judge import clear_gradients
from executors._bench.layers import LAYERS, BenchLayer, Storage, with_adapters
from executors._bench.routing import batch
from executors._bench.truth import judged_tokens
from executors._compare.measure import in_a_process
from executors._compare.memory import peak_of
from moe_ref.types import MXFP4Tensor, NF4Tensor, PackedTensor

SIZES = ("hidden", "intermediate", "cut", "transposed")
FORMATS: dict[str, tuple[type[PackedTensor], tuple[str, ...]]] = {  # the class, and its fields that are no arrays
    "NF4Tensor": (NF4Tensor, ("shape", "dtype", "quant_type", "blocksize", "nested_blocksize", "transposed")),
    "MXFP4Tensor": (MXFP4Tensor, ("dtype", "transposed")),
}


def add_peaks(
    layer: BenchLayer, cases: list[BenchCase], *, device: str, seed: int, rank: int, tell: Callable[[str], None]
) -> None:
    """Measures every row that was timed. Where that fails, the row gets the reason.

    Args:
        layer: without adapters.
        cases: its cases.
        device: where it is.
        seed: of inputs and adapters.
        rank: of adapters, in the cases that have them.
        tell: called with what is being done.
    """
    rows: dict[str, list[tuple[BenchCase, BenchRow]]] = {}
    for case in cases:
        for row in case.rows:
            if row.seconds and not row.interpreted:
                rows.setdefault(row.name, []).append((case, row))
    with tempfile.TemporaryDirectory() as folder:
        file, spec = Path(folder, "layer.safetensors"), Path(folder, "spec.json")
        described = _save(layer, file)
        for name, found in rows.items():
            tell(f"memory of {name}")
            keys = [(case.tokens, case.routing, case.direction) for case, _ in found]
            arguments = {"device": device, "seed": seed, "rank": rank, "ours": found[0][1].ours}
            spec.write_text(json.dumps(described | arguments | {"cases": keys}))
            peaks = _in_a_process(spec, name)
            for number, (_, row) in enumerate(found):
                if isinstance(peaks, str):
                    row.no_peak = peaks
                else:
                    row.peak = peaks[number]


def _in_a_process(spec: Path, name: str) -> list[int] | str:
    """The peaks, or why there are none."""
    peaks, reason = in_a_process("executors._bench.memory", str(spec), name)
    return reason or peaks


def main(spec_file: str, name: str) -> None:
    """Prints the peaks of all cases, in bytes, as the last line."""
    spec = json.loads(Path(spec_file).read_text())
    plain = _load(Path(spec_file).with_name("layer.safetensors"), spec)
    layers = {False: plain}
    peaks = []
    for tokens, routing, direction in spec["cases"]:
        adapted = direction == LORA
        if adapted and adapted not in layers:
            layers[adapted] = with_adapters(plain, spec["rank"], spec["seed"])
        peaks.append(_peak(layers[adapted], name, tokens, routing, direction, spec))
    print(json.dumps(peaks))


def _peak(layer: BenchLayer, name: str, tokens: int, routing: str, direction: str, spec: dict[str, Any]) -> int:
    device = spec["device"]
    given = batch(routing, tokens, judged_tokens(layer.shape), layer.shape, device, spec["seed"])
    everyone = contenders(layer, given, [name] if spec["ours"] else [])
    (own,) = (contender for contender in everyone if contender.name == name)
    assert own.call is not None
    action = action_of(own.call, given, direction)
    return peak_of(action, lambda: clear_gradients(layer, given), device)


def _save(layer: BenchLayer, file: Path) -> dict[str, Any]:
    """Writes all arrays, and returns everything else."""
    arrays: dict[str, Tensor] = {}
    packed: dict[str, Any] = {}
    for name, value in (layer.frozen | layer.parameters).items():
        if isinstance(value, PackedTensor):
            kind = type(value).__name__
            packed[name] = kind, {key: getattr(value, key) for key in FORMATS[kind][1]}
            arrays |= {f"{name}.{key}": array for key, array in value.arrays().items()}
        else:
            arrays[name] = value.detach()
    save_file({name: array.contiguous().cpu() for name, array in arrays.items()}, file)
    shape = layer.shape
    return {
        "layer": shape.name,
        "sizes": {key: getattr(shape, key) for key in SIZES},
        "form": asdict(layer.storage),
        "packed": packed,
        "trained": list(layer.parameters),
    }


def _load(file: Path, spec: dict[str, Any]) -> BenchLayer:
    arrays = {name: array.clone().to(spec["device"]) for name, array in load_file(file).items()}  # not mapped files
    frozen: dict[str, Tensor | PackedTensor] = {}
    for name, (kind, static) in spec["packed"].items():
        own: dict[str, Any] = {key: arrays.pop(key) for key in list(arrays) if key.startswith(f"{name}.")}
        parts = {key.removeprefix(f"{name}."): array for key, array in own.items()}
        static = {key: tuple(value) if key == "shape" else value for key, value in static.items()}
        frozen[name] = FORMATS[kind][0](**parts, **static)
    parameters = {name: torch.nn.Parameter(arrays.pop(name)) for name in spec["trained"]}
    shape = replace(LAYERS[spec["layer"]], **spec["sizes"])
    frozen.update(arrays)
    return BenchLayer(shape, parameters, frozen, Storage(**spec["form"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
