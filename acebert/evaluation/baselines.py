"""Rows that need no training: what a team has before it trains anything.

* BM25 on titles, and on titles with the hot queries of the days before the test day (bm25s: its
  'lucene' variant with k1 = 1.5, b = 0.75; words are its default tokens: lower case, at least two
  letters, no English stop words, no stemming).
* Click look-up: the products clicked for the very same query before the test day, by clicks.
* Popularity: the products clicked most before the test day, whatever the query.

A model's scores can be raised by the query's own past clicks (`add_clicks`), its ranks fused with
BM25's (`reciprocal_rank_fusion`).

Each is a `recall.Scorer`, so it is searched and measured exactly as embeddings are. A product that
shares no word with the query, or was never clicked, is not returned: its score is -inf. (The
engine's own order is a row too, but it only ranks what it showed: GAUC alone.)
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import bm25s
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.evaluation.testset import TestSet

if TYPE_CHECKING:
    import torch

RRF_K = 60

logging.getLogger("bm25s").setLevel(logging.INFO)  # it logs at DEBUG whatever the root is set to


def words(texts: list[str]) -> list[list[str]]:
    """The words that BM25 matches, of each text."""
    return bm25s.tokenize(texts, return_ids=False, show_progress=False)


class Bm25:
    """BM25 of one document a product.

    Args:
        documents: text of each product [n].
        queries: texts [Q].
    """

    tie = 0.0
    device = "cpu"

    def __init__(self, documents: list[str], queries: list[str]) -> None:
        self.products = len(documents)
        self._model = bm25s.BM25()
        corpus = words(documents)
        self._queries: list[list[int]] = [[] for _ in queries]
        if any(corpus):  # bm25s takes no corpus without a word
            self._model.index(corpus, show_progress=False)
            self._queries = [self._model.get_tokens_ids(tokens) for tokens in words(queries)]

    def score(self, queries: NDArray[np.int64], out: "torch.Tensor") -> None:
        out.fill_(-np.inf)
        for row, query in zip(out.numpy(), queries, strict=True):
            if tokens := self._queries[query]:
                scores = self._model.get_scores_from_ids(tokens)
                np.copyto(row, scores, where=scores > 0)


class ClickLookup:
    """The products clicked for a query before, scored by clicks.

    Args:
        products: n.
        queries: Q.
        query, product, clicks: what was clicked; a pair may come more than once [any length].
    """

    tie = 0.0
    device = "cpu"

    def __init__(
        self,
        products: int,
        queries: int,
        query: NDArray[np.int64],
        product: NDArray[np.int64],
        clicks: NDArray[np.int64],
    ) -> None:
        self.products = products
        pair, which = np.unique(query * products + product, return_inverse=True)
        self._query, self._product = np.divmod(pair, products)
        self._clicks = np.bincount(which, clicks).astype(np.float32)
        self._start = np.searchsorted(self._query, np.arange(queries + 1))

    def score(self, queries: NDArray[np.int64], out: "torch.Tensor") -> None:
        out.fill_(-np.inf)
        for row, query in zip(out.numpy(), queries, strict=True):
            own = slice(self._start[query], self._start[query + 1])
            row[self._product[own]] = self._clicks[own]

    @property
    def clicked(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """(query, product, clicks) of each pair that was clicked, by query and product [c]."""
        return self._query, self._product, self._clicks

    def clicks(self, query: NDArray[np.int64], product: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of any pairs, 0 where there was none [m]."""
        pairs = self._query * self.products + self._product
        wanted = query * self.products + product
        place = np.minimum(np.searchsorted(pairs, wanted), max(len(pairs) - 1, 0))
        found = np.zeros(len(wanted), np.float32)
        if len(pairs):
            known = pairs[place] == wanted
            found[known] = self._clicks[place[known]]
        return found


class Popularity:
    """The same products for every query, scored by clicks [n]."""

    tie = 0.0
    device = "cpu"

    def __init__(self, clicks: NDArray[np.int64]) -> None:
        self.products = len(clicks)
        self._scores = np.where(clicks > 0, clicks, -np.inf).astype(np.float32)

    def score(self, queries: NDArray[np.int64], out: "torch.Tensor") -> None:
        out.numpy()[:] = self._scores


def clicks_before(
    root: Path, test: TestSet
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(query row of the test set or -1, product, clicks) of all days before the test day."""
    tables = [
        pq.read_table(root / name, columns=["query", "product", "clicks"])
        for name in ("pairs.parquet", "valid_pairs.parquet")
    ]
    log, product, clicks = (
        np.concatenate([table[name].to_numpy().astype(np.int64) for table in tables])
        for name in ("query", "product", "clicks")
    )
    known = test.log_query >= 0
    to_row = np.full(max(log.max(initial=0), test.log_query.max(initial=0)) + 1, -1, np.int64)
    to_row[test.log_query[known]] = np.flatnonzero(known)
    return to_row[log], product, clicks


def titles_with_hot_queries(root: Path, test: TestSet) -> list[str]:
    """Each product's title, then its hot queries of all days before the test day [n]."""
    texts = pq.read_table(root / "queries.parquet", columns=["text"])["text"].to_pylist()
    lists = pq.read_table(root / "hot_lists.parquet")["queries"].to_pylist()
    rows = pq.read_table(root / "product_hot_lists.parquet", columns=["product", "test"])
    hot = rows.sort_by("product")["test"].to_pylist()
    return [
        " ".join([title, *(texts[query] for query in lists[row])])
        for title, row in zip(test.titles, hot, strict=True)
    ]


def add_clicks(
    top: NDArray[np.int32],
    score: NDArray[np.float32],
    lookup: ClickLookup,
    clicked_score: NDArray[np.float32],
    weight: float,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Lists by score + weight · ln(1 + past clicks of the query on the product), exactly: as clicks
    only raise scores, who is not clicked and was not in the list is not in the new one.

    Args:
        top: catalogue rows of a model's lists, best first, -1 for none [Q, depth].
        score: theirs, -inf for none [Q, depth].
        clicked_score: the model's of each pair of `lookup.clicked` [c].

    Returns:
        The same for the new lists.
    """
    queries, depth = top.shape
    query, product, clicks = lookup.clicked
    rows = np.concatenate([top.ravel().astype(np.int64), product])
    of = np.concatenate([np.repeat(np.arange(queries), depth), query])
    raised = clicked_score + np.float32(weight) * np.log1p(clicks)
    scores = np.concatenate([score.ravel(), raised]).astype(np.float32)
    both = lookup.clicks(of[: top.size], rows[: top.size]) > 0  # they come with their clicks too
    kept = np.concatenate([(rows[: top.size] >= 0) & ~both, np.ones(len(query), bool)])
    rows, of, scores = rows[kept], of[kept], scores[kept]
    order = np.lexsort((rows, -scores, of))
    rows, of, scores = rows[order], of[order], scores[order]
    rank = np.arange(len(of)) - np.searchsorted(of, of)
    first = rank < depth
    found, found_score = np.full_like(top, -1), np.full_like(score, -np.inf)
    found[of[first], rank[first]] = rows[first]
    found_score[of[first], rank[first]] = scores[first]
    return found, found_score


def reciprocal_rank_fusion(
    first: NDArray[np.int32], second: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Fuse two systems' lists: score = Σ 1 / (60 + rank) (Cormack, Clarke and Büttcher, 2009).

    Args:
        first, second: catalogue rows, best first, -1 for none [Q, depth].

    Returns:
        The same for the fused lists, and their scores (-inf: none) [Q, depth].
    """
    queries, depth = first.shape
    rows = np.concatenate([first, second], axis=1)
    gain = np.tile(1 / (RRF_K + 1 + np.arange(depth)), 2) * np.ones((queries, 1))
    order = np.argsort(rows, axis=1, kind="stable")
    rows, gain = np.take_along_axis(rows, order, 1), np.take_along_axis(gain, order, 1)
    # A product in both lists stands twice, side by side: the first takes both scores.
    twice = rows[:, 1:] == rows[:, :-1]
    gain[:, :-1] += np.where(twice, gain[:, 1:], 0.0)
    gain[:, 1:][twice] = -np.inf
    gain[rows < 0] = -np.inf
    best = np.lexsort((rows, -gain), axis=1)[:, :depth]
    score = np.take_along_axis(gain, best, 1).astype(np.float32)
    return np.where(np.isneginf(score), -1, np.take_along_axis(rows, best, 1)), score
