"""What the source distribution holds."""

import shutil
import tomllib
from pathlib import Path

import pytest

from executors import layer_file

ROOT = Path(__file__).parents[2]
OF_ITSELF = {"README.md", "LICENSE", "pyproject.toml"}  # hatchling adds them
FOLDERS_OF_PACKAGES = {"moe_ref", "executors"}
FOLDERS = FOLDERS_OF_PACKAGES | {"tests", "property_tests", "docs", "benchmarks", "examples", "data"}


def targets() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]


def test_everything_that_tests_and_pages_need_is_in_it() -> None:
    """All folders of the checkout, and the files beside them that set it up."""
    settings = targets()
    included = set(settings["sdist"]["include"])
    assert set(settings["wheel"]["packages"]) == FOLDERS_OF_PACKAGES
    assert included == FOLDERS | {"Makefile", "constraints.txt", "CHANGELOG.md"}
    assert all((ROOT / name).exists() for name in included | OF_ITSELF)


def test_the_bundled_layer_is_found_where_the_wheel_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place,) = (tmp_path / to for to in targets()["wheel"]["force-include"].values())
    source = ROOT / "executors/layer_file.py"
    monkeypatch.setattr(layer_file, "__file__", str(tmp_path / source.relative_to(ROOT)))
    with pytest.raises(layer_file.BadLayerFile):
        layer_file.bundled_layer()
    place.parent.mkdir(parents=True)
    shutil.copy(ROOT / "data" / layer_file.BUNDLED, place)
    assert layer_file.bundled_layer() == place


def test_the_bundled_layer_is_found_in_a_checkout() -> None:
    assert layer_file.bundled_layer() == ROOT / "data" / layer_file.BUNDLED
