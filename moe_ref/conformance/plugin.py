"""The pytest plugin: ``--executor NAME`` chooses the executor that the suite judges, ``--vectors DIR`` on what files.

It imports nothing before an option is used or the suite runs, so an installed moe-ref costs other test runs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from moe_ref.conformance.reporting.order import cheap_first
from moe_ref.conformance.reporting.reporter import EXPECTED, JUDGED, VECTORS, Reporter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from executors import Capabilities, Executor
    from moe_ref.conformance.parallel.cluster import Cluster
    from moe_ref.conformance.reporting.expected import Expected
    from moe_ref.conformance.reporting.judge import Judge
    from moe_ref.conformance.vectors.reading import Folder


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
    group.addoption(
        "--ranks",
        type=int,
        default=4,
        metavar="N",
        dest="moe_ref_ranks",
        help="processes among which moe_ref.conformance.parallel_suite spreads experts (default: 4)",
    )
    group.addoption(
        "--expected-failures",
        metavar="FILE",
        dest="moe_ref_expected",
        help="JSON file of failures by clause that are known and do not fail the run; one that holds fails it",
    )
    group.addoption(
        "--isolate",
        action="store_true",
        dest="moe_ref_isolate",
        help="judge in another process: one that crashes or hangs is a failed test with its problem, and is replaced",
    )
    group.addoption(
        "--isolate-limit",
        type=float,
        default=600.0,
        metavar="SECONDS",
        dest="moe_ref_isolate_limit",
        help="with --isolate, time after which one problem counts as hanging (default: 600)",
    )
    group.addoption(
        "--save-failure",
        metavar="DIR",
        dest="moe_ref_saved",
        help="write each failing case as a vector, into a folder of its own in DIR",
    )
    group.addoption(
        "--results",
        metavar="FILE",
        dest="moe_ref_results",
        help="write results by clause to this JSON file, for programs",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Refuses unknown and unusable executors at the start; loads profile ``dev`` unless another is requested."""
    from_suite = config.getoption("--hypothesis-profile", default=None) in ("quick", "dev", "nightly")
    names = config.getoption("moe_ref_executors")
    if names or from_suite:
        load_profile(config)
    _refuse_unknown_profile(config.getoption("--hypothesis-profile", default=None))
    if names:
        _refuse_unusable(names, config.getoption("moe_ref_device"))
    if config.getoption("moe_ref_vectors"):
        config.stash[VECTORS] = _folder(config.getoption("moe_ref_vectors"))
    if (ranks := config.getoption("moe_ref_ranks")) < 1:
        raise pytest.UsageError(f"--ranks {ranks}: must be at least 1")
    results = config.getoption("moe_ref_results")
    if results and not Path(results).parent.is_dir():
        raise pytest.UsageError(f"--results {results}: must be in a folder that exists")
    config.stash[EXPECTED] = _expected(config.getoption("moe_ref_expected"))
    config.pluginmanager.register(Reporter(config), "moe-ref reporter")
    if config.getoption("moe_ref_isolate") and not hasattr(config, "workerinput"):
        _isolate(config)


def _isolate(config: pytest.Config) -> None:
    from moe_ref.conformance.isolation.protocol import Isolation, refusal

    if reason := refusal(config):
        raise pytest.UsageError(reason)
    config.pluginmanager.register(Isolation(config, config.getoption("moe_ref_isolate_limit")), "moe-ref isolation")


def _folder(path: str) -> Folder:
    from moe_ref.conformance.vectors.layout import BadVectors
    from moe_ref.conformance.vectors.reading import read_folder

    try:
        return read_folder(Path(path))
    except BadVectors as error:
        raise pytest.UsageError(f"--vectors {path}: {error}") from error


def _expected(path: str | None) -> tuple[Expected, ...]:
    if path is None:
        return ()
    from moe_ref.conformance.reporting.expected import BadExpectationsError, read_expected

    try:
        return read_expected(Path(path))
    except BadExpectationsError as error:
        raise pytest.UsageError(f"--expected-failures {error}") from error


def _refuse_unusable(names: list[str], device: str) -> None:
    import torch

    for name in names:
        devices = _able(name).devices
        if unknown := [own for own in sorted(devices) if not _is_device(own)]:
            raise pytest.UsageError(f"--executor {name}: its devices have {unknown[0]!r}: must be types that torch has")
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


def _able(name: str) -> Capabilities:
    """What an executor declares; refuses one that cannot be had, or declares nothing."""
    import executors

    try:
        able = getattr(executors.get(name), "capabilities", None)
    except (executors.UnknownExecutor, executors.Unavailable, ValueError, TypeError) as error:
        raise pytest.UsageError(f"--executor {name}: {' '.join(str(error).split())}") from error
    if not isinstance(able, executors.Capabilities):
        found = f"its capabilities are of type {type(able).__name__}"
        raise pytest.UsageError(f"--executor {name}: {found}, but must be executors.Capabilities")
    return able


def _is_device(kind: str) -> bool:
    import torch

    try:
        torch.device(kind)
    except RuntimeError:
        return False
    return True


def _refuse_unknown_profile(name: str | None) -> None:
    """Hypothesis' own plugin would end in a traceback."""
    if name is None:
        return
    from hypothesis import errors, settings

    try:
        settings.get_profile(name)
    except errors.InvalidArgument as error:
        from moe_ref.conformance.profiles import PROFILES

        allowed = f"{', '.join(PROFILES)}, or one that a conftest.py registers"
        raise pytest.UsageError(f"--hypothesis-profile {name}: must be one of {allowed}") from error


def load_profile(config: pytest.Config) -> None:
    """Registers the suite's Hypothesis profiles, and loads ``dev`` unless --hypothesis-profile names another."""
    from hypothesis import settings

    from moe_ref.conformance import profiles

    profiles.register()
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("dev")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs every test that asks for ``executor`` once for each chosen executor."""
    if "executor_name" in metafunc.fixturenames and "conformance_device" in metafunc.fixturenames:
        chosen, device = (metafunc.config.getoption(f"moe_ref_{option}") for option in ("executors", "device"))
        names = chosen or metafunc.config.stash.get(JUDGED, None) or _usable(device.partition(":")[0])
        metafunc.parametrize("executor_name", names, indirect=True, scope="session")
        metafunc.config.stash.setdefault(JUDGED, names)
    if "vector" in metafunc.fixturenames and "vectors" in metafunc.fixturenames:
        if VECTORS not in metafunc.config.stash:
            allowed = "must be given: a folder that python -m moe_ref.conformance vectors DIR has written"
            raise pytest.UsageError(f"--vectors: {allowed}")
        metafunc.parametrize("vector", metafunc.config.stash[VECTORS].entries)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the suite's cheap tests first."""
    cheap_first(items)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Says which executors are judged where none was named: all of them take long."""
    names = config.stash.get(JUDGED, [])
    if not names or config.getoption("moe_ref_executors"):
        return []
    return [f"moe-ref judges {', '.join(names)}, each for minutes: --executor NAME judges one alone"]


def _usable(device: str) -> list[str]:
    import executors

    able = {name: _able(name) for name in executors.available() if name != "auto"}
    return [name for name, has in able.items() if not has.interpreted and (not has.devices or device in has.devices)]


@pytest.fixture(scope="session")
def executor_name(request: pytest.FixtureRequest) -> str:
    """The registered name of the executor under judgement."""
    return str(request.param)


@pytest.fixture(scope="session")
def executor(executor_name: str) -> Executor:
    """The executor under judgement."""
    import executors

    return executors.get(executor_name)


@pytest.fixture(scope="session")
def conformance_device(request: pytest.FixtureRequest) -> str:
    """The device under judgement."""
    return str(request.config.getoption("moe_ref_device"))


@pytest.fixture(scope="session")
def judge(request: pytest.FixtureRequest, executor_name: str, executor: Executor, conformance_device: str) -> Judge:
    """Calls checks on the executor under judgement; what is expected to fail may."""
    from moe_ref.conformance import profiles
    from moe_ref.conformance.reporting.judge import Judge
    from moe_ref.conformance.reporting.search import Search

    own = [known for known in request.config.stash[EXPECTED] if known.executor == executor_name]
    search = Search(profiles.simplifying())
    return Judge(executor_name, executor, conformance_device, own, search=search, notes=_notes(request.config))


def _notes(config: pytest.Config) -> Callable[[str], None] | None:
    """Tells another process what is judged, if this is the one of ``--isolate``."""
    from moe_ref.conformance.isolation.worker import CONNECTION, JUDGES

    connection = config.stash.get(CONNECTION, None)
    return None if connection is None else lambda said: connection.send((JUDGES, said))


@pytest.fixture(scope="session")
def vectors(request: pytest.FixtureRequest) -> Folder:
    """The folder of vectors."""
    return request.config.stash[VECTORS]


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Processes among which experts are spread."""
    from moe_ref.conformance.parallel.cluster import Cluster

    with Cluster(request.config.getoption("moe_ref_ranks")) as own:
        yield own
