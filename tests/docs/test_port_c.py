"""The port in C reads vectors, passes them, and fails where it is broken; the page's reader compiles."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moe_ref.conformance.vectors.cases import every_case
from moe_ref.conformance.vectors.folder import write_vectors

ROOT = Path(__file__).parents[2]
PORT = ROOT / "examples" / "port_c"
pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler named cc")
MAIN = """
int main(int count, char **paths) {
    struct file file;
    struct entry *entry;
    if (count < 2 || !load(&file, paths[1])) return 1;
    const double *y = find(&file, "out.y", &entry);
    printf("%d %d %.17g\\n", (int)entry->rank, (int)entry->dim[1], y[0]);
    free(file.data);
    return 0;
}
"""


def chosen() -> list[str]:
    """The first case of each clause, and of each kind."""
    found: dict[str, str] = {}
    for name, case in every_case().items():
        for key in (*case.clauses, case.content.kind):
            found.setdefault(key, name)
    return [*dict.fromkeys(found.values())]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("port") / "v"
    write_vectors(path, {name: every_case()[name] for name in chosen()})
    return path


def make(out: Path, directory: Path, source: Path = PORT, **options: str) -> subprocess.CompletedProcess[str]:
    given = [f"{name}={value}" for name, value in {"OUT": str(out), "DIR": str(directory), **options}.items()]
    return subprocess.run(["make", "-C", str(source), "test", *given], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("built")


def test_it_passes_with_sanitizers(vectors: Path, built: Path) -> None:
    ran = make(built, vectors, SANITIZE="1", CFLAGS="-O1 -Wall -Wextra -Werror")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"\n{len(chosen())} passed, 0 failed\n" in ran.stdout
    clauses = re.findall(r"^([A-Z][0-9]) +[0-9]+ passed, 0 failed$", ran.stdout, flags=re.MULTILINE)
    assert set(clauses) == {clause for case in every_case().values() for clause in case.clauses}


@pytest.mark.parametrize("spoil", [lambda data: data[:-8], lambda data: data[:100], lambda data: b""])
def test_a_truncated_file_is_refused(vectors: Path, built: Path, tmp_path: Path, spoil) -> None:
    make(built, vectors, SANITIZE="1", CFLAGS="-O1 -Wall -Wextra -Werror")
    (tmp_path / "short.mrv").write_bytes(spoil((vectors / "ties-softmax.mrv").read_bytes()))
    ran = subprocess.run(
        [built / "check-sanitized", tmp_path / "short.mrv"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (1, "")
    assert ran.stdout == f"FAILED {tmp_path}/short.mrv: is no file of vectors\n0 passed, 1 failed\n"


BROKEN = {  # by file: what to put for what, and a clause that must fail
    "ties": ("routing.c", "keys[i] > keys[best]", "keys[i] >= keys[best]", "R2"),
    "empty slots": ("experts.c", "ids[slot] < 0 || ", "(int)ids[slot] < 0 || (int)", "R7"),
    "nibbles": ("fourbits.c", "(i % 2 ? 0 : 4)", "(i % 2 ? 4 : 0)", "Q4"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_port_fails(vectors: Path, tmp_path: Path, what: str) -> None:
    file, right, wrong, clause = BROKEN[what]
    source = Path(shutil.copytree(PORT, tmp_path / "port", ignore=shutil.ignore_patterns("build")))
    text = (source / file).read_text()
    assert right in text
    (source / file).write_text(text.replace(right, wrong))
    ran = make(tmp_path / "out", vectors, source)
    assert ran.returncode != 0
    assert re.search(rf"^{clause} .* [1-9][0-9]* failed$", ran.stdout, flags=re.MULTILINE), ran.stdout


@pytest.mark.nightly
def test_it_passes_all_vectors(tmp_path: Path) -> None:
    write_vectors(tmp_path / "all", every_case())
    for options in ({}, {"SANITIZE": "1"}):
        ran = make(tmp_path / "out", tmp_path / "all", **options)
        assert f"\n{len(every_case())} passed, 0 failed\n" in ran.stdout, ran.stdout + ran.stderr
    assert f"`{len(every_case())} passed, 0 failed`" in (PORT / "README.md").read_text()


def test_the_reader_on_the_page_reads(vectors: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```c\n(.*?)```", (ROOT / "docs" / "vectors.md").read_text(), flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 36
    (tmp_path / "reader.c").write_text(code + MAIN)
    strict = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1"]
    subprocess.run(["cc", *strict, "reader.c", "-o", "reader"], cwd=tmp_path, check=True)
    ran = subprocess.run(
        [tmp_path / "reader", vectors / "ties-softmax.mrv"], capture_output=True, text=True, check=True
    )
    content = every_case()["ties-softmax"].content
    exact = content.floats()["out.y"].array
    assert ran.stdout.split() == ["2", "8", f"{exact[0, 0]:.17g}"]
