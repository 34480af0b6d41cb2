from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from acebert.errors import UserError
from acebert.evaluation.gauc import auc_by_group, gauc
from acebert.evaluation.significance import (
    Ratios,
    difference,
    interval,
    mean_of_queries,
    weighted_by_query,
)


def test_the_interval_of_a_mean_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).beta(0.5, 2, 400)
    ours = interval(mean_of_queries(values), samples=8000)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=8000, rng=1
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.002)
    assert ours.high == pytest.approx(theirs.high, abs=0.002)


def test_the_interval_of_a_weighted_ratio_is_scipys():
    rng = np.random.default_rng(1)
    weight = rng.integers(1, 30, 300).astype(float)
    auc = rng.random(300)
    ours = interval(Ratios((weight * auc)[None], weight), samples=8000)
    theirs = stats.bootstrap(
        (weight * auc, weight),
        lambda a, b: a.sum() / b.sum(),
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=8000,
        rng=2,
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.003)
    assert ours.high == pytest.approx(theirs.high, abs=0.003)


def test_the_paired_difference_is_scipys_bootstrap_of_the_differences():
    rng = np.random.default_rng(2)
    a = rng.random(500)
    b = a + rng.normal(0.01, 0.05, 500)  # alike: pairing is what makes the interval narrow
    ours = difference(mean_of_queries(a), mean_of_queries(b), samples=8000)
    theirs = stats.bootstrap(
        (a - b,), np.mean, method="percentile", n_resamples=8000, rng=3
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=5e-4)
    assert ours.high == pytest.approx(theirs.high, abs=5e-4)
    assert ours.excludes_zero


def test_two_rows_of_the_same_models_differ_as_the_models_differences_do():
    rng = np.random.default_rng(5)
    models = tuple(Path(f"model{seed}") for seed in range(3))
    a = rng.random((3, 60)) + rng.normal(0, 0.1, (3, 1))  # models that differ
    b = a + 0.01 + rng.normal(0, 0.01, (3, 60))
    one, other = (Ratios(row, np.ones(60), models) for row in (a, b))
    found = difference(other, one)
    of_differences = interval(Ratios(b - a, np.ones(60)))
    assert (found.low, found.high) == pytest.approx((of_differences.low, of_differences.high))
    assert found.excludes_zero
    apart = replace(other, models=tuple(Path(f"model{seed}") for seed in range(3, 6)))
    assert not difference(apart, one).excludes_zero
    same = difference(one, one)
    assert (same.low, same.high) == (0.0, 0.0)


def test_queries_without_a_value_do_not_count():
    values = np.array([[0.2, np.nan, 0.8], [0.4, np.nan, 1.0]])
    assert mean_of_queries(values).value == pytest.approx((0.5 + 0.7) / 2)


def test_weights_by_query_give_gauc_itself():
    rng = np.random.default_rng(3)
    search = np.sort(rng.integers(0, 60, 900))
    score, clicked = rng.random(900), rng.random(900) < 0.2
    groups = auc_by_group(search, score, clicked)
    query_of_search = rng.integers(0, 10, len(groups.group))
    ratios = weighted_by_query(groups.auc, groups.impressions, query_of_search, 10)
    assert ratios.value == pytest.approx(gauc(search, score, clicked).value)


def claims(seeds: int, seed_noise: float, query_noise: float, trials: int, shift: float) -> float:
    """Share of trials in which two systems are said to differ; both have true mean 0 + shift/2."""
    rng = np.random.default_rng(seeds)
    claimed = 0
    for trial in range(trials):
        easy = rng.standard_normal(200)  # some queries are easy for both
        a, b = (
            easy
            + rng.normal(sign * shift / 2, seed_noise, (seeds, 1))
            + query_noise * rng.standard_normal((seeds, 200))
            for sign in (1, -1)
        )
        claimed += difference(
            mean_of_queries(a), mean_of_queries(b), samples=300, seed=trial
        ).excludes_zero
    return claimed / trials


@pytest.mark.parametrize(
    ("seeds", "seed_noise", "query_noise"), [(3, 0.5, 0.5), (3, 0.05, 0.5), (5, 0.3, 1.0)]
)
def test_systems_that_differ_by_chance_alone_are_rarely_said_to_differ(
    seeds, seed_noise, query_noise
):
    # 5 % of 300 are 15; 26 is what 5 % exceed with probability 0.2 %.
    assert claims(seeds, seed_noise, query_noise, 300, shift=0.0) <= 26 / 300


def test_a_large_difference_is_found_with_three_seeds():
    assert claims(3, 0.05, 0.5, 50, shift=0.5) > 0.95


def test_rows_of_other_queries_are_refused():
    a, b = mean_of_queries(np.array([1.0, np.nan])), mean_of_queries(np.array([1.0, 0.0]))
    with pytest.raises(UserError, match="same test queries"):
        difference(a, b)


def test_a_metric_that_no_query_has_is_refused():
    with pytest.raises(ValueError, match="no query counts"):
        mean_of_queries(np.array([np.nan, np.nan]))
