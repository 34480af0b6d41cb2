import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from acebert.config import Settings
from acebert.training.pairs import StagePaths
from acebert.training.validation import K, ValidationSample


def test_all_seeds_are_measured_on_the_same_sample(settings: Settings, paths: StagePaths) -> None:
    one, other = (
        dataclasses.astuple(
            ValidationSample.draw(settings.model_copy(update={"seed": seed}), paths)
        )
        for seed in (0, 7)
    )
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_the_measures_are_scikit_learns_auc_a_search_and_ranks_counted_by_hand(
    settings: Settings, paths: StagePaths
) -> None:
    few = settings.train.model_copy(update={"valid_products": 120})
    sample = ValidationSample.draw(settings.model_copy(update={"train": few}), paths)
    assert len(sample.products) > K
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(len(sample.queries), 8)).astype(np.float32)
    products = rng.normal(size=(len(sample.products), 8)).astype(np.float32)
    scores = queries @ products.T
    aucs, weights = [], []
    for search in np.unique(sample.search):
        rows = sample.search == search
        if 0 < sample.clicked[rows].sum() < rows.sum():
            of = scores[sample.query[rows], sample.product[rows]]
            aucs.append(roc_auc_score(sample.clicked[rows], of))
            weights.append(rows.sum())
    recalls = []
    for query in np.unique(sample.query[sample.clicked]):
        targets = np.unique(sample.product[sample.clicked & (sample.query == query)])
        first = np.argsort(-scores[query])[:K]
        recalls.append(np.isin(targets, first).mean())
    measured = sample.measure(queries, products)
    assert measured["gauc"] == pytest.approx(np.average(aucs, weights=weights))
    assert measured["recall_100"] == pytest.approx(np.mean(recalls))


def test_a_collapsed_encoder_is_measured_as_chance(settings: Settings, paths: StagePaths) -> None:
    few = settings.train.model_copy(update={"valid_products": 120})
    sample = ValidationSample.draw(settings.model_copy(update={"train": few}), paths)
    queries = np.tile(np.eye(1, 8, dtype=np.float32), (len(sample.queries), 1))
    products = np.tile(queries[:1], (len(sample.products), 1))
    products += np.random.default_rng(0).normal(size=products.shape).astype(np.float32) * 1e-8
    measured = sample.measure(queries, products)
    assert measured["recall_100"] == pytest.approx(K / len(sample.products))
    assert measured["gauc"] == pytest.approx(0.5)
