"""What every row of the results is measured on: the test day's queries, clicks and impressions.

Read from the ingest stage once, and the same for embeddings and baselines. Queries are numbered
densely from 0 in the order of their texts, so that arrays of two rows line up.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.data.schema import normalize_query
from acebert.errors import UserError
from acebert.evaluation.trec import Judgement, read_qrels
from acebert.workdir import Stage


@dataclass(frozen=True)
class Judgements:
    """Judged relevance of the user's own, graded above zero (J judgements)."""

    query: NDArray[np.int64]
    """query rows [J]"""
    product: NDArray[np.int64]
    """catalogue rows [J]"""
    grade: NDArray[np.float64]
    """[J]"""
    unknown_products: int
    """judgements left out because their product is not in the catalogue"""


@dataclass(frozen=True)
class TestSet:
    """Q queries, T clicked pairs (targets), m impressions, n products."""

    __test__ = False  # not a test class, whatever its name says to pytest

    product_ids: list[str]
    titles: list[str]
    """'' where there is none [n]"""
    has_image: NDArray[np.bool_]
    """the catalogue names a photo [n]"""
    warm: NDArray[np.bool_]
    """clicked on some day before the test day [n]"""
    queries: list[str]
    """normalised texts: all that the test day's log or the judgements hold [Q]"""
    log_query: NDArray[np.int64]
    """row in ingest's queries.parquet; -1 where a query is only judged [Q]"""
    seen: NDArray[np.bool_]
    """clicked on some day before the test day [Q]"""
    target_query: NDArray[np.int64]
    """sorted [T]"""
    target_product: NDArray[np.int64]
    search: NDArray[np.int64]
    """group ids [m]"""
    shown_query: NDArray[np.int64]
    shown_product: NDArray[np.int64]
    position: NDArray[np.float32]
    """rank in the engine's own list; NaN where the log does not say [m]"""
    clicked: NDArray[np.bool_]
    judgements: Judgements | None

    @property
    def impressions(self) -> NDArray[np.int64]:
        """Test-day impressions of each query [Q]."""
        return np.bincount(self.shown_query, minlength=len(self.queries))


def load_test_set(settings: Settings, ingested: Stage) -> TestSet:
    """Read the test day from the ingest stage.

    Raises:
        UserError: the qrels file is missing, malformed, or names no product of the catalogue.
    """
    root = ingested.path
    product_ids, titles, has_image = _products(root)
    shown = pq.read_table(root / "test_impressions.parquet")
    clicks = pq.read_table(root / "test_pairs.parquet", columns=["query", "product"])
    pairs = np.unique(
        _column(clicks, "query").astype(np.int64) * len(product_ids) + _column(clicks, "product")
    )
    log = pq.read_table(root / "queries.parquet")
    in_test = np.union1d(_column(shown, "query"), pairs // len(product_ids))
    judged = _read_judged(settings)

    texts = log["text"].take(pa.array(in_test)).to_pylist()
    of_log = dict(zip(texts, in_test, strict=True))
    queries = sorted({*texts, *(j.query for j in judged)})
    row = {text: i for i, text in enumerate(queries)}
    log_query = np.array([of_log.get(text, -1) for text in queries], np.int64)
    if judged and (log_query < 0).any():
        log_query = _find_in_log(log, queries, log_query)
    to_row = np.full(log.num_rows, -1, np.int64)
    to_row[in_test] = [row[text] for text in texts]

    target_query, target_product = np.divmod(pairs, len(product_ids))
    target_query = to_row[target_query]
    order = np.lexsort((target_product, target_query))
    before = _queries_clicked_before(root, log)
    return TestSet(
        product_ids=product_ids,
        titles=titles,
        has_image=has_image,
        warm=_clicked_before(root, len(product_ids)),
        queries=queries,
        log_query=log_query,
        seen=np.where(log_query >= 0, before[log_query], False),
        target_query=target_query[order],
        target_product=target_product[order].astype(np.int64),
        search=_column(shown, "search").astype(np.int64),
        shown_query=to_row[_column(shown, "query")],
        shown_product=_column(shown, "product").astype(np.int64),
        position=pc.cast(shown["position"], pa.float32()).fill_null(float("nan")).to_numpy(),
        clicked=_column(shown, "clicked"),
        judgements=_match(judged, row, product_ids, settings) if settings.eval.qrels else None,
    )


def evaluation_queries(settings: Settings, ingested: Stage) -> list[str]:
    """Texts of all queries that an evaluation needs vectors of: the test day's and the judged."""
    shown = pq.read_table(ingested.path / "test_impressions.parquet", columns=["query"])
    clicks = pq.read_table(ingested.path / "test_pairs.parquet", columns=["query"])
    rows = np.union1d(_column(shown, "query"), _column(clicks, "query"))
    text = pq.read_table(ingested.path / "queries.parquet", columns=["text"])["text"]
    judged = {judgement.query for judgement in _read_judged(settings)}
    return sorted(judged.union(text.take(pa.array(rows)).to_pylist()))


def _column(table: pa.Table, name: str) -> NDArray:
    return table[name].to_numpy()


def _products(root: Path) -> tuple[list[str], list[str], NDArray[np.bool_]]:
    """Ids, titles, whether there is a photo, by row; photos stream by and are not kept."""
    scanner = ds.dataset(root / "products").scanner(
        columns={
            "product": ds.field("product"),
            "product_id": ds.field("product_id"),
            "title": ds.field("title"),
            "has_image": ds.field("image").is_valid() | ds.field("image_uri").is_valid(),
        },
        batch_size=1000,
    )
    table = scanner.to_table().sort_by("product")
    return (
        table["product_id"].to_pylist(),
        table["title"].fill_null("").to_pylist(),
        _column(table, "has_image"),
    )


def _clicked_before(root: Path, products: int) -> NDArray[np.bool_]:
    warm = np.zeros(products, bool)
    for name in ("pairs.parquet", "valid_pairs.parquet"):
        warm[_column(pq.read_table(root / name, columns=["product"]), "product")] = True
    return warm


def _queries_clicked_before(root: Path, log: pa.Table) -> NDArray[np.bool_]:
    """The validation day's too: at test time products' hot lists hold them."""
    clicked = _column(log, "clicks") > 0  # training days
    clicked[_column(pq.read_table(root / "valid_pairs.parquet", columns=["query"]), "query")] = True
    return clicked


def _read_judged(settings: Settings) -> list[Judgement]:
    if settings.eval.qrels is None:
        return []
    return [
        Judgement(normalize_query(j.query), j.product_id, j.grade)
        for j in read_qrels(settings.eval.qrels)
    ]


def _find_in_log(log: pa.Table, queries: list[str], log_query: NDArray) -> NDArray[np.int64]:
    """Rows of judged queries that the log has on other days."""
    found = pc.index_in(pa.array(queries, log["text"].type), log["text"].combine_chunks())
    return np.where(log_query < 0, found.fill_null(-1).to_numpy(), log_query).astype(np.int64)


def _match(
    judged: list[Judgement], row: dict[str, int], product_ids: list[str], settings: Settings
) -> Judgements:
    product_row = {product_id: i for i, product_id in enumerate(product_ids)}
    graded = {
        (row[j.query], product_row[j.product_id]): j.grade
        for j in judged
        if j.product_id in product_row and j.grade > 0
    }
    if not graded:
        raise UserError(
            f"{settings.eval.qrels}: no judgement above 0 names a product of the catalogue. "
            "The third column must hold product_id as in data.products"
        )
    keys = np.array(sorted(graded), np.int64)
    return Judgements(
        query=keys[:, 0],
        product=keys[:, 1],
        grade=np.array([graded[q, p] for q, p in keys.tolist()], np.float64),
        unknown_products=sum(j.product_id not in product_row for j in judged),
    )
