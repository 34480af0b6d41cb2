"""Waiting for a cluster that grows on demand, on a real Ray."""

import time

import pytest

from acebert import cluster
from acebert.cluster import wait_for_nodes

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bundles the autoscaler was asked for, call by call."""
    calls: list[int] = []
    real = cluster.request_resources

    def noted(bundles: list[dict[str, float]]) -> None:
        calls.append(len(bundles))
        real(bundles=bundles)

    monkeypatch.setattr(cluster, "request_resources", noted)
    return calls


def test_nobody_is_asked_for_what_is_there(asked: list[int]) -> None:
    wait_for_nodes({"CPU": 1}, 2, 10, lambda: True)
    assert asked == []


def test_it_goes_on_as_soon_as_the_nodes_are_there_and_takes_its_request_back(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.05)
    there = time.monotonic() + 0.3
    wait_for_nodes({"CPU": 1, "GPU": 1}, 3, 10, lambda: time.monotonic() > there)
    assert there < time.monotonic() < there + 60
    assert asked == [3, 0]


def test_it_waits_no_longer_than_it_was_told_to(asked: list[int]) -> None:
    start = time.monotonic()
    wait_for_nodes({"CPU": 64}, 1, 0.01, lambda: False)
    assert 0.5 < time.monotonic() - start < 60
    assert asked == [1, 0]
