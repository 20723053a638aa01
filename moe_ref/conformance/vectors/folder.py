"""Writes a folder of vectors: a manifest, and two files for each case. All of it appears at once, or nothing does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import moe_ref
from moe_ref.conformance.vectors.cases import Case
from moe_ref.conformance.vectors.layout import BadVectors, Stored, stored_text, to_bytes
from moe_ref.conformance.vectors.options import config_of
from moe_ref.conformance.vectors.tensors import to_safetensors

FORMAT = "moe-ref vectors 1"
MANIFEST = "manifest.json"
SUFFIXES = (".mrv", ".safetensors")


def arrays_of(case: Case) -> dict[str, Stored]:
    """Everything that a case's file holds; configurations and answers after what goes in."""
    words = {"name": case.name, "kind": case.content.kind, "clauses": " ".join(case.clauses)}
    heads = {f"case.{word}": stored_text(value) for word, value in words.items()}
    return heads | case.content.inputs() | case.content.answers()


def write_vectors(
    directory: Path, cases: Mapping[str, Case], progress: Callable[[int, int], object] = lambda done, total: None
) -> dict[str, Any]:
    """Writes the files, and then gives the folder its name.

    Args:
        directory: must not exist, or be empty.
        cases: by name.
        progress: called with (cases done, cases in all).

    Returns:
        The manifest.

    Raises:
        BadVectors: there is something in the folder, or in its place.
        OSError: it cannot be written.
    """
    _check_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        entries = []
        for number, case in enumerate(cases.values()):
            entries.append(_write_case(temporary, case))
            progress(number + 1, len(cases))
        manifest = manifest_of(entries)
        (temporary / MANIFEST).write_text(_lines(manifest), encoding="ascii")
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _check_free(directory: Path) -> None:
    if directory.is_dir() and any(directory.iterdir()):
        raise BadVectors(f"{directory}: has files in it: must be empty, or not be there")
    if directory.exists() and not directory.is_dir():
        raise BadVectors(f"{directory}: is a file: must be a folder, or not be there")


def _write_case(directory: Path, case: Case) -> dict[str, Any]:
    arrays = arrays_of(case)
    entry: dict[str, Any] = {
        "name": case.name,
        "kind": case.content.kind,
        "clauses": list(case.clauses),
        "says": case.says,
    }
    if "config.top_k" in arrays:
        entry["config"] = asdict(config_of(case.name, arrays, checked=False))
    shapes = {name: {"dtype": value.dtype, "shape": list(value.shape)} for name, value in arrays.items()}
    entry["files"] = {}
    for suffix, data in zip(SUFFIXES, (to_bytes(arrays), to_safetensors(arrays, entry | {"files": {}})), strict=True):
        (directory / f"{case.name}{suffix}").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entry["files"][f"{case.name}{suffix}"] = {"sha256": digest, "bytes": len(data)}
    return entry | {"arrays": shapes}


def manifest_of(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of some cases."""
    clauses: dict[str, list[str]] = {}
    for entry in entries:
        for clause in entry["clauses"]:
            clauses.setdefault(clause, []).append(entry["name"])
    return {"format": FORMAT, "specification": moe_ref.__version__, "clauses": clauses, "cases": entries}


def _lines(manifest: dict[str, Any]) -> str:
    """The manifest in JSON, with a line for each case."""
    head = {key: value for key, value in manifest.items() if key != "cases"}
    cases = ",\n".join(json.dumps(entry) for entry in manifest["cases"])
    return f'{json.dumps(head)[:-1]},\n"cases": [\n{cases}\n]}}\n'
