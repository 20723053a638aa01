"""Which commit a report names."""

import shutil
import subprocess
from pathlib import Path

import pytest

from executors._bench import report

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    person = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    done = subprocess.run(["git", *person, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the file that asks, in a repository that has committed something else."""
    place = tmp_path / Path(report.__file__).name
    (tmp_path / "other").write_text("other")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "--quiet", "--message", "other")
    shutil.copy(report.__file__, place)
    monkeypatch.setattr(report, "__file__", str(place))
    return tmp_path


def test_a_checkout_of_something_else_is_not_named(package: Path) -> None:
    assert report.commit() is None


def test_the_commit_is_named_and_marked_where_files_differ(package: Path) -> None:
    git(package, "add", ".")
    git(package, "commit", "--quiet", "--message", "the package")
    assert report.commit() == git(package, "rev-parse", "HEAD")
    (package / "other").write_text("changed")
    assert report.commit() == git(package, "rev-parse", "HEAD") + "+"
