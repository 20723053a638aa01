"""A pytest plugin that writes what comes of each test as it comes, so that a process that dies has told what it knew.

Lines of JSON: ``lacks`` first, then for each test ``begun`` and, if the process lives, its ``outcome``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_ref.conformance.reporting.reporter import OUTCOME


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    parser.addoption("--outcomes", metavar="FILE", help="file to which a line of JSON is added for each test")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Writes what the executor does not promise."""
    import executors
    from moe_ref.conformance.reporting.applicable import lacks

    for name in session.config.getoption("moe_ref_executors"):
        found = [[own.says, list(own.clauses)] for own in lacks(executors.get(name).capabilities)]
        _write(session.config, {"lacks": found})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Writes which test begins."""
    from moe_ref.conformance.reporting.ledger import clauses_of

    clauses = clauses_of(getattr(getattr(item, "obj", None), "__doc__", None))
    _write(item.config, {"begun": item.nodeid, "test": item.name, "clauses": clauses})


class Writer:
    """A plugin of one run that writes outcomes."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Writes a test's outcome; that of a test which is no test of the suite is an empty one."""
        if report.when == "call":
            found: list[object] = [value for name, value in report.user_properties if name == OUTCOME]
            _write(self.config, {"outcome": found[0] if found else None})


def pytest_configure(config: pytest.Config) -> None:
    """Registers the writer."""
    config.pluginmanager.register(Writer(config), "outcomes")


def _write(config: pytest.Config, line: dict[str, Any]) -> None:
    with Path(config.getoption("--outcomes")).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
