"""Waiting for a cluster that grows on demand, on a real Ray."""

import time

import pytest

from acebert import cluster
from acebert.cluster import EncoderPool, encoder_pool, node_resources, wait_for_nodes
from acebert.errors import UserError

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


HEAD = {"CPU": 8.0, "memory": 1.0}


@pytest.mark.parametrize(
    ("wanted", "nodes", "expected"),
    [
        (None, [{"CPU": 2.0}], EncoderPool(1, 0, 1.0, 2)),
        (2, [{"CPU": 2.0}], EncoderPool(2, 0, 0.5, 1)),
        (None, [{"CPU": 4.0}] * 3, EncoderPool(3, 0, 2.0, 4)),
        (None, [HEAD, *[{"CPU": 32.0}] * 4], EncoderPool(4, 0, 16.0, 32)),
        (5, [HEAD, *[{"CPU": 32.0}] * 4], EncoderPool(5, 0, 8.0, 16)),
        (None, [HEAD, *[{"CPU": 8.0, "GPU": 1.0}] * 8], EncoderPool(8, 1, None, 1)),
        (3, [HEAD, {"CPU": 64.0, "GPU": 8.0}], EncoderPool(3, 1, None, 1)),
    ],
)
def test_encoders_fit_the_nodes_and_take_half_of_the_largest_or_a_gpu_each(
    wanted: int | None, nodes: list[dict[str, float]], expected: EncoderPool
) -> None:
    assert encoder_pool(wanted, nodes) == expected


def test_more_encoders_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"eval.num_actors 3: the cluster has 2 GPUs"):
        encoder_pool(3, [{"CPU": 8.0, "GPU": 2.0}])
    with pytest.raises(UserError, match="no CPUs"):
        encoder_pool(None, [{"memory": 1.0}])


def test_the_nodes_of_a_cluster_are_seen() -> None:
    assert [node["CPU"] for node in node_resources()] == [2.0]
