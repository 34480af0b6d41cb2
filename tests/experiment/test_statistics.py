"""Against numpy's bootstrap, scipy, formulas by hand, and experiments whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from acebert.experiment.statistics import (
    BUYERS,
    PerUser,
    lift,
    needed,
    preference,
    sample_ratio,
    sign_test,
)


def shoppers(rng: np.random.Generator, users: int, rate: float = 0.1) -> PerUser:
    """Users who differ in how much they search and in how often they click: searches of one user
    are alike, so that a test which counts searches would be far too sure."""
    searches = rng.geometric(0.2, users)
    own = np.clip(rng.gamma(2, rate / 2, users), 0, 1)
    return PerUser(rng.binomial(searches, own).astype(float), searches.astype(float))


def test_with_one_search_a_user_the_error_is_that_of_a_mean() -> None:
    x = np.array([1.0, 0, 0, 3, 2, 0])
    metric = PerUser(x, np.ones(6))
    assert metric.value == 1.0
    assert metric.standard_error == pytest.approx(stats.sem(x))


def test_with_one_vote_a_user_a_preference_is_scipys_t_test() -> None:
    votes = np.array([1.0, -1, 1, 1, 0, 1, 1])
    found, expected = preference(PerUser(votes, np.ones(7))), stats.ttest_1samp(votes, 0)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("users", [1, 3, 700])
def test_users_who_are_all_alike_prove_nothing(users: int) -> None:
    alike, others = (
        PerUser(np.full(users, 0.3), np.full(users, 7.0)),
        PerUser(np.ones(2), np.ones(2)),
    )
    for found in (preference(alike), lift(alike, others)):
        assert not found.found
        assert np.isnan(found.p)


def test_the_interval_of_a_lift_is_that_of_a_bootstrap_over_users() -> None:
    rng = np.random.default_rng(1)
    a, b = shoppers(rng, 3000), shoppers(rng, 2000, 0.12)
    found = lift(b, a)

    def drawn(metric: PerUser) -> float:
        rows = rng.integers(len(metric.numerator), size=len(metric.numerator))
        return metric.numerator[rows].sum() / metric.denominator[rows].sum()

    low, high = np.percentile([drawn(b) / drawn(a) - 1 for _ in range(2000)], [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    assert found.value == pytest.approx(b.value / a.value - 1)
    assert found.found


def test_an_a_a_experiment_alarms_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(2)
    runs = 2000
    effects = [lift(shoppers(rng, 400), shoppers(rng, 400)) for _ in range(runs)]
    for alarms in (sum(e.found for e in effects), sum(e.p < 0.05 for e in effects)):
        assert stats.binomtest(alarms, runs, 0.05).pvalue > 0.001
    by_search = 0
    for _ in range(300):  # what the delta method is for: searches as the sample alarm too often
        a, b = shoppers(rng, 400), shoppers(rng, 400)
        n, m = a.denominator.sum(), b.denominator.sum()
        table = [
            [a.numerator.sum(), n - a.numerator.sum()],
            [b.numerator.sum(), m - b.numerator.sum()],
        ]
        by_search += stats.chi2_contingency(table, correction=False).pvalue < 0.05
    assert by_search > 0.08 * 300


def test_a_planted_lift_is_found_as_often_as_its_data_promise() -> None:
    rng = np.random.default_rng(3)
    pilot = lift(shoppers(rng, 20_000), shoppers(rng, 20_000))  # knows of no lift
    users = round(needed(pilot, 0.1) * 20_000)
    found = [lift(shoppers(rng, users, 0.11), shoppers(rng, users, 0.1)).found for _ in range(400)]
    assert 0.72 < np.mean(found) < 0.88


def test_the_data_that_a_lift_needs_is_lehrs_rule() -> None:
    """16 standard deviations squared a group, for 5 % and 80 % (Lehr 1992: 15.7)."""
    rng = np.random.default_rng(5)
    ones = np.ones(10_000)
    a, b = (PerUser(rng.normal(10, 1, 10_000), ones) for _ in range(2))
    assert needed(lift(b, a), 0.01) * 10_000 == pytest.approx(15.7 * (1 / 0.1) ** 2, rel=0.04)
    assert needed(lift(b, a), 0.02) < needed(lift(b, a), 0.01) / 3.9


def spenders(rng: np.random.Generator, buyers: int) -> PerUser:
    """Users of whom about so many buy, one or more things at prices that differ a hundredfold."""
    users = 10 * buyers
    searches = rng.geometric(0.2, users)
    items = np.where(rng.random(users) < 0.1, rng.geometric(0.7, users), 0)
    prices = rng.lognormal(3, 1, items.sum())
    spent = np.bincount(np.repeat(np.arange(users), items), prices, users)
    return PerUser(spent, searches.astype(float))


def test_an_a_a_experiment_on_revenue_alarms_at_the_nominal_rate_with_enough_buyers() -> None:
    rng = np.random.default_rng(6)
    runs = 2000
    alarms = sum(lift(spenders(rng, BUYERS), spenders(rng, BUYERS)).found for _ in range(runs))
    assert stats.binomtest(alarms, runs, 0.05).pvalue > 0.001


def test_a_preference_has_an_interval_that_covers_it() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(500):
        decided = rng.geometric(0.3, 300)
        wins = rng.binomial(decided, np.clip(rng.normal(0.55, 0.1, 300), 0, 1))
        found = preference(PerUser((2.0 * wins - decided), decided.astype(float)))
        covered += found.low < 0.1 < found.high
    assert stats.binomtest(covered, 500, 0.95).pvalue > 0.001


def test_a_mismatch_of_the_sample_is_scipys_chi_square() -> None:
    equal = np.array([0.5, 0.5])
    assert sample_ratio(np.array([5000, 5000]), equal) == 1.0
    assert sample_ratio(np.array([5000, 5500]), equal) < 0.001
    by_hand = (600 - 640) ** 2 / 640 + (200 - 160) ** 2 / 160
    found = sample_ratio(np.array([600, 200]), np.array([0.8, 0.2]))
    assert found == pytest.approx(stats.chi2.sf(by_hand, 1))


def test_users_vote_once_each_in_the_sign_test() -> None:
    assert sign_test(np.array([5.0, 1, 2, -9, 0, 0])) == pytest.approx(10 / 16)  # 3 of 4, two-sided
    assert sign_test(np.zeros(4)) == 1.0


def test_what_has_no_lift_says_so() -> None:
    some, none = PerUser(np.ones(5), np.ones(5)), PerUser(np.zeros(5), np.ones(5))
    assert np.isnan(lift(some, none).value)
    assert not lift(none, some).found
