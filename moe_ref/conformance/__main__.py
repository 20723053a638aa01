"""``python -m moe_ref.conformance``: writes test vectors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_ref.conformance", description="Test vectors of the specification."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    writing = commands.add_parser(
        "vectors",
        help="write cases of every clause with their answers",
        description="Writes cases of every clause with their answers, each in a form that a C program reads in 30 "
        "lines and in safetensors, and a manifest. docs/vectors.md says the form to the byte. It takes seconds.",
    )
    writing.add_argument(
        "directory", type=Path, nargs="?", metavar="DIR", help="folder to write; must not exist, or be empty"
    )
    writing.add_argument("--archive", type=Path, metavar="FILE", help="write the folder to this .tar.gz too")
    writing.add_argument("--only", nargs="+", metavar="NAME", help="cases to write (default: all)")
    writing.add_argument("--list", action="store_true", help="print the cases and write nothing")
    given = parser.parse_args(arguments)
    if given.directory is None and not given.list:
        writing.error("DIR must be given, or --list")
    return _vectors(given.directory, given.archive, given.only, given.list)


def _vectors(directory: Path | None, archive: Path | None, only: list[str] | None, listing: bool) -> int:
    from moe_ref.conformance.vectors.archive import write_archive
    from moe_ref.conformance.vectors.cases import every_case
    from moe_ref.conformance.vectors.folder import write_vectors
    from moe_ref.conformance.vectors.layout import BadVectors

    cases = every_case()
    unknown = [name for name in only or () if name not in cases]
    if unknown:
        print(f"--only {unknown[0]}: must be one of the names that --list prints", file=sys.stderr)
        return 2
    cases = {name: cases[name] for name in only or cases}
    if listing or directory is None:
        for case in cases.values():
            print(f"{case.name:36} {case.content.kind:9} {' '.join(case.clauses):9} {case.says}")
        return 0

    if archive is not None and not archive.resolve().parent.is_dir():
        print(f"--archive {archive}: must lie in a folder that exists", file=sys.stderr)
        return 2

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} cases", end="\n" if done == total else "", file=sys.stderr, flush=True)

    try:
        manifest = write_vectors(directory, cases, progress)
        if archive is not None:
            write_archive(directory, archive)
    except BadVectors as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or directory}: cannot be written, {error.strerror}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{directory}: {len(cases)} cases of {len(manifest['clauses'])} clauses, {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
