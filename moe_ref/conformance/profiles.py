"""Hypothesis profiles: how long and how reproducibly the suite searches.

- ``quick``: a few seconds for one executor, before each commit; the same examples on every run, none of them large.
- ``dev``: under a minute for one executor; the database keeps failing examples.
- ``ci``: the same examples on every run, no database.
- ``nightly``: long, and other examples every night.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

# Sampling error bars is slow and must not count as slow data generation; drawing is cheap.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
# What Hypothesis explains are drawn arguments, of which there is one, the problem: that takes time and says nothing.
_PHASES = [phase for phase in Phase if phase is not Phase.explain]

PROFILES = {
    "quick": settings(
        max_examples=10,
        deadline=None,
        suppress_health_check=_SLOW,
        derandomize=True,
        database=None,
        print_blob=True,
        phases=_PHASES,
    ),
    "dev": settings(max_examples=30, deadline=None, suppress_health_check=_SLOW, print_blob=True, phases=_PHASES),
    "ci": settings(
        max_examples=100,
        deadline=None,
        suppress_health_check=_SLOW,
        derandomize=True,
        database=None,
        print_blob=True,
        phases=_PHASES,
    ),
    "nightly": settings(max_examples=3000, deadline=None, suppress_health_check=_SLOW, print_blob=True, phases=_PHASES),
}

SIMPLIFYING = {"quick": 100, "dev": 400, "ci": 400, "nightly": 2000}  # problems tried to make a test's failure simpler


def simplifying() -> int:
    """How many problems the active profile tries to make a failure simpler."""
    return SIMPLIFYING.get(settings.get_current_profile_name(), SIMPLIFYING["dev"])


def current() -> settings:
    """The profile that decorates the suite's tests: the active one if its name is listed here, else ``dev``."""
    return PROFILES.get(settings.get_current_profile_name(), PROFILES["dev"])


def register() -> None:
    """Registers the profiles with Hypothesis under their names."""
    for name, profile in PROFILES.items():
        settings.register_profile(name, profile)
