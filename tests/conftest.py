"""Fixtures that several files ask for by name."""

from collections.abc import Iterator

import pytest
import torch

from interpreted import WITHOUT_TRITON

collect_ignore_glob = WITHOUT_TRITON


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nightly: too slow for every run; runs with --hypothesis-profile=nightly")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("nightly") and item.config.getoption("--hypothesis-profile") != "nightly":
        pytest.skip("nightly")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of tests side by side wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring what the machine reaches takes seconds; one test does."""
    from executors._bench.ceilings import Ceilings

    monkeypatch.setattr("executors._bench.run.measure_ceilings", lambda _: Ceilings(0.5, 30.0, 40.0))


@pytest.fixture
def one_percent_more() -> Iterator[str]:
    """A wrong executor, for as long as the test runs."""
    import executors
    from moe_ref.conformance.mutants import mutants

    name = "one_percent_more"
    executors.register(name, lambda: mutants(executors.get("native"))[name])
    yield name
    executors.unregister(name)


@pytest.fixture
def new_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton kernels that a test makes are interpreted too."""
    from executors._triton.interpreter import mend

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    mend()
