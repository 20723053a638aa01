"""The process in which tests run: pytest with the same arguments, which takes the names of tests from a pipe.

It says on the pipe what it judges before it calls the executor. What was said is there even if the process ends.
"""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from typing import Any

import pytest

CONNECTION: pytest.StashKey[Connection] = pytest.StashKey()
READY, JUDGES, REPORTS = "ready", "judges", "reports"  # what a message is about


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Takes the pipe, which the process was given as a plugin, and begins: before pytest captures what is printed.

    This module is a plugin, lest anything of moe_ref be imported before pytest can rewrite its assertions.
    """
    connection = next(own for own in pluginmanager.get_plugins() if hasattr(own, "recv"))
    printed = connection.recv()
    if printed:
        with open(printed, "wb") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
    pluginmanager.register(Worker(connection))


class Worker:
    """A plugin that replaces the loop over all tests.

    Args:
        connection: gives pairs of a test's name and the next one's; takes pairs of what a message is about and what
            it says.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.reports: list[pytest.TestReport] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> None:
        """Says that another process tells the results, as pytest-xdist says it: then nothing is written here."""
        config.workerinput = {"workerid": "isolated", "testrunuid": ""}  # type: ignore[attr-defined]
        config.stash[CONNECTION] = self.connection

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Prints nothing."""
        config.pluginmanager.unregister(name="terminalreporter")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Runs the tests that it is sent."""
        items = {item.nodeid: item for item in session.items}
        self.connection.send((READY, len(items)))
        while (names := self._next()) is not None:
            item, following = items[names[0]], items.get(names[1])
            self.reports = []
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            plain = session.config.hook.pytest_report_to_serializable
            self.connection.send((REPORTS, [plain(config=session.config, report=report) for report in self.reports]))
        return True

    def _next(self) -> Any:
        """Two names, or None at the end, which may be that of the other process."""
        try:
            return self.connection.recv()
        except EOFError:
            return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps what came of a test."""
        self.reports.append(report)
