"""A page's commands, run by a shell to the letter, as a reader who pastes one block after the other."""

import os
import subprocess
import sys
from pathlib import Path

from adding import ROOT

ENVIRONMENT = 'export PATH="{0}:$PATH"\n'
PREAMBLE = (
    'cd "$(cat {0}/cwd)"; . {0}/exported; make() {{ test "$*" = install; }}\n'  # the environment is there already
)
CLOSING = "\nstatus=$?; pwd > {0}/cwd; export -p > {0}/exported; exit $status"


class Session:
    """A terminal in a checkout: what has an effect on pytest there, and the environment that `make install` makes.

    Args:
        folder: empty; gets the checkout, and what the commands write beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.own, checkout = folder / "session", folder / "moe-ref"
        for place in (self.own, checkout / ".venv" / "bin"):
            place.mkdir(parents=True)
        checkout.joinpath("pyproject.toml").write_bytes(ROOT.joinpath("pyproject.toml").read_bytes())
        checkout.joinpath(".venv", "bin", "activate").write_text(ENVIRONMENT.format(Path(sys.executable).parent))
        self.own.joinpath("cwd").write_text(str(checkout))
        self.own.joinpath("exported").write_text("")

    @property
    def cwd(self) -> Path:
        """Where the last block ended."""
        return Path((self.own / "cwd").read_text().strip())

    def run(self, block: str) -> subprocess.CompletedProcess[str]:
        """Runs the lines of a block; a folder that they change to, and what they export, holds for the next."""
        lines = PREAMBLE.format(self.own) + block.strip() + CLOSING.format(self.own)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        command = ["bash", "-c", lines]
        return subprocess.run(command, env=kept | {"COLUMNS": "120"}, capture_output=True, text=True, check=False)
