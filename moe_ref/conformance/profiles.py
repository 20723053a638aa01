"""Hypothesis profiles: how long and how reproducibly the suite searches.

- ``quick``: a few seconds for one executor, before each commit; the same examples on every run, none of them large.
- ``dev``: under a minute for one executor; the database keeps failing examples.
- ``ci``: the same examples on every run, no database.
- ``nightly``: long, and other examples every night.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Sampling error bars is slow and must not count as slow data generation; drawing is cheap.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]

PROFILES = {
    "quick": settings(
        max_examples=10,
        deadline=None,
        suppress_health_check=_SLOW,
        derandomize=True,
        database=None,
        print_blob=True,
    ),
    "dev": settings(max_examples=30, deadline=None, suppress_health_check=_SLOW, print_blob=True),
    "ci": settings(
        max_examples=100,
        deadline=None,
        suppress_health_check=_SLOW,
        derandomize=True,
        database=None,
        print_blob=True,
    ),
    "nightly": settings(max_examples=3000, deadline=None, suppress_health_check=_SLOW, print_blob=True),
}


def current() -> settings:
    """The profile that decorates the suite's tests: the active one if its name is listed here, else ``dev``."""
    return PROFILES.get(settings.get_current_profile_name(), PROFILES["dev"])


def register() -> None:
    """Registers the profiles with Hypothesis under their names."""
    for name, profile in PROFILES.items():
        settings.register_profile(name, profile)
