"""Reads a folder of vectors. What is not of the form is refused in one line: file, value, what is allowed."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_ref.conformance.vectors.folder import FORMAT, MANIFEST
from moe_ref.conformance.vectors.layout import BadVectors, Stored, from_bytes
from moe_ref.conformance.vectors.options import text
from moe_ref.conformance.vectors.vector import KINDS, Vector, vector_of

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
CLAUSE = re.compile(r"[A-Z][0-9]{1,2}")
LARGEST = 2**28  # bytes of a file


@dataclass(frozen=True, eq=False, repr=False)
class Folder:
    """A folder of vectors whose manifest is read. The files are read one by one.

    Attributes:
        path: the folder.
        specification: the version of the specification that gave the answers.
        entries: of the manifest, by the case's name.
    """

    path: Path
    specification: str
    entries: dict[str, dict[str, Any]]

    def __repr__(self) -> str:
        return f"read_folder({str(self.path)!r})"

    def arrays(self, name: str) -> dict[str, Stored]:
        """The arrays of a case.

        Raises:
            BadVectors: its file is missing, or not what the manifest says.
        """
        if name not in self.entries:
            raise BadVectors(f"{self.path / MANIFEST}: case {name!r:.60} is missing: must be one of its cases")
        entry, file = self.entries[name], f"{name}.mrv"
        data = _bytes(self.path / file)
        digest, said = hashlib.sha256(data).hexdigest(), entry["files"][file]["sha256"]
        if digest != said:
            raise BadVectors(f"{self.path / file}: sha256 is {digest}: must be {said}, which the manifest says")
        arrays = from_bytes(str(self.path / file), data)
        found = {key: {"dtype": value.dtype, "shape": list(value.shape)} for key, value in arrays.items()}
        if found != entry["arrays"]:
            names = sorted(
                key for key in found.keys() | entry["arrays"].keys() if found.get(key) != entry["arrays"].get(key)
            )
            raise BadVectors(
                f"{self.path / file}: {names[0]!r:.60} is not as in {MANIFEST}: must have its dtype and shape"
            )
        for key, expected in (("name", name), ("kind", entry["kind"]), ("clauses", " ".join(entry["clauses"]))):
            if (actual := text(file, arrays, f"case.{key}")) != expected:
                raise BadVectors(
                    f"{self.path / file}: case.{key}={actual!r:.60}: must be {expected!r}, as in {MANIFEST}"
                )
        return arrays

    def vector(self, name: str) -> Vector:
        """A case, ready to be judged.

        Raises:
            BadVectors: its file is not of the form.
        """
        return vector_of(str(self.path / f"{name}.mrv"), self.arrays(name))


def read_folder(path: Path | str) -> Folder:
    """Reads the manifest of a folder.

    Raises:
        BadVectors: it is missing, or not of the form.
    """
    path = Path(path)
    file = path / MANIFEST
    try:
        found = json.loads(_bytes(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadVectors):
            raise
        raise BadVectors(f"{file}: {' '.join(str(error).split())!r:.90}: must be JSON") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        said = found.get("format") if isinstance(found, dict) else found
        raise BadVectors(f"{file}: format={said!r:.60}: must be {FORMAT!r}")
    cases, specification = found.get("cases"), found.get("specification")
    if not isinstance(cases, list) or not isinstance(specification, str):
        raise BadVectors(f"{file}: cases, specification: must be a list and a text")
    entries: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(cases):
        wrong = _wrong(entry)
        if wrong or entry["name"] in entries:
            raise BadVectors(f"{file}: cases[{number}]: {wrong or 'name is there twice: must be there once'}")
        entries[entry["name"]] = entry
    return Folder(path, specification, entries)


def _wrong(entry: Any) -> str:
    """What is wrong with a case of the manifest, and what is allowed, or ""."""
    if not isinstance(entry, dict):
        return f"{entry!r:.60}: must be an object"
    name, kind, clauses = (entry.get(key) for key in ("name", "kind", "clauses"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return f"name={name!r:.60}: must be small letters, digits, - and _"
    if kind not in KINDS:
        return f"kind={kind!r:.60}: must be one of {', '.join(KINDS)}"
    if not isinstance(clauses, list) or not all(isinstance(c, str) and CLAUSE.fullmatch(c) for c in clauses):
        return f"clauses={clauses!r:.60}: must be a list of clauses, such as R2"
    files, arrays = entry.get("files"), entry.get("arrays")
    own = files.get(f"{name}.mrv") if isinstance(files, dict) else None
    if not isinstance(own, dict) or not isinstance(own.get("sha256"), str) or not isinstance(arrays, dict):
        return f"files, arrays: must be objects, with the sha256 of {name}.mrv"
    return ""


def _bytes(file: Path) -> bytes:
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BadVectors(f"{file}: is a folder, a pipe or a device: must be a file")
        if found.st_size > LARGEST:
            raise BadVectors(f"{file}: has {found.st_size} bytes: must have at most {LARGEST}")
        return file.read_bytes()
    except FileNotFoundError:
        raise BadVectors(f"{file}: must be a file that exists") from None
    except OSError as error:
        raise BadVectors(f"{file}: cannot be read, {error.strerror}: must be a file") from None
