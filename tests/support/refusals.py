"""Commands that must refuse their arguments."""

from collections.abc import Callable, Sequence
from pathlib import Path

from typer.testing import Result


def demand_one_line(command: Callable[..., Result], out: Path, cases: Sequence[tuple[tuple[object, ...], str]]) -> None:
    """Each of the arguments ends the command with status 2 and one line that has the message."""
    for arguments, message in cases:
        result = command(out, *arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
