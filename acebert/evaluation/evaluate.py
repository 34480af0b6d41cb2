"""The 'evaluate' stage: metrics of embeddings, and of the rows that need no training.

A row of the results is a directory, the same for a model and for a baseline:

* `metrics.json`: `name`, `overall`, `interval` (95 %), `counts`, `breakdown`, `notes`; `judged`
  where there are judgements; of a model also `ann`, `beyond_bm25` and `domain_probe`
* `per_query.parquet`: `query` str, `n_targets`, `impressions` int64; `recall_K`, `rr`, `ndcg_K`
  float64 (null without a target); `seen`, `head` bool
* `per_target.parquet`: `query`, `product_id` str, `greater`, `equal` int64 (see `recall.Found`),
  `cold`, `with_image`, `title_lacks` bool
* `per_search.parquet`: `search` int64, `query` str, `auc` float64 (null where a group has none),
  `impressions`, `clicks` int64
* `top.parquet`: `query` str, `product` list<int32> (catalogue rows; -1: none), `score` list<float>
* `run.trec`, `qrels.trec`: the best products of each query; the clicked ones with grade 1

A system without a whole-catalogue order (`position`) has no Recall files, one without scores of
what was shown (`hybrid_bm25`) no per_search.parquet. A model's directory holds `hybrid_bm25/`,
`with_clicks/` and `index/` (acebert.index) too. The baselines' stage holds a directory a row.

Recall, nDCG and MRR are means over the queries with a target, with ties as expected values; the
order of ties in run.trec and top.parquet is the catalogue's.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.errors import UserError
from acebert.evaluation import HYBRID, WITH_CLICKS, baselines, figures
from acebert.evaluation.breakdown import Groups, breakdown, make_groups
from acebert.evaluation.domain_probe import domain_probe
from acebert.evaluation.gauc import GroupAuc, auc_by_group, weighted_mean
from acebert.evaluation.ranking import ndcg, reciprocal_rank
from acebert.evaluation.recall import (
    DotProduct,
    Found,
    Scorer,
    expected_hits,
    ranks_in_lists,
    recall,
    search_catalogue,
)
from acebert.evaluation.significance import Ratios, intervals, mean_of_queries, weighted_by_query
from acebert.evaluation.tables import Row
from acebert.evaluation.testset import TestSet, load_test_set
from acebert.evaluation.trec import Judgement, file_bytes, write_qrels, write_run
from acebert.index import ProductIndex
from acebert.workdir import Stage, run_stage

log = logging.getLogger(__name__)

VERSION = 4
BASELINES = ("bm25_titles", "bm25_titles_hot", "click_lookup", "popularity", "position")
LEXICAL = "bm25_titles_hot"  # the lexical engine that a model is fused with: the stronger one
RUN_DEPTH = 100  # products a query in run.trec; more where eval.ks asks for more
ANN_QUERIES = 1000
PROBE_ROWS = 2000
READ_ROWS = 65_536


def evaluate_embeddings(
    settings: Settings, ingested: Stage, embedded_dir: Path, name: str
) -> Stage:
    """Metrics of the vectors in `embedded_dir` on the test day.

    Args:
        embedded_dir: holds products.parquet (product_id, embedding) and queries.parquet (query,
            embedding): float32 lists of one length, L2-normalised. They must cover the catalogue
            and `testset.evaluation_queries`; the order is free, and more rows do no harm.
        name: what the row is called.

    Raises:
        UserError: a file, column, product or query is missing, or a vector is not finite or not
            of length 1; it names the first.
    """
    lexical = evaluate_baselines(settings, ingested).path / LEXICAL
    key = _key(settings, ingested) | {
        "name": name,
        "click_weight": settings.serve.click_weight,
        "embedded": [_digest(embedded_dir / f) for f in ("products.parquet", "queries.parquet")],
    }

    def build(out: Path) -> None:
        test = load_test_set(settings, ingested)
        products = read_vectors(embedded_dir / "products.parquet", "product_id", test.product_ids)
        queries = read_vectors(embedded_dir / "queries.parquet", "query", test.queries)
        if products.shape[1] != queries.shape[1]:
            raise UserError(
                f"{embedded_dir}: products have {products.shape[1]} dimensions, queries "
                f"{queries.shape[1]}; both must come from one model"
            )
        row = _Row(name, settings, test, make_groups(test, settings.eval.head_share))
        scorer = DotProduct(queries, products)
        found, ranks = row.search(scorer)
        searches = row.auc(found.pair_score, scorer.tie)

        bm25_top = pq.read_table(lexical / "top.parquet")
        bm25_ranks = _read_ranks(lexical)
        index = ProductIndex.build(
            products, test.product_ids, queries[::2], ann_from=settings.eval.ann_from, k=row.depth
        )
        index.save(out / "index")
        extra = {
            "beyond_bm25": _beyond(ranks, bm25_ranks, max(settings.eval.ks)),
            # On other queries than those that its effort was set on, where there are any.
            "ann": _ann(index, queries[1::2] if len(queries) > 1 else queries, row.depth),
            "domain_probe": domain_probe(_some(queries), _some(products)),
        }
        row.write(out, ranks, found.top, found.top_score, searches, extra)

        hybrid = _Row(HYBRID, settings, test, row.groups)
        top, score = baselines.reciprocal_rank_fusion(found.top, _lists(bm25_top["product"]))
        hybrid.write(out / HYBRID, hybrid.ranks_in(top, score), top, score, None)
        past = _past_clicks(test, *baselines.clicks_before(ingested.path, test))
        clicked = _Row(WITH_CLICKS, settings, test, row.groups)
        query, product, _ = past.clicked
        weight = settings.serve.click_weight
        top, score = baselines.add_clicks(
            found.top,
            found.top_score,
            past,
            _dot_products(queries, products, query, product),
            weight,
        )
        shown = np.log1p(past.clicks(test.shown_query, test.shown_product))
        raised = (found.pair_score + weight * shown).astype(np.float32)
        searches = row.auc(raised, scorer.tie)
        ranks = clicked.ranks_in(top, score, scorer.tie)
        clicked.write(out / WITH_CLICKS, ranks, top, score, searches)
        figures.breakdown_figure(
            [out, out / WITH_CLICKS, out / HYBRID, lexical], out / "breakdown.png"
        )

    return run_stage(settings.workdir, "evaluate", key, build)


def _some(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """PROBE_ROWS of them at most, at random."""
    return np.random.default_rng(0).permutation(vectors)[:PROBE_ROWS]


def evaluate_baselines(settings: Settings, ingested: Stage) -> Stage:
    """Metrics of each of `BASELINES`, a directory each."""

    def build(out: Path) -> None:
        test = load_test_set(settings, ingested)
        groups = make_groups(test, settings.eval.head_share)
        query, product, clicks = baselines.clicks_before(ingested.path, test)
        n = len(test.product_ids)
        scorers: dict[str, Callable[[], Scorer]] = {
            "bm25_titles": lambda: baselines.Bm25(test.titles, test.queries),
            "bm25_titles_hot": lambda: baselines.Bm25(
                baselines.titles_with_hot_queries(ingested.path, test), test.queries
            ),
            "click_lookup": lambda: _past_clicks(test, query, product, clicks),
            "popularity": lambda: baselines.Popularity(
                np.bincount(product, clicks, minlength=n).astype(np.int64)
            ),
        }
        for name, make in scorers.items():
            row = _Row(name, settings, test, groups)
            found, ranks = row.search(make())
            searches = row.auc(found.pair_score, 0.0)
            row.write(out / name, ranks, found.top, found.top_score, searches)
        _position(out / "position", settings, test, groups)
        rows = [Row.of(out / name) for name in BASELINES]
        figures.rows_figure(rows, out / "rows.png")

    return run_stage(settings.workdir, "evaluate", _key(settings, ingested), build)


def _dot_products(
    queries: NDArray[np.float32],
    products: NDArray[np.float32],
    query: NDArray[np.int64],
    product: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Of pairs of rows, some at a time [c]."""
    found = np.empty(len(query), np.float32)
    for first in range(0, len(query), READ_ROWS):
        some = slice(first, first + READ_ROWS)
        np.einsum("cd,cd->c", queries[query[some]], products[product[some]], out=found[some])
    return found


def _past_clicks(
    test: TestSet,
    query: NDArray[np.int64],
    product: NDArray[np.int64],
    clicks: NDArray[np.int64],
) -> baselines.ClickLookup:
    """Of what `baselines.clicks_before` gives, the clicks for the test set's queries."""
    asked = query >= 0
    return baselines.ClickLookup(
        len(test.product_ids), len(test.queries), query[asked], product[asked], clicks[asked]
    )


def read_vectors(path: Path, column: str, wanted: list[str]) -> NDArray[np.float32]:
    """Vectors of the `wanted` products or queries, in that order: float32 [len(wanted), D].

    Raises:
        UserError: see `evaluate_embeddings`.
    """
    what = {"product_id": "product", "query": "query"}[column]
    try:
        ids = pq.read_table(path, columns=[column])[column].cast(pa.string())
        file = pq.ParquetFile(path)
        file.schema_arrow.field("embedding")
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: must be a Parquet file with columns {column} and embedding: {error}"
        ) from error
    found = pc.index_in(pa.array(wanted, pa.string()), ids)
    if found.null_count:
        first = wanted[found.is_null().to_pylist().index(True)]
        raise UserError(
            f"{path}: no embedding of {what} {first!r} ({found.null_count} of {len(wanted)} are "
            "missing); embed every product of the catalogue and every query of the test day"
        )
    place = np.full(len(ids), -1, np.int64)
    place[found.to_numpy()] = np.arange(len(wanted))
    out = np.empty((0, 0), np.float32)
    at = 0
    for batch in file.iter_batches(READ_ROWS, columns=["embedding"]):
        vectors = _matrix(path, batch.column(0), out.shape[1])
        if not out.size:
            out = np.empty((len(wanted), vectors.shape[1]), np.float32)
        rows = place[at : at + len(vectors)]
        out[rows[rows >= 0]] = vectors[rows >= 0]
        at += len(vectors)
    norms = np.linalg.norm(out, axis=1)
    for bad, says in (
        (~np.isfinite(norms), "is not finite"),
        (np.abs(norms - 1) > 1e-3, "is not of length 1"),
    ):
        if bad.any():
            raise UserError(
                f"{path}: the embedding of {what} {wanted[int(bad.argmax())]!r} {says} "
                f"({int(bad.sum())} of {len(wanted)} are not)"
            )
    return out


def _matrix(path: Path, lists: pa.Array, d: int) -> NDArray[np.float32]:
    """Lists as float32 [n, d]; `d` is 0 as long as nobody knows it."""
    lengths = pc.list_value_length(lists)
    d = d or lengths[0].as_py()
    if not d or pc.any(pc.fill_null(pc.not_equal(lengths, d), True)).as_py():
        raise UserError(f"{path}: embeddings must all be lists of one length, the first has {d}")
    return lists.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(-1, d)


@dataclass(frozen=True)
class _Ranks:
    """Ranks of the targets, and of the judged products where there are judgements."""

    greater: NDArray[np.int64]
    equal: NDArray[np.int64]
    judged_greater: NDArray[np.int64]
    judged_equal: NDArray[np.int64]


@dataclass(frozen=True)
class _Row:
    """One system on the test set, from scores to files."""

    name: str
    settings: Settings
    test: TestSet
    groups: Groups

    @property
    def depth(self) -> int:
        return max(RUN_DEPTH, *self.settings.eval.ks)

    def search(self, scorer: Scorer) -> tuple[Found, _Ranks]:
        query, product = self._wanted()
        test = self.test
        log.info("evaluate: %s, %d queries", self.name, len(test.queries))
        found = search_catalogue(
            scorer,
            len(test.queries),
            query,
            product,
            self.depth,
            test.shown_query,
            test.shown_product,
            self.settings.eval.search_mb << 20,
        )
        return found, self._split(found.greater, found.equal)

    def ranks_in(
        self, top: NDArray[np.int32], score: NDArray[np.float32], tie: float = 0.0
    ) -> _Ranks:
        return self._split(*ranks_in_lists(top, score, *self._wanted(), tie))

    def auc(self, score: NDArray[np.float32], tie: float) -> GroupAuc:
        return auc_by_group(self.test.search, score, self.test.clicked, tie)

    def write(
        self,
        out: Path,
        ranks: _Ranks | None,
        top: NDArray[np.int32] | None,
        top_score: NDArray[np.float32] | None,
        searches: GroupAuc | None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        test, ks = self.test, self.settings.eval.ks
        notes: list[str] = []
        ratios: dict[str, Ratios] = {}
        overall: dict[str, float | None] = {"gauc": None}
        counts = {
            "products": len(test.product_ids),
            "queries": len(test.queries),
            "queries_with_targets": len(np.unique(test.target_query)),
            "targets": len(test.target_query),
            "impressions": len(test.search),
        }
        search_query = np.empty(0, np.int64)
        if searches is not None:
            search_query = _query_of_group(test, searches.group)
            result = weighted_mean(searches)
            overall["gauc"] = result.value
            counts |= {
                "searches": len(searches.group),
                "groups": result.groups,
                "groups_left_out_all_clicked": result.left_out_all_clicked,
                "groups_left_out_none_clicked": result.left_out_none_clicked,
            }
            if result.value is None:
                notes.append(_why_no_gauc(test))
            else:
                ratios["gauc"] = weighted_by_query(
                    searches.auc, searches.impressions, search_query, len(test.queries)
                )
            self._write_searches(out, searches, search_query)
        per_query: dict[str, NDArray[np.float64]] = {}
        if ranks is not None:
            per_query = _per_query(
                ranks.greater,
                ranks.equal,
                np.ones(len(test.target_query)),
                test.target_query,
                len(test.queries),
                ks,
                self.depth,
            )
            for column, values in per_query.items():
                name = "mrr" if column == "rr" else column
                ratios[name] = mean_of_queries(values)
                overall[name] = ratios[name].value
            self._write_targets(out, ranks)
            write_qrels(out / "qrels.trec", self._qrels())
        if top is not None and top_score is not None:
            write_run(out / "run.trec", test.queries, test.product_ids, top, top_score, self.name)
            _write_top(out / "top.parquet", test.queries, top, top_score)
        self._write_queries(out, per_query)

        samples = self.settings.eval.bootstrap
        drawn = intervals(list(ratios.values()), samples) if samples and ratios else []
        metrics: dict[str, Any] = {
            "name": self.name,
            "overall": overall,
            "interval": {
                name: {"low": own.low, "high": own.high}
                for name, own in zip(ratios, drawn, strict=False)
            },
            "counts": counts,
            "breakdown": breakdown(
                self.groups,
                test,
                ranks.greater if ranks else np.empty(0, np.int64),
                ranks.equal if ranks else np.empty(0, np.int64),
                searches,
                search_query,
                ks,
            ),
            "notes": notes,
        }
        if ranks is not None and test.judgements is not None:
            metrics["judged"] = self._judged(ranks)
        metrics |= extra or {}
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    def _wanted(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Targets, then judged products."""
        test, judged = self.test, self.test.judgements
        if judged is None:
            return test.target_query, test.target_product
        return (
            np.concatenate([test.target_query, judged.query]),
            np.concatenate([test.target_product, judged.product]),
        )

    def _split(self, greater: NDArray[np.int64], equal: NDArray[np.int64]) -> _Ranks:
        t = len(self.test.target_query)
        return _Ranks(greater[:t], equal[:t], greater[t:], equal[t:])

    def _judged(self, ranks: _Ranks) -> dict[str, float | int]:
        judged = self.test.judgements
        assert judged is not None
        values = _per_query(
            ranks.judged_greater,
            ranks.judged_equal,
            judged.grade,
            judged.query,
            len(self.test.queries),
            self.settings.eval.ks,
            self.depth,
        )
        return {
            "queries": len(np.unique(judged.query)),
            "judgements": len(judged.query),
            "left_out_unknown_products": judged.unknown_products,
            **{name: float(np.nanmean(value)) for name, value in values.items()},
        }

    def _qrels(self) -> list[Judgement]:
        test = self.test
        pairs = zip(test.target_query.tolist(), test.target_product.tolist(), strict=True)
        return [Judgement(test.queries[q], test.product_ids[p], 1) for q, p in pairs]

    def _write_queries(self, out: Path, per_query: dict[str, NDArray[np.float64]]) -> None:
        test = self.test
        columns: dict[str, Any] = {
            "query": test.queries,
            "n_targets": np.bincount(test.target_query, minlength=len(test.queries)),
            "impressions": test.impressions,
            **{name: pa.array(values, from_pandas=True) for name, values in per_query.items()},
            "seen": self.groups.of_query["seen"],
            "head": self.groups.of_query["head"],
        }
        pq.write_table(pa.table(columns), out / "per_query.parquet")

    def _write_targets(self, out: Path, ranks: _Ranks) -> None:
        test, of = self.test, self.groups.of_target
        columns = {
            "query": pa.array(test.queries).take(pa.array(test.target_query)),
            "product_id": pa.array(test.product_ids).take(pa.array(test.target_product)),
            "greater": ranks.greater,
            "equal": ranks.equal,
            "cold": of["cold"],
            "with_image": of["with_image"],
            "title_lacks": of["title_lacks"],
        }
        pq.write_table(pa.table(columns), out / "per_target.parquet")

    def _write_searches(
        self, out: Path, searches: GroupAuc, search_query: NDArray[np.int64]
    ) -> None:
        columns = {
            "search": searches.group,
            "query": pa.array(self.test.queries).take(pa.array(search_query)),
            "auc": pa.array(searches.auc, from_pandas=True),
            "impressions": searches.impressions,
            "clicks": searches.clicks,
        }
        pq.write_table(pa.table(columns), out / "per_search.parquet")


def _position(out: Path, settings: Settings, test: TestSet, groups: Groups) -> None:
    """The engine's own order: what a model that reranks what was shown has to beat."""
    row = _Row("position", settings, test, groups)
    unknown = np.isnan(test.position)
    searches = row.auc(-np.nan_to_num(test.position), 0.0)
    without = np.isin(searches.group, test.search[unknown])
    if without.all():
        row.write(out, None, None, None, None, {"notes": ["the log has no position"]})
        return
    searches.auc[without] = np.nan
    left_out = f"{without.sum()} searches with a row that has no position are left out"
    row.write(out, None, None, None, searches, {"notes": [left_out] if without.any() else []})


def _per_query(
    greater: NDArray[np.int64],
    equal: NDArray[np.int64],
    gain: NDArray[np.float64],
    query: NDArray[np.int64],
    queries: int,
    ks: tuple[int, ...],
    depth: int,
) -> dict[str, NDArray[np.float64]]:
    """recall_K, rr and ndcg_K of each query, NaN without a target [Q]."""
    return {
        **{f"recall_{k}": recall(greater, equal, query, queries, k) for k in ks},
        "rr": reciprocal_rank(greater, equal, query, queries, depth),
        **{f"ndcg_{k}": ndcg(greater, equal, gain, query, queries, k) for k in ks},
    }


def _query_of_group(test: TestSet, groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Query row of each search: that of its first impression."""
    ids, first = np.unique(test.search, return_index=True)
    return test.shown_query[first[np.searchsorted(ids, groups)]]


def _why_no_gauc(test: TestSet) -> str:
    if test.clicked.all():
        return "the log has no impression without a click: GAUC needs negatives"
    return "no search of the test day has both clicked and unclicked products"


def _beyond(ranks: _Ranks, bm25: _Ranks, k: int) -> dict[str, float | int]:
    """Shares of all targets that the model, BM25, both or neither have among the first k.

    Ties as probabilities, drawn apart for the two systems.
    """
    ours = expected_hits(ranks.greater, ranks.equal, k)
    theirs = expected_hits(bm25.greater, bm25.equal, k)
    return {
        "k": k,
        "model_only": float((ours * (1 - theirs)).mean()),
        "bm25_only": float((theirs * (1 - ours)).mean()),
        "both": float((ours * theirs).mean()),
        "neither": float(((1 - ours) * (1 - theirs)).mean()),
    }


def _ann(index: ProductIndex, queries: NDArray[np.float32], k: int) -> dict[str, Any]:
    sample = queries[:: max(1, len(queries) // ANN_QUERIES)][:ANN_QUERIES]
    k = min(k, index.info.products)
    return {
        "kind": index.info.kind,
        "effort": index.info.effort,
        "k": k,
        "queries": len(sample),
        "recall_of_exact": index.recall(sample, k),
    }


def _write_top(
    path: Path, queries: list[str], top: NDArray[np.int32], score: NDArray[np.float32]
) -> None:
    depth = top.shape[1]
    columns = {
        "query": pa.array(queries),
        "product": pa.FixedSizeListArray.from_arrays(pa.array(top.ravel()), depth),
        "score": pa.FixedSizeListArray.from_arrays(pa.array(score.ravel()), depth),
    }
    pq.write_table(pa.table(columns), path)


def _lists(column: pa.ChunkedArray) -> NDArray[np.int32]:
    array = column.combine_chunks()
    return array.flatten().to_numpy().reshape(len(array), -1)


def _read_ranks(directory: Path) -> _Ranks:
    table = pq.read_table(directory / "per_target.parquet", columns=["greater", "equal"])
    none = np.empty(0, np.int64)
    return _Ranks(table["greater"].to_numpy(), table["equal"].to_numpy(), none, none)


def evaluation_key(settings: Settings) -> dict[str, Any]:
    """All that decides how vectors are measured, but for the test day itself."""
    not_in_it = {"batch_size", "num_actors", "search_mb", "qrels", "dimensions"}  # of the vectors
    own = settings.eval.model_dump(exclude=not_in_it)
    qrels = settings.eval.qrels
    return {
        "version": VERSION,
        "eval": own,
        "qrels": hashlib.sha256(file_bytes(qrels)).hexdigest() if qrels else None,
    }


def _key(settings: Settings, ingested: Stage) -> dict[str, Any]:
    return {"ingest": ingested.digest, **evaluation_key(settings)}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
