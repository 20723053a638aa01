"""``python -m executors list | explain | compare | extract | bench | crossover | kernels | plan | tune | report``."""

import sys


def main() -> None:
    """Runs the command line, or says in one line which package it needs."""
    try:
        from executors._cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("executors", "moe_ref"):
            raise
        sys.exit(f'the command line needs {error.name}: pip install "moe-ref[all]"')
    app(prog_name="python -m executors")


if __name__ == "__main__":
    main()
