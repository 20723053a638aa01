"""Hypothesis profiles: how long and how reproducibly the suite looks.

- ``dev``: under a minute for one executor; the database keeps failing examples.
- ``ci``: the same examples on every run, no database.
- ``nightly``: long, and other examples every night.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Drawing is cheap; sampling error bars is not, and must not count as slow data generation.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]

PROFILES = {
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
    """The active profile if it is one of these by name, else ``dev``: what the suite's tests are decorated with."""
    return PROFILES.get(settings.get_current_profile_name(), PROFILES["dev"])


def register() -> None:
    """Makes the profiles known to Hypothesis under their names."""
    for name, profile in PROFILES.items():
        settings.register_profile(name, profile)
