"""Processes for all tests of this room: to start them takes longer than most tests."""

from collections.abc import Iterator

import pytest

from moe_ref.conformance.parallel.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with Cluster(4) as own:
        yield own


@pytest.fixture
def breaking(cluster: Cluster) -> Iterator[Cluster]:
    """For tests after which groups are out of step: others get other processes."""
    yield cluster
    cluster.close()
