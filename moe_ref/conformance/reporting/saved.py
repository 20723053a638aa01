"""A failing case as a folder of one vector (docs/vectors.md), which any language reads."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from moe_ref.conformance.judgement.checks import ConformanceError, labels
from moe_ref.conformance.vectors.cases.case import of
from moe_ref.conformance.vectors.folder import write_vectors
from moe_ref.conformance.vectors.judging import check_vector
from moe_ref.conformance.vectors.layers import Layer
from moe_ref.conformance.vectors.reading import read_folder

if TYPE_CHECKING:
    from executors import Executor

CLAUSE = re.compile(r"[A-Z]\d")


def save_failure(directory: Path, error: ConformanceError, test: str) -> Path:
    """Writes the problem of a failure, its numbers and all right answers.

    Args:
        directory: gets a folder for each test; one of an earlier run is replaced.
        error: the failure.
        test: the test's name.

    Returns:
        The folder.

    Raises:
        OSError: it cannot be written.
    """
    name = re.sub(r"[^a-z0-9]+", "-", test.lower().removeprefix("test_")).strip("-")[:64].strip("-")
    clauses = " ".join(filter(CLAUSE.fullmatch, labels(error.faults[0].clause)))
    case = of(name, clauses, str(error).splitlines()[0], Layer(error.problem, error.arrays))
    folder, temporary = directory / name, directory / f".{name}.{os.getpid()}.tmp"
    try:
        write_vectors(temporary, {name: case})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def check_saved(executor: Executor, folder: Path | str, device: str = "cpu") -> None:
    """Judges an executor on a folder that `save_failure` has written.

    Raises:
        ConformanceError: it fails there.
        BadVectors: the folder is not of the form.
    """
    found = read_folder(Path(folder))
    for name in found.entries:
        check_vector(executor, found, name, device)
