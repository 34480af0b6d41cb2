"""Oracles: scikit-learn, and counts by hand."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score

from acebert.data.cnn_labels import PhotoLabels
from acebert.data.features import FeatureStore, Shard, write_shard, write_shard_list
from acebert.data.tokens import Ragged
from acebert.training.cnn_validation import (
    FEWEST,
    HeldOutPhotos,
    Predictions,
    average_precision,
    recall_among,
    word_precision,
)

RNG = np.random.default_rng(0)
TAGS = ["red", "blue", "shirt", *(f"w{i}" for i in range(9))]
RED, BLUE, SHIRT = range(3)


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


def held_out_photos(root: Path) -> HeldOutPhotos:
    """Of seven products all but the first; the fifth's title names no colour, a click does."""
    named = [[RED], [RED, SHIRT], [SHIRT], [BLUE, SHIRT], [SHIRT], [RED, SHIRT], []]
    Ragged.from_rows(named).save(root, "words")
    np.save(root / "words.target.npy", np.array([1, 1, 1, 1, 1, 1, 1, 0.75, 1], np.float32))
    np.save(root / "category.npy", np.array([0, 0, 1, 1, -1, 0, 1], np.int32))
    np.save(root / "train.npy", np.arange(1))
    np.save(root / "held_out.npy", np.arange(1, 7))
    (root / "categories.json").write_text(json.dumps(["dresses", "shirts"]))
    products = [4, 2, 6] + [1] * 9
    pq.write_table(pa.table({"word": TAGS, "products": products}), root / "tags.parquet")
    pixels = np.zeros((7, 7, 7, 3), np.uint8)
    shard = Shard(np.arange(7), np.ones(7, bool), np.zeros((7, 4)), None, pixels)
    write_shard_list(root, [write_shard(root, "part-0.arrow", shard)], 0, 7)
    return HeldOutPhotos(FeatureStore(root), PhotoLabels(root))


def test_what_is_measured_on_held_out_photos_by_hand(tmp_path: Path):
    category = np.array([[2, 1], [0, 1], [1, 0], [9, 0], [1, 0], [1, 0]], np.float32)
    tags = np.zeros((6, len(TAGS)), np.float32)  # ten of twelve are looked at, the first at a tie
    tags[0, [RED, BLUE, SHIRT]] = -1, -2, 5  # red is the likelier colour, but not of the ten
    tags[1, SHIRT] = 4
    tags[2, [BLUE, SHIRT]] = 1, 3
    tags[3, SHIRT] = -9
    tags[4, [RED, SHIRT]] = -1, 1
    tags[5, SHIRT] = 2  # its title names nothing
    assert held_out_photos(tmp_path).measure(Predictions(category, tags)) == pytest.approx(
        {
            "category_accuracy": 3 / 5,  # the fourth has none
            "tag_map": (1 + 1 + 1 + 4 / 5 + 5 / 6) / 5,  # of shirt alone: it has FEWEST titles
            "tag_map_random": 5 / 6,
            "tag_recall_10": (1 / 2 + 1 + 1 + 0 + 1) / 5,
            "colour_recall_1": 1,
            "colour_recall_3": 1,
            "colour_recall_1_of_the_commonest": 1 / 2,
        }
    )
