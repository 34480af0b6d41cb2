import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from acebert.evaluation.gauc import auc_by_group, gauc


def plain_gauc(search, score, clicked):
    """sklearn's AUC of each group, averaged with its rows as weights."""
    total = weight = 0.0
    for group in np.unique(search):
        rows = search == group
        if 0 < clicked[rows].sum() < rows.sum():
            total += rows.sum() * roc_auc_score(clicked[rows], score[rows])
            weight += rows.sum()
    return total / weight if weight else None


def test_a_hand_computed_case_with_a_tie_and_both_kinds_of_left_out_group():
    search = np.array([7, 7, 7, 2, 2, 5, 5, 9])
    score = np.array([0.9, 0.5, 0.5, 0.1, 0.8, 0.3, 0.2, 0.4])
    clicked = np.array([False, True, False, True, False, True, True, False])
    # 7: the click loses to 0.9 and ties with 0.5: (0 + ½)/2 = ¼, 3 rows. 2: 0 of 1 pair, 2 rows.
    result = gauc(search, score, clicked)
    assert result.value == pytest.approx((3 * 0.25 + 2 * 0.0) / 5)
    assert (result.groups, result.left_out_all_clicked, result.left_out_none_clicked) == (2, 1, 1)


@given(st.data())
def test_equals_sklearn_group_by_group(data):
    n = data.draw(st.integers(1, 60))
    search = data.draw(arrays(np.int64, n, elements=st.integers(0, 6)))
    score = data.draw(arrays(np.float32, n, elements=st.sampled_from([0.0, 0.25, 0.5, 2.0, -3.0])))
    clicked = data.draw(arrays(np.bool_, n))
    expected = plain_gauc(search, score, clicked)
    value = gauc(search, score, clicked).value
    assert (value is None) == (expected is None)
    if expected is not None:
        assert value == pytest.approx(expected, abs=1e-12)


def test_equals_sklearn_on_many_groups_of_real_numbers():
    rng = np.random.default_rng(0)
    search, score = rng.integers(0, 300, 5000), rng.standard_normal(5000).astype(np.float32)
    clicked = rng.random(5000) < 0.15
    assert gauc(search, score, clicked).value == pytest.approx(plain_gauc(search, score, clicked))


def test_monotone_transformations_change_nothing_and_reversal_mirrors():
    rng = np.random.default_rng(1)
    search, score = rng.integers(0, 50, 1000), rng.standard_normal(1000)
    clicked = rng.random(1000) < 0.3
    value = gauc(search, score, clicked).value
    assert gauc(search, np.exp(3 * score), clicked).value == pytest.approx(value)
    assert gauc(search, -score, clicked).value == pytest.approx(1 - value)


def test_minus_infinity_is_below_everything_and_ties_with_itself():
    search = np.zeros(4, np.int64)
    score = np.array([-np.inf, -np.inf, -1e30, 0.0])
    clicked = np.array([True, False, False, True])
    assert gauc(search, score, clicked).value == pytest.approx(roc_auc_score(clicked, [0, 0, 1, 2]))


def test_scores_within_the_tie_distance_count_half():
    search, clicked = np.zeros(2, np.int64), np.array([True, False])
    score = np.array([0.5, 0.5 + 2e-7])
    assert gauc(search, score, clicked).value == 0.0
    assert gauc(search, score, clicked, tie=1e-6).value == 0.5


def test_clicks_alone_have_no_gauc():
    result = gauc(np.array([0, 0, 1]), np.arange(3.0), np.ones(3, bool))
    assert result.value is None
    assert result.left_out_all_clicked == 2


def test_no_rows_have_no_gauc():
    empty = np.empty(0)
    assert gauc(empty.astype(np.int64), empty, empty.astype(bool)).value is None


def test_nan_scores_are_refused_with_their_row():
    with pytest.raises(ValueError, match="score 1 is NaN"):
        auc_by_group(np.zeros(2, np.int64), np.array([0.0, np.nan]), np.ones(2, bool))
