import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from acebert.evaluation.baselines import (
    Bm25,
    ClickLookup,
    Popularity,
    add_clicks,
    clicks_before,
    reciprocal_rank_fusion,
    titles_with_hot_queries,
    words,
)
from acebert.evaluation.testset import load_test_set


def test_bm25_of_a_catalogue_without_a_word_finds_nothing():
    assert np.isneginf(all_scores(Bm25(["", "the", ""], ["red shirt"]), 1)).all()


def all_scores(scorer, queries):
    out = torch.empty(queries, scorer.products)
    scorer.score(np.arange(queries), out)
    return out.numpy()


def test_bm25_is_the_formula():
    titles = ["red shirt", "blue shirt shirt cotton", "black hat"]
    scores = all_scores(Bm25(titles, ["shirt red", "the"]), 2)
    k1, b, mean_length = 1.5, 0.75, 8 / 3

    def term(frequency, length, documents):
        idf = math.log(1 + (3 - documents + 0.5) / (documents + 0.5))
        return idf * frequency / (frequency + k1 * (1 - b + b * length / mean_length))

    expected = [term(1, 2, 2) + term(1, 2, 1), term(2, 4, 2)]
    np.testing.assert_allclose(scores[0, :2], expected, rtol=1e-5)
    assert np.isneginf(scores[0, 2])  # shares no word: not returned
    assert np.isneginf(scores[1]).all()  # a query of stop words finds nothing


def test_words_are_lower_case_runs_of_two_letters_or_more():
    assert words(["Men's T-Shirt, the XL", ""]) == [["men", "shirt", "xl"], []]


def test_click_lookup_returns_what_was_clicked_for_the_query_by_clicks():
    scorer = ClickLookup(
        4,
        3,
        query=np.array([0, 0, 2, 0]),
        product=np.array([1, 3, 2, 1]),
        clicks=np.array([2, 1, 5, 4]),
    )
    none = -np.inf
    expected = [[none, 6, none, 1], [none] * 4, [none, none, 5, none]]
    np.testing.assert_array_equal(all_scores(scorer, 3), expected)


def test_popularity_is_the_same_for_every_query():
    scores = all_scores(Popularity(np.array([3, 0, 7])), 2)
    np.testing.assert_array_equal(scores, [[3, -np.inf, 7]] * 2)


def test_fusion_adds_reciprocal_ranks():
    first = np.array([[5, 2, 9]], np.int32)
    second = np.array([[2, 7, -1]], np.int32)
    top, score = reciprocal_rank_fusion(first, second)
    np.testing.assert_array_equal(top, [[2, 5, 7]])
    np.testing.assert_allclose(score, [[1 / 62 + 1 / 61, 1 / 61, 1 / 62]], rtol=1e-6)


def test_fusion_of_empty_lists_is_empty():
    nothing = np.full((1, 2), -1, np.int32)
    top, score = reciprocal_rank_fusion(nothing, nothing)
    assert (top == -1).all()
    assert np.isneginf(score).all()


def test_clicks_before_the_test_day_are_those_of_training_and_validation(world):
    test = load_test_set(world.settings, world.ingested)
    query, product, clicks = clicks_before(world.ingested.path, test)
    expected: dict = {}
    for name in ("pairs", "valid_pairs"):
        for row in pq.read_table(world.ingested.path / f"{name}.parquet").to_pylist():
            key = (world.queries[row["query"]], row["product"])
            expected[key] = expected.get(key, 0) + row["clicks"]
    found: dict = {}
    for q, p, c in zip(query.tolist(), product.tolist(), clicks.tolist(), strict=True):
        key = (test.queries[q], p)
        found[key] = found.get(key, 0) + c
    assert found == expected


def test_hot_queries_follow_the_title(world):
    test = load_test_set(world.settings, world.ingested)
    documents = titles_with_hot_queries(world.ingested.path, test)
    pairs = pq.read_table(world.ingested.path / "pairs.parquet")
    product = pairs["product"][0].as_py()
    own = sorted({r["query"] for r in pairs.to_pylist() if r["product"] == product})
    expected = " ".join([world.titles[product], *(world.queries[q] for q in own)])
    assert documents[product] == expected


def test_a_judged_query_that_was_clicked_on_no_day_finds_nothing_in_the_click_lookup():
    scorer = ClickLookup(2, 1, *(np.empty(0, np.int64) for _ in range(3)))
    assert np.isneginf(all_scores(scorer, 1)).all()


@pytest.mark.parametrize("depth", [1, 4])
def test_fusion_keeps_the_depth(depth):
    lists = np.arange(2 * depth, dtype=np.int32).reshape(2, 1, depth)
    top, _ = reciprocal_rank_fusion(lists[0], lists[1])
    assert top.shape == (1, depth)


def test_clicks_of_any_pairs_are_those_of_the_look_up_and_else_none():
    lookup = ClickLookup(4, 3, np.array([0, 0, 2]), np.array([1, 3, 2]), np.array([2, 1, 5]))
    asked = np.array([0, 0, 1, 2, 2, 0]), np.array([3, 0, 1, 2, 3, 1])
    np.testing.assert_array_equal(lookup.clicks(*asked), [1, 0, 0, 5, 0, 2])
    empty = ClickLookup(2, 1, *(np.empty(0, np.int64) for _ in range(3)))
    np.testing.assert_array_equal(empty.clicks(np.array([0]), np.array([1])), [0])


@pytest.mark.parametrize("weight", [0.0, 0.1, 5.0])
def test_lists_with_clicks_are_those_of_sorting_the_whole_catalogue_by_raised_scores(weight: float):
    rng = np.random.default_rng(0)
    queries, products, depth = 30, 50, 7
    scores = rng.random((queries, products), np.float32)
    clicks = np.where(rng.random((queries, products)) < 0.1, rng.integers(1, 9, scores.shape), 0)
    clicks[3] = 0
    clicks[4, :20] = 2  # more than a list holds
    query, product = np.nonzero(clicks)
    lookup = ClickLookup(products, queries, query, product, clicks[query, product])
    top = np.argsort(-scores, axis=1)[:, :depth].astype(np.int32)
    of_top = np.take_along_axis(scores, top, axis=1)
    of_clicked = scores[lookup.clicked[0], lookup.clicked[1]]
    found, found_score = add_clicks(top, of_top, lookup, of_clicked, weight)
    raised = scores + weight * np.log1p(clicks)
    expected = np.argsort(-raised, axis=1)[:, :depth]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found_score, np.take_along_axis(raised, expected, 1), rtol=1e-6)


def test_lists_shorter_than_their_depth_take_clicked_products_in_and_end_in_none():
    lookup = ClickLookup(5, 2, np.array([1]), np.array([4]), np.array([1]))
    top = np.array([[2, -1, -1], [0, -1, -1]], np.int32)
    score = np.where(top >= 0, np.float32(0.5), -np.inf).astype(np.float32)
    found, found_score = add_clicks(top, score, lookup, np.array([0.1], np.float32), 1.0)
    np.testing.assert_array_equal(found, [[2, -1, -1], [4, 0, -1]])
    expected = [[0.5, -np.inf, -np.inf], [0.1 + math.log(2), 0.5, -np.inf]]
    np.testing.assert_allclose(found_score, expected, rtol=1e-6)
