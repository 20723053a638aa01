"""The pytest plugin: ``--executor NAME`` chooses the executor that the suite judges, ``--vectors DIR`` on what files.

It imports nothing before the option is used, so an installed moe-ref costs other test runs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from executors import Capabilities, Executor
    from moe_ref.conformance.vectors.reading import Folder

_JUDGED = pytest.StashKey[list[str]]()
_VECTORS = pytest.StashKey["Folder"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the suite's options."""
    group = parser.getgroup("moe-ref", "conformance of Mixture-of-Experts executors")
    group.addoption(
        "--executor",
        action="append",
        default=[],
        metavar="NAME",
        dest="moe_ref_executors",
        help="executor that the suite judges; repeatable (default: all usable ones that are not interpreted)",
    )
    group.addoption(
        "--executor-device",
        default="cpu",
        metavar="DEVICE",
        dest="moe_ref_device",
        help="device on which the suite judges (default: cpu)",
    )
    group.addoption(
        "--vectors",
        metavar="DIR",
        dest="moe_ref_vectors",
        help="folder of vectors on which moe_ref.conformance.vectors_suite judges",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Refuses unknown and unusable executors at the start; loads profile ``dev`` unless another is requested."""
    from_suite = config.getoption("--hypothesis-profile", default=None) in ("dev", "nightly")
    names = config.getoption("moe_ref_executors")
    if names or from_suite:
        load_profile(config)
    if names:
        _refuse_unusable(names, config.getoption("moe_ref_device"))
    if config.getoption("moe_ref_vectors"):
        config.stash[_VECTORS] = _folder(config.getoption("moe_ref_vectors"))


def _folder(path: str) -> Folder:
    from moe_ref.conformance.vectors.layout import BadVectors
    from moe_ref.conformance.vectors.reading import read_folder

    try:
        return read_folder(Path(path))
    except BadVectors as error:
        raise pytest.UsageError(f"--vectors {path}: {error}") from error


def _refuse_unusable(names: list[str], device: str) -> None:
    import torch

    import executors

    for name in names:
        try:
            executors.get(name)
        except (executors.UnknownExecutor, executors.Unavailable, ValueError) as error:
            raise pytest.UsageError(f"--executor {name}: {error}") from error
        devices = executors.get(name).capabilities.devices
        if devices and device.partition(":")[0] not in devices:
            allowed = " or ".join(sorted(devices))
            raise pytest.UsageError(f"--executor-device {device}: must be {allowed}, which {name} declares")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise pytest.UsageError(
            f"--executor-device {device}: must be a device that torch has here: {reason}"
        ) from error


def load_profile(config: pytest.Config) -> None:
    """Registers the suite's Hypothesis profiles, and loads ``dev`` unless --hypothesis-profile names another."""
    from hypothesis import settings

    from moe_ref.conformance import profiles

    profiles.register()
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("dev")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs every test that asks for ``executor`` once for each chosen executor."""
    if "executor" in metafunc.fixturenames and "conformance_device" in metafunc.fixturenames:
        chosen, device = (metafunc.config.getoption(f"moe_ref_{option}") for option in ("executors", "device"))
        names = chosen or _usable(device.partition(":")[0])
        metafunc.parametrize("executor", names, indirect=True, scope="session")
        metafunc.config.stash.setdefault(_JUDGED, names)
    if "vector" in metafunc.fixturenames and "vectors" in metafunc.fixturenames:
        if _VECTORS not in metafunc.config.stash:
            allowed = "must be given: a folder that python -m moe_ref.conformance vectors DIR has written"
            raise pytest.UsageError(f"--vectors: {allowed}")
        metafunc.parametrize("vector", metafunc.config.stash[_VECTORS].entries)


def _usable(device: str) -> list[str]:
    import executors

    able = {name: executors.get(name).capabilities for name in executors.available() if name != "auto"}
    return [name for name, has in able.items() if not has.interpreted and (not has.devices or device in has.devices)]


@pytest.fixture(scope="session")
def executor(request: pytest.FixtureRequest) -> Executor:
    """The executor under judgement."""
    import executors

    return executors.get(request.param)


@pytest.fixture(scope="session")
def conformance_device(request: pytest.FixtureRequest) -> str:
    """The device under judgement."""
    return str(request.config.getoption("moe_ref_device"))


@pytest.fixture(scope="session")
def vectors(request: pytest.FixtureRequest) -> Folder:
    """The folder of vectors."""
    return request.config.stash[_VECTORS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Lists what a judged executor declares not to offer, so that nobody reads too much into a pass."""
    names = config.getoption("moe_ref_executors") or config.stash.get(_JUDGED, [])
    if not names:
        return
    import executors

    lines: list[str] = []
    for name in names:
        capabilities = executors.get(name).capabilities
        lines += [f"{name}: {line}" for line in _undeclared(capabilities)]
    if lines:
        terminalreporter.section("conformance")
        for line in lines:
            terminalreporter.write_line(line)


def _undeclared(capabilities: Capabilities) -> list[str]:
    from executors._protocol import ACTIVATIONS
    from moe_ref.validation import FLOAT_DTYPES

    lines = []
    if capabilities.interpreted:
        lines.append("its kernels were interpreted, not run on a device")
    if not capabilities.routing:
        lines.append("routing is done elsewhere; clauses R1-R5 are not applicable")
    elif not capabilities.selection:
        lines.append("no selection bias and no groups; clause R3 and those parts of R2 are not applicable")
    if not capabilities.backward:
        lines.append("no backward pass; clauses D1-D5 are not applicable")
    missing_dtypes = [dtype for dtype in FLOAT_DTYPES if dtype not in capabilities.dtypes]
    if missing_dtypes:
        lines.append(f"not judged in {', '.join(missing_dtypes)}")
    if "dense" not in capabilities.weights:
        beside = "gradients of projections are judged beside one in 4 bits" if capabilities.mixed else ""
        lines.append(f"no dense weights; {beside or 'gradients of projections are not applicable'}")
    if len(capabilities.weights) > 1 and not capabilities.mixed:
        lines.append("two kinds of projections in one layer are not declared, and not judged")
    missing_formats = [name for name in ("nf4", "fp4", "mxfp4") if name not in capabilities.weights]
    if len(missing_formats) == 3:
        lines.append("no weights in 4 bits; clauses Q1-Q3, Q5 and M1 are not applicable")
    elif missing_formats[:2] == ["nf4", "fp4"]:
        lines.append("no nf4 and no fp4 weights; clauses Q1-Q3 and Q5 are not applicable")
    elif missing_formats:
        clauses = {"nf4": "that part of Q1 is", "fp4": "that part of Q1 is", "mxfp4": "clause M1 is"}
        lines += [f"no {name} weights; {clauses[name]} not applicable" for name in missing_formats]
    missing = sorted(ACTIVATIONS - capabilities.activations)
    if missing:
        lines.append(f"no {', '.join(missing)}; those parts of E1 are not applicable")
    if "swiglu" in capabilities.activations:
        if not capabilities.late_clamp:
            lines.append("no clamp after the activation; that part of E1 is not applicable")
        if not capabilities.softcap:
            lines.append("no softcaps; that part of E1 is not applicable")
    if not capabilities.post_expert_norm:
        lines.append("no norm after each expert; clause E8 is not applicable")
    if not capabilities.scale_input:
        lines.append("no scale_input; clause C3 is not applicable")
    if not capabilities.lora:
        lines.append("no adapters; clause E6 is not applicable")
    if not capabilities.batch_invariant:
        lines.append("batch invariance is not declared; clause C2 is not judged")
    return lines
