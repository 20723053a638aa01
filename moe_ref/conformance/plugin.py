"""The pytest plugin: ``--executor NAME`` chooses whom the suite judges.

Nothing is imported before the option is used, so that having moe-ref installed costs other test runs nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from executors import Executor

_UNUSED = "built-in executors that are usable here"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the suite's options."""
    group = parser.getgroup("moe-ref", "conformance of Mixture-of-Experts executors")
    group.addoption(
        "--executor",
        action="append",
        default=[],
        metavar="NAME",
        dest="moe_ref_executors",
        help=f"executor that the conformance suite judges; repeatable (default: {_UNUSED})",
    )
    group.addoption(
        "--executor-device",
        default="cpu",
        metavar="DEVICE",
        dest="moe_ref_device",
        help="device on which it is judged (default: cpu)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Refuses unknown and unusable executors at the start; loads the profile ``dev`` unless another is asked for."""
    names = config.getoption("moe_ref_executors")
    if not names:
        return
    import executors

    for name in names:
        try:
            executors.get(name)
        except (executors.UnknownExecutor, executors.Unavailable, ValueError) as error:
            raise pytest.UsageError(f"--executor {name}: {error}") from error
    load_profile(config)


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
        names = metafunc.config.getoption("moe_ref_executors") or _usable()
        metafunc.parametrize("executor", names, indirect=True, scope="session")


def _usable() -> list[str]:
    import executors

    return [name for name in executors.available() if name != "auto"]


@pytest.fixture(scope="session")
def executor(request: pytest.FixtureRequest) -> Executor:
    """The executor under judgement."""
    import executors

    return executors.get(request.param)


@pytest.fixture(scope="session")
def conformance_device(request: pytest.FixtureRequest) -> str:
    """The device under judgement."""
    return str(request.config.getoption("moe_ref_device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says aloud what a chosen executor declared not to offer, so that a pass is not mistaken for more than it is."""
    names = config.getoption("moe_ref_executors")
    if not names:
        return
    import executors

    counted = Counter[str]()
    for name in names:
        capabilities = executors.get(name).capabilities
        if not capabilities.routing:
            counted[f"{name}: routing is done elsewhere; clauses R1-R5 are not applicable"] += 1
        if not capabilities.backward:
            counted[f"{name}: no backward pass; clauses D1-D3 are not applicable"] += 1
    if counted:
        terminalreporter.section("conformance")
        for line in counted:
            terminalreporter.write_line(line)
