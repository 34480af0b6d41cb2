"""Exact search of the whole catalogue, and Recall@K with ties (paper section 4.2).

    Recall@K(q) = |A_K ∩ T| / |T|

T: the products clicked for q on the test day. A_K: the K products of the catalogue with the best
scores. Where scores are equal, A_K is not one set: Recall is its expected value when equal scores
are put in random order. A target with `greater` products above it and `equal` products at its
score, itself included, stands in the first K with probability

    clip((K − greater) / equal, 0, 1).

So (greater, equal) of each target is all that Recall, nDCG and MRR need. The catalogue is scored a
block of queries at a time, and embeddings a tile of products at a time: memory is bounded by
`block_bytes`, neither by queries × products nor by products. The best `depth` products of a query
decide nearly all counts; all products are looked at again only for targets whose ties reach beyond
them.

Two scores within `tie` of each other are equal. Vectors of two products with the same text differ
in the last bits with the batch that they were computed in, and so do products of matrices with the
shape of the block; a hair's breadth there must not decide a rank.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

BLOCK_BYTES = 256 * 2**20
TILE = 131_072  # products: with BLOCK_BYTES, 512 queries share each read of a product's vector
SAY_EVERY = 10  # seconds between lines of progress


class Scorer(Protocol):
    """Scores of the whole catalogue for some queries."""

    products: int
    """n, products in the catalogue"""
    tie: float
    """scores that differ by no more are equal"""

    device: str
    """torch device that scores are made on"""

    def score(self, queries: NDArray[np.int64], out: "torch.Tensor") -> None:
        """Fill `out`, float32 [b, n], for b queries by their rows; -inf: it is not returned."""
        ...


@dataclass(frozen=True)
class Found:
    """What one pass over the catalogue found, for Q queries, T targets and m asked pairs."""

    top: NDArray[np.int32]
    """best products of each query, best first, ties by catalogue row; -1: no more [Q, depth]"""
    top_score: NDArray[np.float32]
    """their scores; -inf where there is no product [Q, depth]"""
    greater: NDArray[np.int64]
    """products that score above the target; `depth` where there are as many or more [T]"""
    equal: NDArray[np.int64]
    """products that score as the target does, itself included; meaningful below depth [T]"""
    pair_score: NDArray[np.float32]
    """score of each asked (query, product) pair [m]"""


class DotProduct:
    """Scorer of embeddings: q · p, on the GPU where there is one.

    Args:
        queries: float32 [Q, D].
        products: float32 [n, D]; may be memory-mapped, it is read a tile at a time.
    """

    tie = 1e-6  # float32 sums of 128 products of unit vectors agree to about 2e-7

    def __init__(self, queries: NDArray[np.float32], products: NDArray[np.float32]) -> None:
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.products = len(products)
        self._queries = torch.from_numpy(queries).to(self.device)
        self._products = torch.from_numpy(products)
        if self.device == "cuda" and products.nbytes < torch.cuda.mem_get_info()[0] / 2:
            self._products = self._products.to(self.device)  # else tile by tile

    def score(self, queries: NDArray[np.int64], out: "torch.Tensor") -> None:
        self.score_tile(queries, 0, out)

    def score_tile(self, queries: NDArray[np.int64], first: int, out: "torch.Tensor") -> None:
        """Fill `out` [b, m] with the scores of products first … first + m − 1."""
        import torch

        tile = self._products[first : first + out.shape[1]].to(self.device)
        torch.mm(self._queries[queries], tile.T, out=out)


def search_catalogue(
    scorer: Scorer,
    queries: int,
    target_query: NDArray[np.int64],
    target_product: NDArray[np.int64],
    depth: int,
    pair_query: NDArray[np.int64] | None = None,
    pair_product: NDArray[np.int64] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Found:
    """Score every product for every query; keep the best, the targets' ranks, the asked scores.

    Args:
        queries: Q; query rows are 0..Q-1.
        target_query, target_product: rows of the clicked pairs [T], each pair once.
        depth: best products to keep, the largest K that will be asked for.
        pair_query, pair_product: rows of pairs whose score is wanted [m].
        block_bytes: bytes of scores held at a time (at least one query's).
    """
    import torch

    none = np.empty(0, np.int64)
    pair_query = none if pair_query is None else pair_query
    pair_product = none if pair_product is None else pair_product
    n = scorer.products
    kept = min(depth, n)
    top = np.full((queries, depth), -1, np.int32)
    top_score = np.full((queries, depth), -np.inf, np.float32)
    greater = np.full(len(target_query), depth, np.int64)
    equal = np.ones(len(target_query), np.int64)
    pair_score = np.empty(len(pair_query), np.float32)

    tile = min(n, TILE) if isinstance(scorer, DotProduct) else n
    rows_a_block = min(max(1, block_bytes // (4 * tile)), queries)
    targets = _by_block(target_query, queries, rows_a_block)
    pairs = _by_block(pair_query, queries, rows_a_block)
    # One buffer for all blocks: fresh memory of that size costs more than the product does.
    buffer = torch.empty(rows_a_block * tile, device=scorer.device)
    say_next = time.monotonic() + SAY_EVERY
    for start in range(0, queries, rows_a_block):
        stop = min(start + rows_a_block, queries)
        t, p = next(targets), next(pairs)
        own = np.empty(len(t), np.float32)
        best = top[start:stop, :kept], top_score[start:stop, :kept]
        for first, block in _tiles(scorer, np.arange(start, stop), buffer, tile):
            best = _merge(best, _best(block, min(kept, block.shape[1]), first))
            _take(block, first, target_query[t] - start, target_product[t], own)
            scores = pair_score[p]
            _take(block, first, pair_query[p] - start, pair_product[p], scores)
            pair_score[p] = scores
        top[start:stop, :kept], top_score[start:stop, :kept] = best
        greater[t], equal[t], cut = _ranks(top_score[target_query[t]], own, scorer.tie)
        if cut.size:
            equal[t[cut]] = _count_ties(scorer, target_query[t[cut]], own[cut], buffer, tile)
        if time.monotonic() > say_next:
            log.info("searched %d of %d queries", stop, queries)
            say_next += SAY_EVERY
    return Found(top, top_score, greater, equal, pair_score)


def expected_hits(
    greater: NDArray[np.int64], equal: NDArray[np.int64], k: int
) -> NDArray[np.float64]:
    """Probability that each target is among the first k [T]."""
    return np.clip((k - greater) / equal, 0.0, 1.0)


def recall(
    greater: NDArray[np.int64],
    equal: NDArray[np.int64],
    target_query: NDArray[np.int64],
    queries: int,
    k: int,
) -> NDArray[np.float64]:
    """Expected Recall@k of each query; NaN where it has no target [Q]."""
    targets = np.bincount(target_query, minlength=queries)
    hits = np.bincount(target_query, expected_hits(greater, equal, k), minlength=queries)
    return np.divide(hits, targets, out=np.full(queries, np.nan), where=targets > 0)


def ranks_in_lists(
    top: NDArray[np.int32],
    top_score: NDArray[np.float32],
    target_query: NDArray[np.int64],
    target_product: NDArray[np.int64],
    tie: float = 0.0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(greater, equal) of each target where a system is known by its lists alone.

    A target that is not in its query's list gets greater = depth, and ties count as far as the list
    goes. Arguments as in `Found`; scores that differ by no more than `tie` are equal.
    """
    lists = top[target_query]
    place = lists == target_product[:, None]
    scores = top_score[target_query]
    own = np.where(place, scores, -np.inf).max(axis=1)[:, None]
    greater = (scores > own + tie).sum(axis=1)
    equal = (scores >= own - tie).sum(axis=1) - greater
    missing = ~place.any(axis=1)
    greater[missing], equal[missing] = top.shape[1], 1
    return greater, equal


def _by_block(query: NDArray[np.int64], queries: int, rows: int) -> Iterator[NDArray[np.int64]]:
    """For each block of `rows` queries, which entries of `query` lie in it."""
    order = np.argsort(query, kind="stable")
    edges = np.r_[np.arange(0, queries, rows), queries]
    bounds = np.asarray(np.searchsorted(query[order], edges))
    for first, end in pairwise(bounds):
        yield order[first:end]


def _tiles(
    scorer: Scorer, queries: NDArray[np.int64], buffer: "torch.Tensor", tile: int
) -> "Iterator[tuple[int, torch.Tensor]]":
    """(first product, scores [b, m]) over all products; the next overwrites the last."""
    for first in range(0, scorer.products, tile):
        m = min(tile, scorer.products - first)
        block = buffer[: len(queries) * m].view(len(queries), m)
        if isinstance(scorer, DotProduct):
            scorer.score_tile(queries, first, block)
        else:
            scorer.score(queries, block)
        yield first, block


_Lists = tuple[NDArray[np.int32], NDArray[np.float32]]
"""products and scores of some queries, each [b, kept], best first"""


def _best(block: "torch.Tensor", kept: int, first: int) -> _Lists:
    """The best `kept` products of each row, by score, then by catalogue row."""
    best = block.topk(min(kept + 1, block.shape[1]))
    score, out = best.values.cpu().numpy(), best.indices.cpu().numpy().astype(np.int32)
    last = score[:, kept - 1]
    # topk takes any of the products that tie at the end of the list: take the first ones.
    cut = (score[:, kept:] == last[:, None]).any(axis=1) & np.isfinite(last)
    score, out = score[:, :kept], out[:, :kept]
    for i in np.flatnonzero(cut):
        at_end = score[i] == last[i]
        tied = np.flatnonzero(block[i].cpu().numpy() == last[i])
        out[i, at_end] = tied[: at_end.sum()]
    out += first
    out[np.isneginf(score)] = -1
    order = np.lexsort((out, -score), axis=1)
    return np.take_along_axis(out, order, 1), np.take_along_axis(score, order, 1)


def _merge(lists: _Lists, more: _Lists) -> _Lists:
    """The best of both, as many as `lists` has."""
    kept = lists[0].shape[1]
    product, score = (np.concatenate(both, axis=1) for both in zip(lists, more, strict=True))
    order = np.lexsort((product, -score), axis=1)[:, :kept]
    return np.take_along_axis(product, order, 1), np.take_along_axis(score, order, 1)


def _take(
    block: "torch.Tensor",
    first: int,
    row: NDArray[np.int64],
    product: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    """Put the scores of those (row, product) that lie in this tile into `out`."""
    import torch

    here = np.flatnonzero((product >= first) & (product < first + block.shape[1]))
    r = torch.from_numpy(row[here]).to(block.device)
    c = torch.from_numpy(product[here] - first).to(block.device)
    out[here] = block[r, c].cpu().numpy()


def _ranks(
    lists: NDArray[np.float32], own: NDArray[np.float32], tie: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(greater, equal) of targets from the scores of their queries' lists [T, depth], and which of
    them may tie with more products than the list has."""
    depth = lists.shape[1]
    greater = (lists > own[:, None] + tie).sum(axis=1)
    equal = np.maximum((lists >= own[:, None] - tie).sum(axis=1) - greater, 1)
    greater[np.isneginf(own)] = depth
    cut = (greater < depth) & (lists[:, -1] <= own + tie) & np.isfinite(lists[:, -1])
    return greater, equal, np.flatnonzero(cut)


def _count_ties(
    scorer: Scorer,
    query: NDArray[np.int64],
    own: NDArray[np.float32],
    buffer: "torch.Tensor",
    tile: int,
) -> NDArray[np.int64]:
    """Products of the whole catalogue that score as target i of `query` does, itself included."""
    import torch

    equal = np.zeros(len(query), np.int64)
    step = max(1, len(buffer) // tile)
    for low in range(0, len(query), step):
        part = slice(low, low + step)
        value = torch.from_numpy(own[part]).to(buffer.device)[:, None]
        for _, block in _tiles(scorer, query[part], buffer, tile):
            near = block.sub_(value).abs_() <= scorer.tie
            equal[part] += near.sum(1).cpu().numpy()
    return equal
