"""Oracles: scikit-learn, and counts by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score

from acebert.training.cnn_validation import (
    FEWEST,
    average_precision,
    recall_among,
    word_precision,
)

RNG = np.random.default_rng(0)


def test_average_precision_is_scikit_learns():
    for _ in range(20):
        scores, relevant = RNG.random(50), RNG.random(50) < 0.2
        relevant[0] = True
        expected = average_precision_score(relevant, scores)
        assert average_precision(scores, relevant) == pytest.approx(expected)


def test_words_that_few_titles_name_are_left_out():
    named = np.zeros((20, 3), bool)
    named[:FEWEST, 0] = named[: FEWEST - 1, 1] = True
    scores = np.linspace(1, 0, 20)[:, None].repeat(3, axis=1)
    assert word_precision(scores, named) == {0: 1.0}


def test_recall_among_the_likeliest_by_hand():
    scores = np.array([[9, 8, 7, 6], [9, 8, 7, 6], [1, 2, 3, 4]])
    named = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    assert recall_among(scores, named, 1) == pytest.approx((1 + 1) / 2)
    assert recall_among(scores, named, 2) == pytest.approx((1 / 2 + 1) / 2)
    assert recall_among(scores, named, 9) == 1.0


def test_recall_of_single_words_at_one_is_the_share_ranked_first():
    scores = RNG.random((200, 6))
    named = np.zeros((200, 6), bool)
    named[np.arange(200), RNG.integers(0, 6, 200)] = True
    first = scores.argmax(1) == named.argmax(1)
    assert recall_among(scores, named, 1) == pytest.approx(first.mean())
    assert label_ranking_average_precision_score(named, scores) > recall_among(scores, named, 1)
