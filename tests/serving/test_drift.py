"""Drift of query vectors from a reference."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acebert.serving.bundle import _query_mean, bundle_queries
from acebert.serving.drift import WINDOW, QueryDrift
from acebert.workdir import Stage


def drawn(rng: np.random.Generator, towards: np.ndarray, n: int) -> np.ndarray:
    """Unit vectors about a direction, float32 [n, d]."""
    vectors = towards + 0.8 * rng.standard_normal((n, len(towards))) / len(towards) ** 0.5
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_the_log_again_is_no_drift_and_other_queries_are_their_angle_away() -> None:
    rng = np.random.default_rng(0)
    first, second = np.eye(2, 64)
    log = drawn(rng, first, 20_000)
    drift = QueryDrift(log.mean(axis=0))
    for vector in drawn(rng, first, 3 * WINDOW):
        drift.add(vector)
    assert drift.value == pytest.approx(0, abs=0.005)
    angle = np.pi / 3
    turned = np.cos(angle) * first + np.sin(angle) * second
    for vector in drawn(rng, turned, 8 * WINDOW):  # what was before fades away
        drift.add(vector)
    assert drift.value == pytest.approx(1 - np.cos(angle), abs=0.02)


def test_what_live_queries_are_compared_with_is_the_mean_of_head_and_tail(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clicks = np.array([500] * 20 + [2] * 5_000)
    texts = [f"query {i}" for i in range(len(clicks))]
    table = pa.table({"query": range(len(clicks)), "text": texts, "clicks": clicks})
    pq.write_table(table, tmp_path / "queries.parquet")
    queries = bundle_queries(Stage("ingest", tmp_path, "d", 0.0, reused=True), 20)
    assert len(set(queries)) == len(queries) > 500
    head, tail = np.eye(2, 64)
    vectors = np.concatenate([drawn(rng, head, 20), drawn(rng, tail, 5_000)])
    found = _query_mean(tmp_path, queries, vectors[[texts.index(q) for q in queries]], "m", None)
    mean = np.average(vectors, axis=0, weights=clicks)  # half of the clicks are the tail's
    cosine = found @ mean / np.linalg.norm(found) / np.linalg.norm(mean)
    assert cosine > 0.99
    assert head @ mean / np.linalg.norm(mean) < 0.8


def test_too_few_searches_say_nothing() -> None:
    drift = QueryDrift(np.ones(8, np.float32))
    for _ in range(WINDOW - 1):
        drift.add(np.ones(8, np.float32))
    assert drift.value is None
    drift.add(np.ones(8, np.float32))
    assert drift.value == pytest.approx(0, abs=1e-6)
