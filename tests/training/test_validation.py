import dataclasses
import shutil
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


@pytest.fixture(scope="module")
def long_log(handmade_paths: StagePaths, tmp_path_factory: pytest.TempPathFactory) -> StagePaths:
    """A validation day of 40,000 searches of up to 16 products, in row groups of 20,000 rows."""
    root = tmp_path_factory.mktemp("long") / "ingest"
    shutil.copytree(handmade_paths.ingest, root)
    rng = np.random.default_rng(1)
    search = np.repeat(np.arange(40_000), rng.integers(1, 17, 40_000))
    columns = {
        "search": pa.array(search),
        "query": pa.array((search * 7 % 900).astype(np.int32)),
        "product": pa.array(rng.integers(0, 5_000, len(search)).astype(np.int32)),
        "position": pa.array(np.ones(len(search), np.int16)),
        "clicked": pa.array(rng.random(len(search)) < 0.1),
    }
    table = pa.table(columns)
    pq.write_table(table, root / "valid_impressions.parquet", row_group_size=20_000)
    lists = rng.integers(0, 99, (5_000, 2)).astype(np.int32)
    np.save(root / "lookups" / "product_hot_lists.npy", lists)
    lists_table = pa.table({"train": lists[:, 0], "test": lists[:, 1]})
    pq.write_table(lists_table, root / "product_hot_lists.parquet")
    return dataclasses.replace(handmade_paths, ingest=root)


@pytest.mark.parametrize(
    ("searches", "products"), [(300, 4_000), (300, 1_000), (10**6, 10**6), (1, 3), (50, 1)]
)
def test_a_sample_of_a_long_log_is_that_of_a_plain_loop(
    searches: int, products: int, settings: Settings, long_log: StagePaths
) -> None:
    size = {"valid_searches": searches, "valid_products": products}
    settings = settings.model_copy(update={"train": settings.train.model_copy(update=size)})
    sample = ValidationSample.draw(settings, long_log)
    rows = pq.read_table(long_log.ingest / "valid_impressions.parquet").to_pylist()
    by_search: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_search.setdefault(row["search"], []).append(row)
    rng = np.random.default_rng(6)
    taken: list[int] = []
    shown: set[int] = set()
    for search in rng.permutation(np.array(list(by_search)))[:searches].tolist():
        more = shown | {row["product"] for row in by_search[search]}
        if taken and len(more) > products:
            break
        taken.append(search)
        shown = more
    expected = [row for search in sorted(taken) for row in by_search[search]]
    assert sample.search.tolist() == [row["search"] for row in expected]
    assert sample.queries[sample.query].tolist() == [row["query"] for row in expected]
    assert sample.products[sample.product].tolist() == [row["product"] for row in expected]
    assert sample.clicked.tolist() == [row["clicked"] for row in expected]
    others = rng.permutation([row for row in range(5_000) if row not in shown])
    filled = [*sorted(shown), *others[: max(0, products - len(shown))]]
    assert sample.products.tolist() == filled
    lists = pq.read_table(long_log.ingest / "product_hot_lists.parquet")["train"].to_numpy()
    np.testing.assert_array_equal(sample.hot_lists, lists[sample.products])


def test_a_sample_takes_no_memory_for_impressions_that_are_not_in_it(
    settings: Settings, long_log: StagePaths
) -> None:
    rows = pq.read_metadata(long_log.ingest / "valid_impressions.parquet").num_rows
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        ValidationSample.draw(settings, long_log)
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert peak < 16 * rows  # all rows of its four columns are 17 bytes each


def test_the_measures_are_scikit_learns_auc_a_search_and_ranks_counted_by_hand(
    settings: Settings, paths: StagePaths
) -> None:
    sample = ValidationSample.draw(settings, paths)
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
    sample = ValidationSample.draw(settings, paths)
    queries = np.tile(np.eye(1, 8, dtype=np.float32), (len(sample.queries), 1))
    products = np.tile(queries[:1], (len(sample.products), 1))
    products += np.random.default_rng(0).normal(size=products.shape).astype(np.float32) * 1e-8
    measured = sample.measure(queries, products)
    assert measured["recall_100"] == pytest.approx(K / len(sample.products))
    assert measured["gauc"] == pytest.approx(0.5)


def test_a_log_of_clicks_alone_has_no_gauc(settings: Settings, paths: StagePaths) -> None:
    sample = ValidationSample.draw(settings, paths)
    assert sample.has_gauc
    only = dataclasses.replace(sample, clicked=np.ones_like(sample.clicked))
    assert not only.has_gauc
    vectors = np.ones((len(sample.queries), 1), np.float32), np.ones((len(sample.products), 1))
    assert np.isnan(only.measure(vectors[0], vectors[1].astype(np.float32))["gauc"])
