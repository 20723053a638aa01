"""JSON files of one form: those of expected failures and of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from executors._files.text import one_line, parse_json, read


def read_form(path: Path, form: str, refusal: type[ValueError]) -> dict[str, Any]:
    """The object in a file, whose ``format`` is ``form``.

    Raises:
        refusal: it is missing, no JSON, or of another format; in one line.
    """
    try:
        found = parse_json(read(path))
    except OSError as error:
        raise refusal(f"{path}: cannot be read, {error.strerror}: must be a file") from None
    except ValueError as error:
        raise refusal(f"{path}: {one_line(error)!r:.90}: must be JSON") from None
    if not isinstance(found, dict) or found.get("format") != form:
        said = found.get("format") if isinstance(found, dict) else found
        raise refusal(f"{path}: format={said!r:.60}: must be {form!r}")
    return found
