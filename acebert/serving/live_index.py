"""A bundle's index with what changed since: upserts and deletes are searchable when applied.

* The bundle's FAISS index never changes, so every kind of it will do, mapped, on a GPU, or of a
  kind that cannot remove. A product that changed is left out of it (a bit) and, unless deleted,
  stands in `changed`, which is searched exactly; both lists of hits are merged.
* `apply` makes a new state beside the old one and puts it in place at once; a search works on the
  state that it began with, and needs no lock.

Changes are few beside the catalogue: a new bundle, made of a newer catalogue, takes them in.
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from acebert.serving.bundle import Bundle, create_words, match_words
from acebert.serving.products import Change, Filter, Hit, Product


class LiveProducts(Protocol):
    """What a search service asks of an index; FAISS and Milvus are behind it."""

    def search(self, queries: NDArray[np.float32], k: int, where: Filter) -> list[list[Hit]]:
        """The best k products of each query, float32 [m, d], that `where` allows; best first."""
        ...

    def by_words(self, query: str, k: int, where: Filter) -> list[Hit]:
        """The best k products by BM25 on titles; the score is BM25's."""
        ...

    def product(self, product_id: str) -> Product | None: ...

    def vector(self, product_id: str) -> NDArray[np.float32] | None:
        """float32 [d]"""
        ...

    def is_changed(self, product_id: str) -> bool:
        """Whether the product is no longer as in the bundle."""
        ...

    def categories(self) -> list[str]:
        """Names of all categories, in order."""
        ...

    def apply(self, changes: Sequence[Change]) -> None:
        """Take in changes, in the order of `seq`; again, if need be."""
        ...


@dataclass(frozen=True)
class _State:
    in_base: NDArray[np.bool_]
    """[n]: the bundle's own row still holds"""
    products: dict[str, tuple[int, Product] | None]
    """what changed: row of `vectors` and product, or None where it is deleted"""
    rows: list[Product]
    """products by row of `vectors`; a row that another came after is no product's any more"""
    vectors: NDArray[np.float32]
    """[changed, d]"""
    live: NDArray[np.bool_]
    """[changed]: the row is its product's last"""


class LiveIndex:
    """FAISS over a bundle, and what changed. Safe for one that applies and many that search."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        categories, self._price = bundle.columns()
        self._code = {name: code for code, name in enumerate(dict.fromkeys(categories))}
        self._category = np.array([self._code[name] for name in categories], np.int32)
        n, d = bundle.vectors.shape
        none = np.zeros((0, d), np.float32)
        self._state = _State(np.ones(n, bool), {}, [], none, np.zeros(0, bool))
        self._words = sqlite3.connect(":memory:", check_same_thread=False)
        create_words(self._words)

    def search(self, queries: NDArray[np.float32], k: int, where: Filter) -> list[list[Hit]]:
        state = self._state
        among = self._allowed(state, where)
        scores, rows = self._bundle.index.search(queries, k, among=among)
        kept = rows >= 0
        distinct = np.unique(rows[kept]).tolist()
        found = dict(zip(distinct, self._bundle.products(distinct), strict=True))
        changed = [i for i in np.flatnonzero(state.live).tolist() if where.allows(state.rows[i])]
        others = queries @ state.vectors[changed].T  # [m, changed]
        return [
            _best(
                k,
                [
                    Hit(found[row], score)
                    for row, score in zip(
                        rows[q][kept[q]].tolist(), scores[q].tolist(), strict=False
                    )
                ],
                [
                    Hit(state.rows[changed[i]], float(others[q, i]))
                    for i in np.argsort(-others[q], kind="stable")[:k].tolist()
                ],
            )
            for q in range(len(queries))
        ]

    def by_words(self, query: str, k: int, where: Filter) -> list[Hit]:
        state = self._state
        among = self._allowed(state, where)
        own = _first(k, self._bundle.by_words(query), lambda row: among is None or bool(among[row]))
        base = self._bundle.products([row for row, _ in own])
        new = _first(
            k,
            match_words(self._words, query),
            lambda row: row < len(state.rows) and state.live[row] and where.allows(state.rows[row]),
        )
        return _best(
            k,
            [Hit(product, score) for product, (_, score) in zip(base, own, strict=True)],
            [Hit(state.rows[row], score) for row, score in new],
        )

    def _allowed(self, state: _State, where: Filter) -> NDArray[np.bool_] | None:
        """Rows of the bundle that may be found [n]; None: all."""
        if not where:
            return state.in_base if state.products else None
        allowed = state.in_base.copy()
        if where.category is not None:
            allowed &= self._category == self._code.get(where.category, -1)
        if where.min_price is not None:
            allowed &= self._price >= where.min_price
        if where.max_price is not None:
            allowed &= self._price <= where.max_price
        if where.in_stock is False:  # what is out of stock has been said so since
            allowed[:] = False
        return allowed

    def product(self, product_id: str) -> Product | None:
        if product_id in self._state.products:
            changed = self._state.products[product_id]
            return changed and changed[1]
        row = self._bundle.row_of(product_id)
        return None if row is None else self._bundle.products([row])[0]

    def vector(self, product_id: str) -> NDArray[np.float32] | None:
        state = self._state
        if product_id in state.products:
            changed = state.products[product_id]
            return changed and state.vectors[changed[0]]
        row = self._bundle.row_of(product_id)
        return None if row is None else np.asarray(self._bundle.vectors[row])

    def is_changed(self, product_id: str) -> bool:
        return product_id in self._state.products

    def categories(self) -> list[str]:
        state = self._state
        new = {p.category for p, live in zip(state.rows, state.live, strict=True) if live}
        return sorted(name for name in new | set(self._code) if name is not None)

    def apply(self, changes: Sequence[Change]) -> None:
        if not changes:
            return
        old = self._state
        in_base, products, rows = old.in_base.copy(), dict(old.products), list(old.rows)
        live = np.concatenate([old.live, np.zeros(len(changes), bool)])
        vectors = [old.vectors]
        for change in changes:
            base = self._bundle.row_of(change.product_id)
            if base is not None:
                in_base[base] = False
            before = products.get(change.product_id)
            if before is not None:
                live[before[0]] = False
            products[change.product_id] = None
            if change.product is not None and change.vector is not None:
                row = len(rows)
                products[change.product_id] = row, change.product
                rows.append(change.product)
                vectors.append(change.vector[None])
                live[row] = True
                self._words.execute(
                    "INSERT INTO words (rowid, title) VALUES (?, ?)", (row, change.product.title)
                )
        self._state = _State(in_base, products, rows, np.concatenate(vectors), live[: len(rows)])


def _first(
    k: int, found: Iterable[tuple[int, float]], allowed: Callable[[int], bool]
) -> list[tuple[int, float]]:
    """The first k rows that are allowed."""
    taken: list[tuple[int, float]] = []
    for row, score in found:
        if allowed(row):
            taken.append((row, score))
            if len(taken) == k:
                break
    return taken


def _best(k: int, *hits: list[Hit]) -> list[Hit]:
    """The k best of several lists, best first; ties in the order of the lists."""
    if not any(hits[1:]):
        return hits[0][:k]
    return sorted((hit for some in hits for hit in some), key=lambda hit: -hit.score)[:k]


def fuse(k: int, *rankings: list[Hit], constant: int = 60) -> list[Hit]:
    """Reciprocal rank fusion: a product's score is Σ 1/(constant + rank) over the rankings."""
    scores: dict[str, float] = {}
    products: dict[str, Product] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, 1):
            key = hit.product.product_id
            scores[key] = scores.get(key, 0.0) + 1 / (constant + rank)
            products[key] = hit.product
    best = sorted(scores, key=lambda key: -scores[key])[:k]
    return [Hit(products[key], scores[key]) for key in best]
