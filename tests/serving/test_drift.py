"""Drift of query vectors from a reference."""

import numpy as np
import pytest

from acebert.serving.drift import WINDOW, QueryDrift


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


def test_too_few_searches_say_nothing() -> None:
    drift = QueryDrift(np.ones(8, np.float32))
    for _ in range(WINDOW - 1):
        drift.add(np.ones(8, np.float32))
    assert drift.value is None
    drift.add(np.ones(8, np.float32))
    assert drift.value == pytest.approx(0, abs=1e-6)
