import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from acebert.evaluation.ranking import ndcg, reciprocal_rank


def counts(scores, targets):
    scores = np.asarray(scores)
    greater = np.array([(scores > scores[t]).sum() for t in targets])
    equal = np.array([(scores == scores[t]).sum() for t in targets])
    return greater, equal


def all_orders(scores):
    for shuffled in itertools.permutations(range(len(scores))):
        yield sorted(shuffled, key=lambda product: -scores[product])


@st.composite
def cases(draw):
    n = draw(st.integers(1, 6))
    scores = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=n, max_size=n))
    targets = sorted(draw(st.sets(st.integers(0, n - 1), min_size=1)))
    gains = draw(
        st.lists(st.sampled_from([1.0, 3.0]), min_size=len(targets), max_size=len(targets))
    )
    return scores, targets, np.array(gains), draw(st.integers(1, n))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_ndcg_with_ties_is_the_mean_over_all_orders(case):
    scores, targets, gains, k = case
    relevance = dict(zip(targets, gains, strict=True))
    discounts = 1 / np.log2(np.arange(2, k + 2))

    def dcg(products):
        return sum(relevance.get(p, 0) * d for p, d in zip(products[:k], discounts, strict=False))

    ideal = dcg(sorted(targets, key=lambda t: -relevance[t]))
    expected = np.mean([dcg(order) / ideal for order in all_orders(scores)])
    query = np.zeros(len(targets), np.int64)
    assert ndcg(*counts(scores, targets), gains, query, 1, k)[0] == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_reciprocal_rank_with_ties_is_the_mean_over_all_orders(case):
    scores, targets, _, depth = case
    values = []
    for order in all_orders(scores):
        rank = 1 + min(order.index(target) for target in targets)
        values.append(1 / rank if rank <= depth else 0.0)
    query = np.zeros(len(targets), np.int64)
    value = reciprocal_rank(*counts(scores, targets), query, 1, depth)[0]
    assert value == pytest.approx(np.mean(values))


def test_ndcg_equals_sklearn_on_graded_relevance_without_ties():
    rng = np.random.default_rng(0)
    scores, grades = rng.standard_normal(30), rng.integers(0, 4, 30)
    targets = np.flatnonzero(grades)
    query = np.zeros(len(targets), np.int64)
    for k in (1, 5, 30):
        value = ndcg(*counts(scores, targets), grades[targets].astype(float), query, 1, k)[0]
        assert value == pytest.approx(ndcg_score([grades], [scores], k=k))


def test_queries_are_kept_apart_and_those_without_a_target_have_no_value():
    greater, equal = np.array([0, 4, 1]), np.ones(3, np.int64)
    query = np.array([0, 0, 2])
    np.testing.assert_allclose(reciprocal_rank(greater, equal, query, 3, 10), [1, np.nan, 1 / 2])
    expected = [(1 + 1 / np.log2(6)) / (1 + 1 / np.log2(3)), np.nan, 1 / np.log2(3)]
    np.testing.assert_allclose(ndcg(greater, equal, np.ones(3), query, 3, 10), expected)


def test_a_target_beyond_the_depth_scores_nothing():
    at_depth, alone = np.array([5]), np.array([1])
    query = np.zeros(1, np.int64)
    assert reciprocal_rank(at_depth, alone, query, 1, 5)[0] == 0
    assert ndcg(at_depth, alone, np.ones(1), query, 1, 5)[0] == 0
