"""What pip is asked for, for each package that has findings: install.sh and ``make findings`` install by this table.

Standard library only. ``python -m moe_ref_peers.needs CONSTRAINTS`` installs all of it beside what is there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from moe_ref_peers.interpreter import run

PATIENCE = 1800.0  # seconds for one call of pip
# The first word of a script's name, and what is installed: one call of pip for each text, and the package itself first.
# Two packages pin other versions of what all share (torch, fsspec): of what they ask for, only what the scripts and
# adapters need is installed.
NEEDS: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("bitsandbytes torch",),
    "jax": ("jax",),
    "kt": ("--no-deps kt-kernel==0.7.2", "torch gguf safetensors"),
    "liger": ("liger-kernel==0.8.5 transformers torch",),
    "peft": ("peft bitsandbytes accelerate torch",),
    "torch": ("torch",),
    "torchtitan": (
        "--no-deps torchtitan==0.3.0",
        "torch triton spmd_types==0.2.3 torchdata torch_checkpointing einops tyro",
    ),
    "transformers": ("transformers accelerate torch",),
}


class NotInIndexError(Exception):
    """The index has no such package, or none for this machine."""


class InstallError(Exception):
    """It cannot be installed for another reason."""


def package_of(script: Path) -> str:
    """The key of `NEEDS`: "kt" for kt_kernel_crashes.py."""
    return script.stem.partition("_")[0]


def distributions(package: str) -> list[str]:
    """What `NEEDS` names, without versions and options."""
    words = " ".join(NEEDS[package]).split()
    return [re.split("[=<>~!;[]", word)[0] for word in words if not word.startswith("-")]


def install(python: str, package: str, constraints: Path) -> None:
    """Installs a package and what it cannot do without.

    Args:
        python: the interpreter of the environment.
        package: a key of `NEEDS`.
        constraints: the file of versions.

    Raises:
        NotInIndexError: in one line, what the index lacks.
        InstallError: in one line, what pip said last, or that it took too long.
    """
    options = ("install", "--quiet", "--disable-pip-version-check", "--constraint", str(constraints.resolve()))
    for asked in NEEDS[package]:
        try:
            ran = run(python, ["-m", "pip", *options, *asked.split()], PATIENCE)
        except subprocess.TimeoutExpired:
            raise InstallError(f"pip was not done after {PATIENCE:.0f} s") from None
        if ran.returncode != 0:
            raise _reason(ran.stderr)


def _reason(log: str) -> Exception:
    """That pip found nothing, unless it could not reach the index; otherwise its last error."""
    if "Retrying (" not in log and (found := re.search(r"No matching distribution found for (\S+)", log)):
        return NotInIndexError(f"the index has no {found[1]} for this machine")
    errors = [line for line in log.splitlines() if line.startswith("ERROR")] or log.splitlines()
    return InstallError(errors[-1].strip() if errors else "pip failed, and said nothing")


def main() -> None:
    """Installs every package that can be had into this interpreter's environment, and says which cannot."""
    parser = argparse.ArgumentParser(prog="moe_ref_peers.needs", description="installs all packages that can be had")
    parser.add_argument("constraints", type=Path, help="file of versions")
    constraints = parser.parse_args().constraints
    for package in NEEDS:
        try:
            install(sys.executable, package, constraints)
        except (NotInIndexError, InstallError) as error:
            print(f"{package}: cannot be installed: {error}", flush=True)
        else:
            print(f"{package}: installed", flush=True)


if __name__ == "__main__":
    main()
