import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acebert.evaluation import recall as module
from acebert.evaluation.recall import (
    DotProduct,
    expected_hits,
    ranks_in_lists,
    recall,
    search_catalogue,
)


class Fixed:
    """Scores from a table."""

    tie = 0.0
    device = "cpu"

    def __init__(self, scores):
        self._scores = torch.tensor(np.asarray(scores), dtype=torch.float32)
        self.products = self._scores.shape[1]

    def score(self, queries, out):
        out.copy_(self._scores[queries])


def over_all_orders(scores, targets, k):
    """Mean Recall@k of one query over every order of its products that the scores allow."""
    found = []
    for shuffled in itertools.permutations(range(len(scores))):
        order = sorted(shuffled, key=lambda product: -scores[product])
        found.append(len(set(order[:k]) & set(targets)) / len(targets))
    return np.mean(found)


def unit(rng, *shape):
    vectors = rng.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_recall_with_ties_is_the_mean_over_all_orders_of_equal_scores(data):
    n = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=n, max_size=n))
    targets = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    k = data.draw(st.integers(1, n))
    depth = data.draw(st.integers(k, n + 2))
    query = np.zeros(len(targets), np.int64)
    found = search_catalogue(Fixed([scores]), 1, query, np.array(targets), depth)
    value = recall(found.greater, found.equal, query, 1, k)[0]
    assert value == pytest.approx(over_all_orders(scores, targets, k))


@pytest.mark.parametrize("tile", [1, 7, 64, 500, 10**6])
@pytest.mark.parametrize("block_bytes", [1, 4 * 500 * 7, 2**28])
def test_exact_search_equals_a_numpy_sort_whatever_the_block(block_bytes, tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    rng = np.random.default_rng(0)
    queries, products = unit(rng, 40, 24), unit(rng, 500, 24)
    target_query = np.sort(rng.integers(0, 40, 90))
    target_product = rng.integers(0, 500, 90)
    pair_query, pair_product = rng.integers(0, 40, 300), rng.integers(0, 500, 300)
    found = search_catalogue(
        DotProduct(queries, products),
        40,
        target_query,
        target_product,
        20,
        pair_query,
        pair_product,
        block_bytes,
    )
    exact = queries.astype(np.float64) @ products.T.astype(np.float64)
    order = np.argsort(-exact, axis=1)
    np.testing.assert_array_equal(found.top, order[:, :20])
    np.testing.assert_allclose(
        found.top_score, np.take_along_axis(exact, order, 1)[:, :20], atol=1e-6
    )
    np.testing.assert_allclose(found.pair_score, exact[pair_query, pair_product], atol=1e-6)
    rank = np.argsort(order, axis=1)[target_query, target_product]
    np.testing.assert_array_equal(found.greater, np.minimum(rank, 20))
    for k in (1, 7, 20):
        hits = np.bincount(target_query, rank < k, minlength=40)
        targets = np.bincount(target_query, minlength=40)
        expected = np.where(targets > 0, hits / np.maximum(targets, 1), np.nan)
        np.testing.assert_allclose(
            recall(found.greater, found.equal, target_query, 40, k), expected
        )


def test_products_with_the_same_vector_tie_though_floats_differ_in_the_last_bit():
    rng = np.random.default_rng(1)
    query = unit(rng, 1, 128)
    products = np.repeat(query, 8, axis=0) * (1 + 1e-7 * np.arange(8)[:, None]).astype(np.float32)
    target = np.array([0])
    found = search_catalogue(DotProduct(query, products), 1, target, target, 4)
    assert (found.greater[0], found.equal[0]) == (0, 8)
    assert recall(found.greater, found.equal, target, 1, 2)[0] == pytest.approx(2 / 8)


def test_ties_between_tiles_are_ordered_and_counted_as_in_one(monkeypatch):
    """40 different vectors, 25 copies of each, spread over tiles of 64."""
    rng = np.random.default_rng(3)
    products, queries = unit(rng, 40, 8)[rng.permutation(1000) % 40], unit(rng, 30, 8)
    target_query, target_product = np.divmod(np.sort(rng.choice(30_000, 400, replace=False)), 1000)
    args = DotProduct(queries, products), 30, target_query, target_product, 60
    whole = search_catalogue(*args)
    monkeypatch.setattr(module, "TILE", 64)
    tiled = search_catalogue(*args, block_bytes=4 * 64 * 7)
    for name in ("greater", "equal"):
        np.testing.assert_array_equal(getattr(tiled, name), getattr(whole, name))
    reached = whole.greater < 60
    assert reached.any()
    assert (whole.equal[reached] == 25).all()
    exact = queries.astype(np.float64) @ products.T.astype(np.float64)
    above = exact[target_query] > exact[target_query, target_product][:, None] + 1e-6
    np.testing.assert_array_equal(tiled.greater[reached], above.sum(axis=1)[reached])


def test_vectors_on_disk_are_searched_without_being_loaded(tmp_path):
    rng = np.random.default_rng(4)
    queries, products = unit(rng, 5, 16), unit(rng, 300, 16)
    np.save(tmp_path / "products.npy", products)
    mapped = np.load(tmp_path / "products.npy", mmap_mode="c")
    none = np.empty(0, np.int64)
    np.testing.assert_array_equal(
        search_catalogue(DotProduct(queries, mapped), 5, none, none, 10).top,
        search_catalogue(DotProduct(queries, products), 5, none, none, 10).top,
    )


def test_ties_that_reach_beyond_the_list_are_counted_in_the_whole_catalogue():
    scores = np.array([[5.0, *[1.0] * 100, 0.0]])
    query, product = np.zeros(1, np.int64), np.array([70])
    found = search_catalogue(Fixed(scores), 1, query, product, 11)
    assert (found.greater[0], found.equal[0]) == (1, 100)
    assert expected_hits(found.greater, found.equal, 11)[0] == pytest.approx(10 / 100)
    np.testing.assert_array_equal(found.top[0], np.arange(11))  # ties by catalogue row


def test_a_product_that_is_not_returned_is_never_a_hit():
    scores = np.array([[1.0, -np.inf, -np.inf]])
    query = np.zeros(2, np.int64)
    found = search_catalogue(Fixed(scores), 1, query, np.array([0, 1]), 3)
    np.testing.assert_array_equal(found.top, [[0, -1, -1]])
    assert recall(found.greater, found.equal, query, 1, 3)[0] == 0.5


def test_a_query_without_a_target_has_no_recall():
    found = search_catalogue(Fixed(np.eye(2)), 2, np.array([1]), np.array([1]), 1)
    values = recall(found.greater, found.equal, np.array([1]), 2, 1)
    assert np.isnan(values[0])
    assert values[1] == 1.0


def test_ranks_from_lists_equal_ranks_from_scores_inside_the_lists():
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 1000, (30, 200)).astype(np.float32)
    scores += np.arange(200) / 1024  # distinct
    query, product = np.divmod(rng.choice(30 * 200, 400, replace=False), 200)
    found = search_catalogue(Fixed(scores), 30, query, product, 25)
    greater, equal = ranks_in_lists(found.top, found.top_score, query, product)
    rank = (scores[query] > scores[query, product][:, None]).sum(axis=1)
    np.testing.assert_array_equal(greater, np.minimum(rank, 25))
    assert (equal == 1).all()


def test_scores_of_a_list_that_differ_by_less_than_a_tie_are_equal():
    top = np.array([[4, 0, 2, 7]], np.int32)
    score = np.array([[0.9, 0.5 + 2e-7, 0.5, 0.5 - 2e-7]], np.float32)
    query, product = np.zeros(3, np.int64), np.array([4, 2, 9])
    greater, equal = ranks_in_lists(top, score, query, product, tie=1e-6)
    assert list(zip(greater.tolist(), equal.tolist(), strict=True)) == [(0, 1), (1, 3), (4, 1)]
    greater, equal = ranks_in_lists(top, score, query, product)
    assert list(zip(greater.tolist(), equal.tolist(), strict=True)) == [(0, 1), (2, 1), (4, 1)]
