import pytest

from interpreted import WITHOUT_TRITON
from moe_ref.conformance.plugin import load_profile

collect_ignore_glob = WITHOUT_TRITON


def pytest_configure(config: pytest.Config) -> None:
    load_profile(config)
