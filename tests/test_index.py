import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acebert import index as module
from acebert.errors import UserError
from acebert.index import ProductIndex


def clustered(n: int, seed: int, dimensions: int = 32) -> np.ndarray:
    """Unit vectors around 50 centres, as embeddings of categories lie."""
    centres = np.random.default_rng(0).standard_normal((50, dimensions))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, 50, n)] + 0.5 * rng.standard_normal((n, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


PRODUCTS, QUERIES = clustered(4000, 1), clustered(300, 2)
IDS = [f"p{i}" for i in range(4000)]


@pytest.fixture(params=["hnsw", "ivf"])
def index(request) -> ProductIndex:
    ann_from = 4001 if request.param == "hnsw" else 4000
    built = ProductIndex.build(PRODUCTS, IDS, QUERIES, ann_from=ann_from, k=50)
    assert built.info.kind == request.param
    return built


def test_exact_search_is_numpys_order(index: ProductIndex):
    scores, rows = index.search(QUERIES, 20, exact=True)
    exact = QUERIES.astype(np.float64) @ PRODUCTS.T.astype(np.float64)
    order = np.argsort(-exact, axis=1)[:, :20]
    best = np.take_along_axis(exact, order, 1)
    np.testing.assert_allclose(scores, best, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, rows, 1), best, atol=1e-6)
    assert all(len(set(row)) == 20 for row in rows)


def test_the_effort_reaches_the_recall_it_was_set_for_on_other_queries(index: ProductIndex):
    others = clustered(300, 3)
    _, rows = index.search(others, 50)
    exact = np.argsort(-(others @ PRODUCTS.T), axis=1)[:, :50]
    recall = np.mean([len(set(a) & set(b)) / 50 for a, b in zip(rows, exact, strict=True)])
    assert recall >= 0.93
    assert index.info.tuned_recall >= 0.95
    assert index.recall(others, 50) == pytest.approx(recall, abs=1e-3)


def test_a_search_of_few_lists_is_less_than_exact_and_says_so():
    index = ProductIndex.build(PRODUCTS, IDS, QUERIES, ann_from=1, k=50, target_recall=0.0)
    assert index.info.effort == 1
    assert 0.05 < index.recall(QUERIES, 50) < 0.95


def test_saved_and_loaded_it_finds_the_same(index: ProductIndex, tmp_path: Path):
    index.save(tmp_path / "index")
    again = ProductIndex.load(tmp_path / "index")
    assert again.info == index.info
    assert again.product_ids == IDS
    for exact in (False, True):
        for ours, theirs in zip(
            index.search(QUERIES, 10, exact=exact),
            again.search(QUERIES, 10, exact=exact),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_more_lists_or_hits_than_a_gpu_takes_are_searched_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
):
    index = ProductIndex.build(PRODUCTS, IDS, QUERIES, ann_from=1)
    expected, stored = index.search(QUERIES, 20, exact=True), index._exact

    class Gpu:
        def search(self, queries: np.ndarray, k: int, params: Any) -> Any:
            assert params.nprobe <= 20, "nprobe is too large"
            assert k <= 20, "k is too large"
            return stored.search(queries, k, params=params)

    index._exact = Gpu()
    monkeypatch.setattr(module, "GPU_MOST", 20)
    np.testing.assert_array_equal(index.search(QUERIES, 20, exact=True), expected)
    assert index.info.effort <= 20
    index.search(QUERIES, 20)
    index.search(QUERIES, 21)


def test_an_index_on_a_gpu_has_one_search_at_a_time(monkeypatch: pytest.MonkeyPatch):
    inside, together = 0, 0

    class Gpu:
        def __init__(self, resources: Any, device: int, index: Any) -> None:
            self._index = index

        def search(self, queries: np.ndarray, k: int, params: Any) -> Any:
            nonlocal inside, together
            inside += 1
            together = max(together, inside)
            time.sleep(0.01)
            found = self._index.search(queries, k, params=params)
            inside -= 1
            return found

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", Gpu, raising=False)
    index = ProductIndex.build(PRODUCTS, IDS, QUERIES, ann_from=1, kind="flat")
    together = 0
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: index.search(QUERIES[i : i + 1], 5)[1], range(12)))
    assert together == 1
    expected = np.argsort(-(QUERIES[:12] @ PRODUCTS.T), axis=1)[:, :5]
    np.testing.assert_array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_more_neighbours_than_the_effort_was_set_for_are_all_found(codec: str):
    """A list of IVF holds 64 products here, and the effort is set for 10 neighbours."""
    index = ProductIndex.build(
        PRODUCTS, IDS, QUERIES, ann_from=1, k=10, target_recall=0.5, kind="ivf", codec=codec
    )
    assert (index._search(QUERIES, 400, False, None)[1] < 0).any()
    _, rows = index.search(QUERIES, 400)
    assert (rows >= 0).all()
    best = np.argsort(-(QUERIES @ PRODUCTS.T), axis=1)[:, :400]
    recall = np.mean([len(set(a) & set(b)) / 400 for a, b in zip(rows, best, strict=True)])
    assert recall >= index.info.tuned_recall


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_products_than_asked_for_leave_rows_of_minus_one(n: int):
    for ann_from in (1, 100):
        index = ProductIndex.build(PRODUCTS[:n], IDS[:n], QUERIES, ann_from=ann_from)
        for exact in (False, True):
            _, rows = index.search(QUERIES[:2], 5, exact=exact)
            assert [sorted(row[:n]) for row in rows] == [list(range(n))] * 2
            assert (rows[:, n:] == -1).all()


def test_files_that_do_not_belong_together_are_refused(index: ProductIndex, tmp_path: Path):
    index.save(tmp_path)
    pq.write_table(pa.table({"product_id": IDS[:-1]}), tmp_path / "products.parquet")
    with pytest.raises(UserError, match="3999 ids"):
        ProductIndex.load(tmp_path)
    (tmp_path / "index.faiss").write_bytes(b"not an index")
    with pytest.raises(UserError, match="cannot be read"):
        ProductIndex.load(tmp_path)
    (tmp_path / "index.faiss").unlink()
    with pytest.raises(UserError, match=r"has no index\.faiss"):
        ProductIndex.load(tmp_path)


def test_ids_that_do_not_fit_the_vectors_are_refused():
    with pytest.raises(UserError, match="3 product ids"):
        ProductIndex.build(PRODUCTS, IDS[:3], QUERIES, ann_from=1)


FILTERS = {"few": 0.01, "some": 0.2, "most": 0.9}


@pytest.mark.parametrize("share", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize(
    ("kind", "codec"),
    [("flat", "fp32"), ("flat", "int8"), ("hnsw", "fp32"), ("hnsw", "fp16"), ("ivf", "int8")],
)
def test_a_filtered_search_finds_numpys_best_among_the_allowed(kind, codec, share: float):
    index = ProductIndex.build(
        PRODUCTS, IDS, QUERIES, ann_from=1, k=20, target_recall=0.97, kind=kind, codec=codec
    )
    among = np.random.default_rng(5).random(len(PRODUCTS)) < share
    scores, rows = index.search(QUERIES, 20, among=among)
    exact = np.where(among, QUERIES @ PRODUCTS.T, -np.inf)
    best = np.argsort(-exact, axis=1)[:, :20]
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(rows, best, strict=True)])
    assert among[rows].all()
    assert recall >= (0.999 if kind == "flat" or share < 0.1 else 0.95)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, 1), atol=1e-5)


def test_a_filter_that_few_pass_leaves_rows_of_minus_one(index: ProductIndex):
    among = np.zeros(len(PRODUCTS), bool)
    among[[7, 70, 700]] = True
    _, rows = index.search(QUERIES[:3], 5, among=among)
    assert [sorted(row[:3]) for row in rows] == [[7, 70, 700]] * 3
    assert (rows[:, 3:] == -1).all()


@pytest.mark.parametrize(("kind", "codec"), [("hnsw", "fp32"), ("ivf", "fp32"), ("ivf", "int8")])
def test_a_filter_on_products_far_from_the_query_finds_all_that_there_are(kind, codec):
    rng, centres = np.random.default_rng(6), np.eye(2, 32)  # shoes, electronics
    near, far = np.full(2400, 0), np.full(1600, 1)
    vectors = centres[np.r_[near, far]] + 0.02 * rng.standard_normal((4000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries = vectors[:30]
    index = ProductIndex.build(
        vectors, IDS, queries, ann_from=1, k=10, target_recall=0.5, kind=kind, codec=codec
    )
    among = np.arange(4000) >= len(near)
    assert (index._search(queries, 10, False, among)[1] < 0).any()
    scores, rows = index.search(queries, 10, among=among)
    assert among[rows].all()
    best = -np.sort(-(queries @ vectors[among].T), axis=1)[:, :10]
    np.testing.assert_allclose(scores, best, atol=1e-3 if codec == "int8" else 1e-5)


@pytest.mark.slow
def test_pq_codes_rescored_by_exact_vectors_reach_the_recall_of_the_target():
    products, queries = clustered(4000, 1, 8), clustered(300, 2, 8)
    index = ProductIndex.build(products, IDS, queries, ann_from=1, k=20, kind="ivf", codec="pq")
    scores, rows = index.search(queries, 20)
    assert index.info.tuned_recall >= 0.95
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ products.T, rows, 1), atol=1e-5)
