"""The live index against numpy on the catalogue as it then is."""

import sqlite3
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from acebert.serving import live_index
from acebert.serving.bundle import Bundle, create_words, match_words, query_words
from acebert.serving.live_index import LiveIndex, fuse
from acebert.serving.products import Change, Filter, Hit, Patch, Product


class Truth:
    """All products and vectors in a dict, searched by numpy."""

    def __init__(self, bundle: Bundle) -> None:
        rows = range(len(bundle.vectors))
        self.products = dict(zip(rows, bundle.products(list(rows)), strict=True))
        self.found = {
            p.product_id: (p, np.asarray(bundle.vectors[row])) for row, p in self.products.items()
        }

    def apply(self, changes: list[Change]) -> None:
        for change in changes:
            before = self.found.get(change.product_id)
            if change.patch is not None:
                if before is not None:
                    own = {k: v for k, v in vars(change.patch).items() if v is not None}
                    self.found[change.product_id] = replace(before[0], **own), before[1]
                continue
            self.found.pop(change.product_id, None)
            if change.product is not None and change.vector is not None:
                self.found[change.product_id] = change.product, change.vector

    def search(self, query: np.ndarray, k: int, where: Filter) -> dict[str, float]:
        def passes(p: Product) -> bool:
            return (
                (where.category is None or p.category == where.category)
                and (where.in_stock is None or p.in_stock == where.in_stock)
                and (
                    where.min_price is None or (p.price is not None and p.price >= where.min_price)
                )
                and (
                    where.max_price is None or (p.price is not None and p.price <= where.max_price)
                )
            )

        scores = {name: float(v @ query) for name, (p, v) in self.found.items() if passes(p)}
        return dict(sorted(scores.items(), key=lambda item: -item[1])[:k])


def unit(seed: int, n: int, d: int) -> np.ndarray:
    v = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def random_changes(bundle: Bundle, seed: int, count: int) -> list[Change]:
    """Adds, replacements, patches and deletions of old and new products."""
    rng = np.random.default_rng(seed)
    d = bundle.vectors.shape[1]
    vectors = unit(seed, count, d)
    known = [p.product_id for p in bundle.products(list(range(len(bundle.vectors))))]
    names = [*known[:20], *(f"new-{i}" for i in range(20))]
    categories = [p.category for p in bundle.products(list(range(5)))] + ["brand new", None]
    changes = []
    for i in range(count):
        name = str(rng.choice(names))
        product = Product(
            name,
            f"zebra thing {i}",
            categories[rng.integers(len(categories))],
            None if rng.random() < 0.2 else float(rng.integers(1, 100)),
            bool(rng.random() < 0.6),
        )
        if rng.random() < 0.4:
            patch = Patch(*((None, False), (7.5, None), (3.25, True))[rng.integers(3)])
            changes.append(Change(i + 1, name, None, None, patch))
            continue
        deleted = rng.random() < 0.3
        changes.append(
            Change(i + 1, name, None if deleted else product, None if deleted else vectors[i])
        )
    return changes


@pytest.fixture(scope="module")
def bundle(shared_world) -> Bundle:
    return Bundle(shared_world.bundle)


def some_filters(bundle: Bundle) -> list[Filter]:
    category = bundle.products([0])[0].category
    return [
        Filter(),
        Filter(category=category),
        Filter(category="brand new"),
        Filter(category="there is none"),
        Filter(min_price=20.0),
        Filter(max_price=40.0, category=category),
        Filter(in_stock=True),
        Filter(in_stock=False, min_price=5.0),
    ]


@pytest.mark.parametrize("dead_from", [0, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_hits_are_those_of_numpy_on_the_catalogue_as_changed(
    bundle: Bundle, seed: int, dead_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_index, "DEAD_FROM", dead_from)
    index, truth = LiveIndex(bundle), Truth(bundle)
    queries = unit(100 + seed, 5, bundle.vectors.shape[1])
    changes = random_changes(bundle, seed, 60)
    for start in range(0, 60, 20):
        index.apply(changes[start : start + 20])
        truth.apply(changes[start : start + 20])
        for where in some_filters(bundle):
            for query, hits in zip(queries, index.search(queries, 10, where), strict=True):
                best = truth.search(query, 10, where)
                own = {name: float(v @ query) for name, (_, v) in truth.found.items()}
                names = [hit.product.product_id for hit in hits]
                assert len(set(names)) == len(names)  # equal titles tie, in any order
                np.testing.assert_allclose([own[n] for n in names], list(best.values()), atol=1e-5)
                np.testing.assert_allclose([h.score for h in hits], list(best.values()), atol=1e-5)
    for name, (product, vector) in truth.found.items():
        assert index.product(name) == product
        np.testing.assert_array_equal(index.vector(name), vector)


def test_changes_applied_twice_change_nothing_more(bundle: Bundle) -> None:
    once, twice = LiveIndex(bundle), LiveIndex(bundle)
    changes = random_changes(bundle, 9, 40)
    once.apply(changes)
    twice.apply(changes)
    twice.apply(changes)
    query = unit(1, 1, bundle.vectors.shape[1])
    ask = (query, 100, Filter())
    assert [h.product for h in once.search(*ask)[0]] == [h.product for h in twice.search(*ask)[0]]


def test_a_search_goes_on_with_the_state_that_it_began_with(bundle: Bundle) -> None:
    index, d = LiveIndex(bundle), bundle.vectors.shape[1]
    vectors = unit(5, 300, d)
    index.apply([Change(1, "new", Product("new", "old title"), vectors[0])])
    began = index._state
    index.apply(
        [Change(i + 2, f"n{i % 40}", Product(f"n{i}", "x"), vectors[i]) for i in range(1, 300)]
    )
    index.apply([Change(302, "new", None, None)])
    assert began.live.tolist() == [True]
    np.testing.assert_array_equal(began.vectors, vectors[:1])


def test_rows_that_are_no_products_any_more_do_not_pile_up(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_index, "DEAD_FROM", 50)
    index, vectors = LiveIndex(bundle), unit(3, 10, bundle.vectors.shape[1])
    for day in range(40):
        products = [Product(f"n{i}", f"zebra{i} of day {day}", price=float(day)) for i in range(10)]
        index.apply([Change(1, p.product_id, p, v) for p, v in zip(products, vectors, strict=True)])
        index.apply([Change(1, f"n{i}", None, None, Patch(price=0.5)) for i in range(5)])
        assert len(index._state.vectors) <= 50 + 20
    expected = [
        Product(f"n{i}", f"zebra{i} of day 39", price=0.5 if i < 5 else 39.0) for i in range(10)
    ]
    assert [index.product(f"n{i}") for i in range(10)] == expected
    assert [h.product for h in index.by_words("zebra7", vectors[0], 9, Filter())] == [expected[7]]
    (hits,) = index.search(vectors[3:4], 1, Filter())
    assert hits[0].product == expected[3]


def test_the_rows_before_are_not_copied_for_every_batch_of_changes(bundle: Bundle) -> None:
    index, d = LiveIndex(bundle), bundle.vectors.shape[1]
    arrays = set()
    for i in range(400):
        index.apply([Change(i + 1, f"n{i}", Product(f"n{i}", "x"), unit(i, 1, d)[0])])
        arrays.add(index._state.vectors.__array_interface__["data"][0])
    assert len(arrays) < 10


def test_words_find_new_titles_and_no_deleted_ones(bundle: Bundle) -> None:
    index, (vector, other) = LiveIndex(bundle), unit(0, 2, bundle.vectors.shape[1])
    old = bundle.products([3])[0]
    word = old.title.split()[-1]
    before = {h.product.product_id: h.score for h in index.by_words(word, other, 100, Filter())}
    assert before[old.product_id] == pytest.approx(float(bundle.vectors[3] @ other), abs=1e-6)
    index.apply(
        [
            Change(1, old.product_id, None, None),
            Change(2, "n", Product("n", "striped zebras"), vector),
        ]
    )
    found = [h.product.product_id for h in index.by_words(word, other, 100, Filter())]
    assert old.product_id not in found
    (hit,) = index.by_words("ZEBRA", other, 9, Filter())
    assert hit.product.product_id == "n"
    assert hit.score == pytest.approx(float(vector @ other), abs=1e-6)
    assert index.by_words("zebra", other, 9, Filter(in_stock=False)) == []


def test_new_titles_rank_among_the_bundles_as_in_one_table_of_all(bundle: Bundle) -> None:
    n, d = bundle.vectors.shape
    own = bundle.products(list(range(n)))
    titles = [" ".join([*own[i].title.split()[:-1], "zebra"]) for i in range(12)]
    new = [Product(f"n{i}", title) for i, title in enumerate(titles)]
    index = LiveIndex(bundle)
    index.apply([Change(i + 1, p.product_id, p, unit(i, 1, d)[0]) for i, p in enumerate(new)])
    whole = sqlite3.connect(":memory:")
    create_words(whole)
    everything = [*own, *new]
    rows = enumerate(p.title for p in everything)
    whole.executemany("INSERT INTO words (rowid, title) VALUES (?, ?)", rows)
    for query in (new[0].title, own[1].title, own[2].title.split()[0]):
        expected = dict(match_words(whole, query_words(query)))
        hits = index.by_words(query, bundle.vectors[0], 2 * n, Filter())
        names = [hit.product.product_id for hit in hits]
        assert set(names) == {everything[row].product_id for row in expected}
        score = {everything[row].product_id: value for row, value in expected.items()}
        for better, worse in pairwise(names):
            # the mean length of a title differs, and the bundle's words are counted without these
            assert score[better] > 0.8 * score[worse] - 0.3
    assert index.by_words(new[0].title, bundle.vectors[0], 5, Filter())[0].product == new[0]


@pytest.mark.parametrize("query", ["t-shirt", "T-Shirt 1/2", "V-neck", 'a 12" record', "हिन्दी"])
def test_words_that_are_more_than_letters_are_found(bundle: Bundle, query: str) -> None:
    index, (vector,) = LiveIndex(bundle), unit(5, 1, bundle.vectors.shape[1])
    new = Product("new", f"qqqq {query} zzzz")
    index.apply([Change(1, "new", new, vector)])
    for word in query.split()[-1:]:
        assert [h.product for h in index.by_words(word, vector, 5, Filter())] == [new]


@pytest.mark.parametrize("query", ['"', "a OR", "NEAR(", "title:x", "*", "", "()", "x' --", "日本"])
def test_words_take_any_text(bundle: Bundle, query: str) -> None:
    assert isinstance(LiveIndex(bundle).by_words(query, bundle.vectors[0], 5, Filter()), list)


def test_fusion_is_the_sum_of_reciprocal_ranks() -> None:
    a, b, c = (Hit(Product(name, name), 0.0) for name in "abc")
    fused = fuse(10, [a, b], [b, c])
    assert [hit.product.product_id for hit in fused] == ["b", "a", "c"]
    np.testing.assert_allclose([h.score for h in fused], [1 / 62 + 1 / 61, 1 / 61, 1 / 62])
