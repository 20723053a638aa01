"""Findings with their package alone: what is installed, what comes of it, and what is stored. No test installs."""

import importlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "examples" / "peers"
SCRIPTS = sorted((PEERS / "findings").glob("*.py"))
PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
# An interpreter: its pip says what it is told to, and its environment holds what it is told to.
FAKE = """
import json, os, sys
own = json.load(open({file!r}))
if sys.argv[1:3] == ["-m", "pip"]:
    said = own["pip"].get(sys.argv[-1], "")
    print(said, file=sys.stderr)
    sys.exit(1 if said else 0)
if sys.argv[1] == "-c":
    print(json.dumps(own["present"]))
else:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
PRINTS = "print('jax 1: two rows')\nprint('observed: NaN')\nprint('right: 0')\nraise SystemExit({code})\n"


@pytest.fixture(autouse=True)
def peers() -> Iterator[None]:
    """As if it were installed."""
    sys.path.insert(0, str(PEERS))
    yield
    sys.path.remove(str(PEERS))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"moe_ref_peers.{name}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of scripts, whose environments have a fake interpreter with jax and torch."""
    own = tmp_path / "findings"
    own.mkdir()
    alone = module("alone")
    monkeypatch.setattr(alone, "SCRIPTS", own)
    monkeypatch.setattr(alone, "fresh", lambda environment: fake(environment, tmp_path / "told.json"))
    monkeypatch.setattr(alone.signal, "signal", lambda *_: None)
    told(tmp_path)
    return own


def stored() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "peers" / "findings-alone.json").read_text(encoding="utf-8"))


def told(tmp_path: Path, **pip: str) -> None:
    """What pip says when the last thing it is asked for begins so; without it, it installs."""
    content = {"pip": pip, "present": {"Jax": "1", "torch": "2", "kt_kernel": "3", "gguf": "4", "safetensors": "5"}}
    (tmp_path / "told.json").write_text(json.dumps(content))


def fake(environment: Path, file: Path) -> str:
    program, python = environment / "fake.py", environment / "python"
    program.write_text(FAKE.format(file=str(file)))
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(program))} "$@"\n')
    python.chmod(0o755)
    return str(python)


def ran(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What it ends with, or "", and its file."""
    monkeypatch.setattr(sys, "argv", ["alone", "--out", str(out), *arguments])
    try:
        module("alone").main()
    except SystemExit as ended:
        return str(ended.code), json.loads(out.read_text())
    return "", json.loads(out.read_text())


def test_every_script_has_a_package_and_every_package_a_script() -> None:
    needs = module("needs")
    assert {needs.package_of(script) for script in SCRIPTS} == needs.NEEDS.keys()


def test_the_first_that_is_installed_is_the_package_itself() -> None:
    needs = module("needs")
    assert all(needs.distributions(package)[0].partition("-")[0] == package for package in needs.NEEDS)
    assert needs.distributions("kt") == ["kt-kernel", "torch", "gguf", "safetensors"]


def test_what_installs_peers_has_no_list_of_its_own() -> None:
    text = (PEERS / "install.sh").read_text(encoding="utf-8")
    assert "moe_ref_peers.needs" in text
    assert not [name for name in ("jax", "kt-kernel", "liger", "peft", "torchtitan") if name in text.lower()]


def test_all_that_can_be_had_is_installed_beside_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = module("needs")
    told(tmp_path, **{"kt-kernel==0.7.2": "ERROR: No matching distribution found for kt-kernel==0.7.2"})
    monkeypatch.setattr(sys, "executable", fake(tmp_path, tmp_path / "told.json"))
    monkeypatch.setattr(sys, "argv", ["needs", "constraints.txt"])
    needs.main()
    lines = [f"{package}: installed" for package in needs.NEEDS if package != "kt"]
    lines.insert(2, "kt: cannot be installed: the index has no kt-kernel==0.7.2 for this machine")
    assert capsys.readouterr().out.splitlines() == lines


def test_a_finding_is_reproduced_and_its_environment_removed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module("alone").tempfile, "tempdir", str(tmp_path / "environments"))
    (tmp_path / "environments").mkdir()
    (folder / "jax_nan.py").write_text(PRINTS.format(code=0))
    said, results = ran(monkeypatch, tmp_path / "new" / "found.json", "--only", "jax")
    assert said == ""
    own = results["packages"]["jax"]
    assert own["findings"] == {
        "jax_nan": {"state": "reproduced", "says": ["jax 1: two rows", "observed: NaN", "right: 0"]}
    }
    assert own["distributions"] == {"gguf": "4", "jax": "1", "kt-kernel": "3", "safetensors": "5", "torch": "2"}
    assert list((tmp_path / "environments").iterdir()) == []
    assert "| `jax` | jax 1, gguf 4, kt-kernel 3, safetensors 5, torch 2 | 0 | 1 of 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "state", "says"),
    [
        (PRINTS.format(code=1), "gone", "right: 0"),
        ("import sys; sys.exit('no such module')", "does not run", "no such module"),
        ("print('observed: 1'); import nothing", "does not run", "ModuleNotFoundError: No module named 'nothing'"),
    ],
)
def test_what_is_not_reproduced_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, state: str, says: str
) -> None:
    (folder / "jax_nan.py").write_text(script)
    said, results = ran(monkeypatch, tmp_path / "found.json", "--only", "jax")
    assert results["packages"]["jax"]["findings"]["jax_nan"]["state"] == state
    assert said == f"jax_nan: {state}: {says}"


def test_what_is_not_installed_is_asked_of_the_other_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "peft_wrong.py").write_text(PRINTS.format(code=0))  # here it is installed
    said, _ = ran(monkeypatch, tmp_path / "found.json", "--only", "peft")
    assert said == "peft_wrong: not installed: peft is not installed"


def test_nothing_of_this_environment_leads_to_other_packages(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = "import os, sys\nprint('observed', os.environ.get('PYTHONPATH'), os.listdir('.'))\nprint('right')\n"
    (folder / "jax_nan.py").write_text(script)
    _, results = ran(monkeypatch, tmp_path / "found.json", "--only", "jax")
    assert results["packages"]["jax"]["findings"]["jax_nan"]["says"] == ["observed None []", "right"]


LACKS = "ERROR: No matching distribution found for jax"


def test_a_package_that_the_index_lacks_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("jax_nan.py", "torch_nan.py"):
        (folder / name).write_text(PRINTS.format(code=0))
    told(tmp_path, jax=LACKS)
    out = tmp_path / "found.json"
    assert ran(monkeypatch, out, "--only", "jax")[0] == "jax: the index has no jax for this machine"  # nothing was run
    said, results = ran(monkeypatch, out, "--only", "jax", "torch")
    assert said == ""
    assert results["packages"]["jax"]["unavailable"] == "the index has no jax for this machine"


@pytest.mark.parametrize(
    ("log", "says"),
    [
        (f"WARNING: Retrying (Retry(total=4)) after connection broken\n{LACKS}", LACKS),
        ("ERROR: Could not install packages: No space left on device\nhint", "ERROR: Could not install packages: No "),
        ("Killed", "Killed"),
    ],
)
def test_a_package_that_cannot_be_installed_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str, says: str
) -> None:
    for name in ("jax_nan.py", "torch_nan.py"):
        (folder / name).write_text(PRINTS.format(code=0))
    told(tmp_path, jax=log)
    said, results = ran(monkeypatch, tmp_path / "found.json", "--only", "jax", "torch")
    assert said.startswith(f"jax: {says}")
    assert results["packages"]["torch"]["findings"]["torch_nan"]["state"] == "reproduced"


def test_others_are_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jax_nan.py", "torch_nan.py"):
        (folder / name).write_text(PRINTS.format(code=0))
    out = tmp_path / "found.json"
    for package in ("torch", "jax"):
        said, results = ran(monkeypatch, out, "--only", package, "--keep")
        assert said == ""
    assert list(results["packages"]) == ["jax", "torch"]
    assert ran(monkeypatch, out, "--only", "jax")[1]["packages"].keys() == {"jax"}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"packages": 3}'])
def test_a_file_of_something_else_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    out = tmp_path / "found.json"
    out.write_text(content)
    monkeypatch.setattr(sys, "argv", ["alone", "--out", str(out), "--only", "jax", "--keep"])
    with pytest.raises(SystemExit, match=r"found\.json: must be what this program wrote; without --keep "):
        module("alone").main()
    assert out.read_text() == content


def test_an_environment_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(module("needs").InstallError, match="no environment can be made: "):
        module("alone").fresh(tmp_path / "file")


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """The child would make a file."""
    child = f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(subprocess.TimeoutExpired):
        module("interpreter").run(sys.executable, ["-c", program], 1.0)
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_an_interpreter_that_says_nothing_is_refused() -> None:
    interpreter = module("interpreter")
    with pytest.raises(interpreter.UnusableError, match=r"^true: does not say what is installed: JSONDecodeError$"):
        interpreter.installed("true")


def test_make_calls_it() -> None:
    command = ["make", "--dry-run", "findings", "ONLY=peft kt", "PYTHON=py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "py -m moe_ref_peers.alone --out peers-results/findings.json" in done.stdout
    assert "--only peft kt --keep" in done.stdout


def test_it_needs_the_standard_library_alone() -> None:
    program = f"import sys; sys.path.insert(0, {str(PEERS)!r}); import moe_ref_peers.alone"
    subprocess.run([sys.executable, "-S", "-I", "-c", program], check=True)


def test_the_stored_results_have_every_finding_with_its_package_alone() -> None:
    packages = stored()["packages"]
    assert packages.keys() == module("needs").NEEDS.keys()
    findings = {name: told["state"] for own in packages.values() for name, told in own["findings"].items()}
    assert findings == {script.stem: "reproduced" for script in SCRIPTS}
    for package, own in packages.items():
        assert "moe-ref" not in own["distributions"], package
        assert all(
            said.startswith(("observed", "right")) for told in own["findings"].values() for said in told["says"][1:]
        )


def test_the_page_has_the_table_and_the_versions_of_the_stored_results() -> None:
    results = stored()
    assert module("alone").table(results) in PAGE
    versions = {name: value for own in results["packages"].values() for name, value in own["distributions"].items()}
    told = re.findall(r"^## ([\w-]+) ([\d.]+)", PAGE, flags=re.MULTILINE)
    assert len(told) == len(results["packages"])
    assert all(versions[name.lower()].partition("+")[0] == value for name, value in told)
