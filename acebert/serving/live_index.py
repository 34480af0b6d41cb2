"""A bundle's index with what changed since: upserts and deletes are searchable when applied.

* The bundle's FAISS index never changes, so every kind of it will do, mapped, on a GPU, or of a
  kind that cannot remove. A product that changed is left out of it (a bit) and, unless deleted,
  stands in `changed`, which is searched exactly; both lists of hits are merged.
* `apply` makes a new state beside the old one and puts it in place at once; a search works on the
  state that it began with, and needs no lock. Rows of what changed are only ever added, so states
  share them; what a state has of its own is a bit a row. When most rows are no product's any more,
  the next state begins with rows of its own.

Changes are few beside the catalogue: a new bundle, made of a newer catalogue, takes them in.
"""

import math
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from acebert.serving.bundle import Bundle, create_words, match_words, query_words
from acebert.serving.products import Change, Filter, Hit, Product

DEAD_FROM = 1000  # rows of what changed, before it pays to leave dead ones out


class LiveProducts(Protocol):
    """What a search service asks of an index; FAISS and Milvus are behind it."""

    def search(self, queries: NDArray[np.float32], k: int, where: Filter) -> list[list[Hit]]:
        """The best k products of each query, float32 [m, d], that `where` allows; best first."""
        ...

    def by_words(self, query: str, vector: NDArray[np.float32], k: int, where: Filter) -> list[Hit]:
        """The best k products by BM25 on titles, best first; the score is that of `vector` [d]."""
        ...

    def by_ids(
        self, product_ids: Sequence[str], vector: NDArray[np.float32], where: Filter
    ) -> list[Hit]:
        """Those of the products that there are and that `where` allows, in any order; the score is
        that of `vector` [d]."""
        ...

    def product(self, product_id: str) -> Product | None: ...

    def vector(self, product_id: str) -> NDArray[np.float32] | None:
        """float32 [d]"""
        ...

    def is_changed(self, product_id: str) -> bool:
        """Whether the product was put or deleted since the bundle."""
        ...

    def categories(self) -> list[str]:
        """Names of all categories, in order."""
        ...

    def apply(self, changes: Sequence[Change]) -> None:
        """Take in changes, in the order of `seq`; again, if need be."""
        ...


class _Growing:
    """Rows of one array; adding some copies those before only when the room is used up."""

    def __init__(self, row: tuple[int, ...], dtype: type) -> None:
        self._room: NDArray[Any] = np.empty((16, *row), dtype)
        self.rows = self._room[:0]
        """all of them; what was read before stays as it was"""

    def add(self, rows: Sequence[Any]) -> None:
        start, end = len(self.rows), len(self.rows) + len(rows)
        if end > len(self._room):
            room = np.empty(
                (max(end, 2 * len(self._room)), *self._room.shape[1:]), self._room.dtype
            )
            room[:start] = self.rows
            self._room = room
        self._room[start:end] = rows
        self.rows = self._room[:end]


@dataclass(frozen=True)
class _Columns:
    """What filters ask of n rows."""

    category: NDArray[np.int32]
    """its code"""
    price: NDArray[np.float64]
    """NaN: none"""
    in_stock: NDArray[np.bool_]

    def allowed(self, where: Filter, category: int) -> NDArray[np.bool_]:
        """[n], for a filter that asks for something and the code of its category."""
        allowed = np.ones(len(self.price), bool)
        if where.category is not None:
            allowed &= self.category == category
        if where.min_price is not None:
            allowed &= self.price >= where.min_price
        if where.max_price is not None:
            allowed &= self.price <= where.max_price
        if where.in_stock is not None:
            allowed &= self.in_stock == where.in_stock
        return allowed


class _Changed:
    """Products that are not the bundle's, a row each; one that changes again gets another row."""

    def __init__(self, d: int) -> None:
        self.place: dict[str, int | None] = {}
        """what changed: its row, or None where it is deleted"""
        self.products: list[Product] = []
        """by row; a row that another came after is no product's any more"""
        self._vectors = _Growing((d,), np.float32)
        self._category, self._price = _Growing((), np.int32), _Growing((), np.float64)
        self._in_stock = _Growing((), np.bool_)
        self._reading = threading.Lock()  # of `_words`
        self._words = sqlite3.connect(":memory:", check_same_thread=False)
        create_words(self._words)

    def __len__(self) -> int:
        return len(self.products)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """[n, d]"""
        return self._vectors.rows

    @property
    def columns(self) -> _Columns:
        return _Columns(self._category.rows, self._price.rows, self._in_stock.rows)

    def add(
        self,
        rows: Sequence[tuple[Product, NDArray[np.float32]]],
        code: dict[str | None, int],
    ) -> None:
        """New rows, which no state has yet; categories without a code get one."""
        if not rows:
            return
        products = [product for product, _ in rows]
        first = len(self.products)
        self._vectors.add([vector for _, vector in rows])
        self._category.add([code.setdefault(p.category, len(code)) for p in products])
        self._price.add([np.nan if p.price is None else p.price for p in products])
        self._in_stock.add([p.in_stock for p in products])
        with self._reading:
            self._words.executemany(
                "INSERT INTO words (rowid, title) VALUES (?, ?)",
                ((first + i, product.title) for i, product in enumerate(products)),
            )
            self.products += products

    def with_words(self, words: Sequence[str]) -> tuple[int, list[list[tuple[int, float]]]]:
        """How many rows there are, and for each word the rows that have it, with scores."""
        with self._reading:
            return len(self), [list(match_words(self._words, [word])) for word in words]


@dataclass(frozen=True)
class _State:
    in_base: NDArray[np.bool_]
    """[n]: the bundle's own row still holds, but for price and stock"""
    all_in_base: bool
    base: _Columns
    """[n], as patched"""
    changed: _Changed
    """more rows than `live` has where a later state has added some"""
    vectors: NDArray[np.float32]
    """of what changed, [changed, d]"""
    columns: _Columns
    """[changed]"""
    live: NDArray[np.bool_]
    """[changed]: the row is its product's last"""


class LiveIndex:
    """FAISS over a bundle, and what changed. Safe for many threads."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._index = bundle, bundle.index
        categories, prices = bundle.columns()
        self._code = {name: code for code, name in enumerate(dict.fromkeys(categories))}
        self._base_categories = set(self._code)
        n, d = bundle.vectors.shape
        codes = np.array([self._code[name] for name in categories], np.int32)
        self._applying = threading.Lock()
        base = _Columns(codes, prices, np.ones(n, bool))
        self._state = _state_of(np.ones(n, bool), base, _Changed(d), np.zeros(0, bool))
        self._titles_with = lru_cache(100_000)(bundle.titles_with)

    def _base_products(self, state: _State, rows: list[int]) -> list[Product]:
        """Products of the bundle, as patched."""
        found, columns = self._bundle.products(rows), state.base
        prices, in_stock = columns.price[rows].tolist(), columns.in_stock[rows].tolist()
        return [
            replace(product, price=None if math.isnan(price) else price, in_stock=stock)
            for product, price, stock in zip(found, prices, in_stock, strict=True)
        ]

    def search(self, queries: NDArray[np.float32], k: int, where: Filter) -> list[list[Hit]]:
        state = self._state
        among = self._allowed(state, where)
        scores, rows = self._index.search(queries, k, among=among)
        kept = rows >= 0
        distinct = np.unique(rows[kept]).tolist()
        found = dict(zip(distinct, self._base_products(state, distinct), strict=True))
        others = queries @ state.vectors.T  # [m, changed]
        others[:, ~self._allowed_changed(state, where)] = -np.inf
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
                    Hit(state.changed.products[row], float(others[q, row]))
                    for row in _first_rows(others[q], k)
                ],
            )
            for q in range(len(queries))
        ]

    def by_words(self, query: str, vector: NDArray[np.float32], k: int, where: Filter) -> list[Hit]:
        state = self._state
        among = self._allowed(state, where)
        changed = self._allowed_changed(state, where)
        own = _first(k, self._bundle.by_words(query), lambda row: among is None or bool(among[row]))
        new = _first(
            k,
            self._changed_by_words(state.changed, query),
            lambda row: row < len(changed) and bool(changed[row]),
        )
        base = self._base_products(state, [row for row, _ in own])
        vectors = self._bundle.vectors[[row for row, _ in own]]
        found = [
            *zip([score for _, score in own], base, vectors, strict=True),
            *((score, state.changed.products[row], state.vectors[row]) for row, score in new),
        ]
        best = sorted(found, key=lambda one: -one[0])[:k]
        return [Hit(product, float(own_vector @ vector)) for _, product, own_vector in best]

    def by_ids(
        self, product_ids: Sequence[str], vector: NDArray[np.float32], where: Filter
    ) -> list[Hit]:
        state = self._state
        changed = state.changed
        of_names = [self._bundle.row_of(name) for name in product_ids]
        rows = [row for row in of_names if row is not None and state.in_base[row]]
        base = zip(self._base_products(state, rows), self._bundle.vectors[rows], strict=True)
        place = [changed.place.get(name) for name in product_ids]
        new = [(changed.products[row], changed.vectors[row]) for row in place if row is not None]
        return [
            Hit(product, float(own @ vector))
            for product, own in [*base, *new]
            if where.allows(product)
        ]

    def _changed_by_words(self, changed: _Changed, query: str) -> list[tuple[int, float]]:
        """Rows of what changed and their BM25 scores, best first. How rare a word is, is told by
        the bundle's titles and these, so that the scores stand beside the bundle's."""
        scores: dict[int, float] = defaultdict(float)
        words = query_words(query)
        n, rows_with = changed.with_words(words)
        for word, rows in zip(words, rows_with, strict=True):
            found = len(rows)
            both = _rarity(len(self._bundle.vectors) + n, self._titles_with(word) + found)
            for row, score in rows:
                scores[row] += score / _rarity(n, found) * both
        return sorted(scores.items(), key=lambda found: -found[1])

    def _allowed(self, state: _State, where: Filter) -> NDArray[np.bool_] | None:
        """Rows of the bundle that may be found [n]; None: all."""
        if not where:
            return None if state.all_in_base else state.in_base
        return state.in_base & state.base.allowed(where, self._code_of(where))

    def _allowed_changed(self, state: _State, where: Filter) -> NDArray[np.bool_]:
        """Of what changed, the rows that may be found [changed]."""
        if not where:
            return state.live
        return state.live & state.columns.allowed(where, self._code_of(where))

    def _code_of(self, where: Filter) -> int:
        return self._code.get(where.category, -1)

    def product(self, product_id: str) -> Product | None:
        state = self._state
        if product_id in state.changed.place:
            place = state.changed.place[product_id]
            return None if place is None else state.changed.products[place]
        row = self._bundle.row_of(product_id)
        return None if row is None else self._base_products(state, [row])[0]

    def vector(self, product_id: str) -> NDArray[np.float32] | None:
        changed = self._state.changed
        if product_id in changed.place:
            place = changed.place[product_id]
            return None if place is None else changed.vectors[place]
        row = self._bundle.row_of(product_id)
        return None if row is None else np.asarray(self._bundle.vectors[row])

    def is_changed(self, product_id: str) -> bool:
        return product_id in self._state.changed.place

    def categories(self) -> list[str]:
        state, names = self._state, list(self._code)
        new = {names[code] for code in np.unique(state.columns.category[state.live])}
        return sorted(name for name in new | self._base_categories if name is not None)

    def apply(self, changes: Sequence[Change]) -> None:
        if not changes:
            return
        with self._applying:
            old, rows = self._state, self._state.changed
            start = len(rows)
            in_base, price, in_stock = old.in_base.copy(), old.base.price, old.base.in_stock
            if any(change.patch for change in changes):
                price, in_stock = price.copy(), in_stock.copy()
            added: list[tuple[Product, NDArray[np.float32]]] = []
            last: dict[str, int | None] = {}  # of these changes, as `rows.place`
            dead: list[int] = []
            for change in changes:
                name, patch = change.product_id, change.patch
                base = self._bundle.row_of(name)
                changed = name in last or name in rows.place
                row = last.get(name, rows.place.get(name))
                new = None
                if patch is None:
                    if change.product is not None and change.vector is not None:
                        new = change.product, change.vector
                elif row is not None:
                    if row >= start:
                        product, vector = added[row - start]
                    else:
                        product, vector = rows.products[row], old.vectors[row]
                    new = patch.of(product), vector
                else:
                    if base is not None and not changed:
                        if patch.price is not None:
                            price[base] = patch.price
                        if patch.in_stock is not None:
                            in_stock[base] = patch.in_stock
                    continue  # else there is no such product
                if base is not None:
                    in_base[base] = False
                if row is not None:
                    dead.append(row)
                last[name] = None
                if new is not None:
                    last[name] = start + len(added)
                    added.append(new)
            rows.add(added, self._code)
            live = np.ones(len(rows), bool)
            live[:start] = old.live
            live[dead] = False
            rows.place |= last
            if len(live) > DEAD_FROM and 2 * int(live.sum()) < len(live):
                rows, live = self._without_dead(rows, live)
            base_columns = _Columns(old.base.category, price, in_stock)
            self._state = _state_of(in_base, base_columns, rows, live)

    def _without_dead(
        self, old: _Changed, live: NDArray[np.bool_]
    ) -> tuple[_Changed, NDArray[np.bool_]]:
        place = {row: i for i, row in enumerate(np.flatnonzero(live).tolist())}
        rows = _Changed(old.vectors.shape[1])
        rows.add([(old.products[row], old.vectors[row]) for row in place], self._code)
        rows.place = {name: row if row is None else place[row] for name, row in old.place.items()}
        return rows, np.ones(len(place), bool)


def _state_of(
    in_base: NDArray[np.bool_], base: _Columns, changed: _Changed, live: NDArray[np.bool_]
) -> _State:
    vectors, columns = changed.vectors, changed.columns
    return _State(in_base, bool(in_base.all()), base, changed, vectors, columns, live)


def _rarity(titles: int, with_it: int) -> float:
    """A word's weight in FTS5's BM25."""
    return max(math.log((titles - with_it + 0.5) / (with_it + 0.5)), 1e-6)


def _first_rows(scores: NDArray[np.float32], k: int) -> list[int]:
    """Rows of the k best of `scores` [n] that are finite, best first."""
    best = np.argpartition(-scores, k)[:k] if k < len(scores) else np.arange(len(scores))
    best = best[np.argsort(-scores[best], kind="stable")]
    return best[scores[best] > -np.inf].tolist()


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


def raised(k: int, hits: Iterable[Hit], clicked: dict[str, int], weight: float) -> list[Hit]:
    """The k best by score + weight · ln(1 + clicks), each product once; clicks by product_id."""
    best = {
        hit.product.product_id: Hit(
            hit.product, hit.score + weight * math.log1p(clicked.get(hit.product.product_id, 0))
        )
        for hit in hits
    }
    return sorted(best.values(), key=lambda hit: -hit.score)[:k]


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
