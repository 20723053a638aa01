"""What the source distribution holds."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
OF_ITSELF = {"README.md", "LICENSE", "pyproject.toml"}  # hatchling adds them
FOLDERS_OF_PACKAGES = {"moe_ref", "executors"}
FOLDERS = FOLDERS_OF_PACKAGES | {"tests", "property_tests", "docs", "benchmarks", "examples", "data"}


def test_everything_that_tests_and_pages_need_is_in_it() -> None:
    """All folders of the checkout, and the files beside them that set it up."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    included = set(settings["sdist"]["include"])
    assert set(settings["wheel"]["packages"]) == FOLDERS_OF_PACKAGES
    assert included == FOLDERS | {"Makefile", "constraints.txt", "CHANGELOG.md"}
    assert all((ROOT / name).exists() for name in included | OF_ITSELF)
