"""Hot lists against a brute-force count, and planted leaks."""

from collections import Counter

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from acebert.data import hot_queries
from acebert.data.hot_queries import build_hot_lists

CLICKS = pa.schema(
    [("query", pa.int32()), ("product", pa.int32()), ("day", pa.date32()), ("clicks", pa.int64())]
)
Click = tuple[int, int, int, int]  # query, product, day, clicks


class Lists:
    """What build_hot_lists makes of training and validation clicks."""

    def __init__(
        self,
        train: list[Click],
        valid: list[Click],
        products: int,
        top: int,
        leave_out: str = "day",
    ) -> None:
        with duckdb.connect() as con:
            for name, rows in (("train_clicks", train), ("valid_clicks", valid)):
                columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
                arrays = [pa.array(c, t) for c, t in zip(columns, CLICKS.types, strict=True)]
                con.register(f"{name}_rows", pa.table(arrays, schema=CLICKS))
                con.sql(f"CREATE TABLE {name} AS FROM {name}_rows")
            con.sql(
                f"CREATE TABLE catalogue AS SELECT range::INT AS product FROM range({products})"
            )
            build_hot_lists(con, top, leave_out)  # type: ignore[arg-type]
            self.lists = dict(con.sql("SELECT hot_list, queries FROM hot_lists").fetchall())
            held = "datediff('day', DATE '1970-01-01', day)" if leave_out == "day" else leave_out
            pairs = con.sql(f"SELECT product, {held}, hot_list FROM pair_hot_lists").fetchall()
            whole = con.sql("SELECT product, train, test FROM product_hot_lists").fetchall()
        self.pair = {(product, key): self.lists[number] for product, key, number in pairs}
        self.train = {product: self.lists[train] for product, train, _ in whole}
        self.test = {product: self.lists[test] for product, _, test in whole}


def ranking(clicks: Counter[int], top: int) -> list[int]:
    return [q for q, n in sorted(clicks.items(), key=lambda item: (-item[1], item[0])) if n][:top]


def count(rows: list[Click], product: int, without_day: int = -1) -> Counter[int]:
    clicks: Counter[int] = Counter()
    for query, at, day, n in rows:
        if at == product and day != without_day:
            clicks[query] += n
    return clicks


def random_clicks(seed: int, days: range) -> list[Click]:
    rng = np.random.default_rng(seed)
    keys = {
        (int(q), int(p), int(d))
        for q, p, d in zip(
            rng.zipf(1.5, 600) % 40, rng.integers(0, 8, 600), rng.choice(days, 600), strict=True
        )
    }
    return [(*key, int(rng.integers(1, 4))) for key in sorted(keys)]


@pytest.mark.parametrize("chunk", [10**6, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_list_is_the_brute_force_count(
    seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_queries, "CHUNK_PAIRS", chunk)
    train, valid = random_clicks(seed, range(5)), random_clicks(seed + 10, range(5, 6))
    got = Lists(train, valid, products=9, top=3)
    for product in range(9):
        assert got.train[product] == ranking(count(train, product), 3)
        assert got.test[product] == ranking(count(train + valid, product), 3)
    for _, product, day, _ in train:
        want = ranking(count(train, product, without_day=day), 3)
        assert got.pair.get((product, day), []) == want


def test_a_query_of_the_pairs_own_day_is_not_in_its_list() -> None:
    leak, other = 7, 8
    train = [(leak, 0, 1, 99), (other, 0, 1, 1), (other, 0, 2, 1)]
    got = Lists(train, [], products=1, top=10)
    assert got.pair[0, 1] == [other]
    assert got.pair[0, 2] == [leak, other]
    assert got.train[0] == [leak, other]


def test_a_query_of_the_validation_day_is_in_no_training_list() -> None:
    leak = 7
    got = Lists([(1, 0, 0, 1), (2, 0, 1, 1)], [(leak, 0, 2, 99)], products=1, top=10)
    assert all(leak not in queries for queries in [got.train[0], *got.pair.values()])
    assert got.test[0] == [leak, 1, 2]


def test_without_days_a_pairs_own_query_is_left_out_and_the_list_stays_full() -> None:
    train = [(query, 0, 0, 10 - query) for query in range(5)]
    got = Lists(train, [], products=1, top=3, leave_out="query")
    assert got.pair[0, 0] == [1, 2, 3]
    assert got.pair[0, 2] == [0, 1, 3]
    assert got.pair[0, 4] == [0, 1, 2]
    assert got.train[0] == [0, 1, 2]


def test_ties_go_to_the_smaller_query_number() -> None:
    got = Lists([(q, 0, 0, 1) for q in (5, 3, 9, 1)], [], products=1, top=2)
    assert got.train[0] == [1, 3]


def test_list_0_is_empty_and_no_list_is_stored_twice() -> None:
    train = [(1, 0, 0, 1), (1, 1, 0, 1), (1, 2, 1, 5)]
    got = Lists(train, [], products=4, top=10)
    assert got.lists == {0: [], 1: [1]}
    assert got.train == {0: [1], 1: [1], 2: [1], 3: []}
