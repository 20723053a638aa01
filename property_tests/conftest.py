import pytest

import interpreted  # noqa: F401
from moe_ref.conformance.plugin import load_profile


def pytest_configure(config: pytest.Config) -> None:
    load_profile(config)
