"""Ingest, from files as users have them to tables: what comes out, what is refused, and how."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from acebert.config import Settings, settings_from
from acebert.data.ingest import ingest
from acebert.data.inputs import as_first_seen
from acebert.data.schema import normalize_query
from acebert.errors import UserError
from acebert.workdir import Stage

Row = dict[str, Any]

DAY = datetime(2026, 1, 1, 12)
PRODUCTS: list[Row] = [
    {"product_id": "a", "title": "Red shoe", "category": "shoes", "price": 9.5},
    {"product_id": "b", "title": "Blue shoe", "category": "shoes", "price": 12.0},
    {"product_id": "c", "title": "Hat", "category": "hats", "price": None},
    {"product_id": "d", "title": None, "category": None, "price": 1.0},
]


def shown(day: int, query: str | None, product: str | None, clicked: Any, **more: Any) -> Row:
    """An impression on a day counted from 0, one search for each query and day."""
    row = {
        "search_id": f"{day}-{query}",
        "user_id": "u-secret",
        "timestamp": DAY + timedelta(days=day),
        "query": query,
        "product_id": product,
        "position": 1,
        "clicked": clicked,
    }
    return row | more


LOG: list[Row] = [
    shown(0, "red shoe", "a", True),
    shown(0, "red shoe", "b", False),
    shown(0, "HAT ", "c", True),
    shown(1, "blue  shoe", "b", True),
    shown(1, "shoe", "a", True, position=None),
    shown(2, "hat", "c", True),
    shown(2, "hat", "d", False),
    shown(3, "red shoe", "a", True),
    shown(3, "red shoe", "c", False),
]


def write(rows: list[Row], path: Path, columns: list[str] | None = None) -> str:
    """Rows as Parquet, CSV or JSON lines, by the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
        return str(path)
    names = columns or list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    if path.suffix == ".csv":
        pacsv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return str(path)


def make_settings(workdir: Path, **data: Any) -> Settings:
    return settings_from({"workdir": str(workdir), "data": data})


class Result:
    """A finished stage, its tables as lists of rows."""

    def __init__(self, stage: Stage) -> None:
        self.path = stage.path
        self.report = json.loads((stage.path / "report.json").read_text())
        self.texts = [row["text"] for row in self.rows("queries.parquet")]
        self.ids = [row["product_id"] for row in self.rows("products")]

    def rows(self, name: str) -> list[Row]:
        return pq.read_table(self.path / name).to_pylist()

    def pairs(self, name: str) -> set[tuple[str, str, str, int]]:
        """(query, product id, day, clicks)"""
        return {
            (self.texts[r["query"]], self.ids[r["product"]], str(r["day"]), r["clicks"])
            for r in self.rows(name)
        }

    def hot(self, number: int) -> list[str]:
        return [self.texts[query] for query in self.rows("hot_lists.parquet")[number]["queries"]]

    def content(self) -> dict[str, list[Row]]:
        files = self.path.rglob("*.parquet")
        return {str(f.relative_to(self.path)): pq.read_table(f).to_pylist() for f in sorted(files)}


def run(
    tmp_path: Path, log: list[Row] | None = None, products: list[Row] | None = None, **data: Any
) -> Result:
    where = write(PRODUCTS if products is None else products, tmp_path / "products.parquet")
    rows = write(LOG if log is None else log, tmp_path / "log.parquet")
    return Result(ingest(make_settings(tmp_path / "work", **data), where, rows))


def refused(tmp_path: Path, *args: Any, **data: Any) -> str:
    with pytest.raises(UserError) as error:
        run(tmp_path, *args, **data)
    return str(error.value)


# What comes out


def test_the_last_day_tests_the_day_before_validates_and_all_earlier_days_train(
    tmp_path: Path,
) -> None:
    got = run(tmp_path)
    assert got.pairs("pairs.parquet") == {
        ("red shoe", "a", "2026-01-01", 1),
        ("hat", "c", "2026-01-01", 1),
        ("blue shoe", "b", "2026-01-02", 1),
        ("shoe", "a", "2026-01-02", 1),
    }
    assert got.pairs("valid_pairs.parquet") == {("hat", "c", "2026-01-03", 1)}
    assert got.pairs("test_pairs.parquet") == {("red shoe", "a", "2026-01-04", 1)}
    impressions = got.rows("test_impressions.parquet")
    assert [(got.ids[r["product"]], r["clicked"]) for r in impressions] == [
        ("a", True),
        ("c", False),
    ]


def test_test_from_moves_the_split_and_filters_what_comes_after(tmp_path: Path) -> None:
    got = run(tmp_path, test_from=date(2026, 1, 3))
    assert got.pairs("test_pairs.parquet") == {("hat", "c", "2026-01-03", 1)}
    assert got.report["impressions"]["rows_filtered"] == {"after the test day": 2}
    later = {("red shoe", "a", "2026-01-04", 1)}
    assert not later & got.pairs("pairs.parquet")


def test_without_held_out_days_all_days_train_and_hot_lists_are_of_all_of_them(
    tmp_path: Path,
) -> None:
    where = write(PRODUCTS, tmp_path / "products.parquet")
    rows = write(LOG[:-2], tmp_path / "log.parquet")  # the last day has but one click left
    settings = make_settings(tmp_path / "work", test_from=date(2026, 1, 1))
    got = Result(ingest(settings, where, rows, hold_out=False))
    clicked = Counter(
        (row["query"].strip().lower(), row["product_id"]) for row in LOG[:-2] if row["clicked"]
    )
    assert {(q, p) for q, p, _, _ in got.pairs("pairs.parquet")} == {
        (normalize_query(q), p) for q, p in clicked
    }
    lists = {
        got.ids[r["product"]]: got.hot(r["test"]) for r in got.rows("product_hot_lists.parquet")
    }
    assert lists == {"a": ["red shoe", "shoe"], "b": ["blue shoe"], "c": ["hat"], "d": []}
    for name in ("valid_pairs", "test_pairs", "valid_impressions", "test_impressions"):
        assert got.rows(f"{name}.parquet") == []
    assert got.path != ingest(make_settings(tmp_path / "work"), where, rows).path


def test_without_held_out_days_a_log_of_one_day_will_do_and_one_without_clicks_will_not(
    tmp_path: Path,
) -> None:
    where = write(PRODUCTS, tmp_path / "products.parquet")
    settings = make_settings(tmp_path / "work")
    one_day = write(LOG[:3], tmp_path / "one.parquet")
    got = Result(ingest(settings, where, one_day, hold_out=False))
    assert got.report["splits"]["train"]["days"] == 1
    unclicked = write([row for row in LOG if not row["clicked"]], tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"none\.parquet: no click in it"):
        ingest(settings, where, unclicked, hold_out=False)


def test_the_files_have_the_documented_columns_and_types(tmp_path: Path) -> None:
    path = run(tmp_path).path
    want = {
        "products/part-00000.parquet": "product int32, product_id string, title string, "
        "category string, category_code int32, price float, listed_at timestamp[ms], "
        "image binary, image_uri string",
        "queries.parquet": "query int32, text string, clicks int64",
        "pairs.parquet": "pair int64, query int32, product int32, day date32[day], clicks int32, "
        "category_code int32, hot_list int32",
        "valid_pairs.parquet": "query int32, product int32, day date32[day], clicks int32",
        "test_impressions.parquet": "search int64, query int32, product int32, position int16, "
        "clicked bool",
        "hot_lists.parquet": "hot_list int32, queries list<element: int32>",
        "product_hot_lists.parquet": "product int32, train int32, test int32",
    }
    for name, columns in want.items():
        schema = pq.read_schema(path / name)
        assert ", ".join(f"{field.name} {field.type}" for field in schema) == columns, name


def test_products_are_numbered_in_file_order_and_lacking_parts_stay_lacking(
    tmp_path: Path,
) -> None:
    rows = run(tmp_path).rows("products")
    assert [(r["product"], r["product_id"], r["title"], r["category"]) for r in rows] == [
        (0, "a", "Red shoe", "shoes"),
        (1, "b", "Blue shoe", "shoes"),
        (2, "c", "Hat", "hats"),
        (3, "d", "", None),
    ]
    # hats, shoes, then the code of those without a category
    assert [r["category_code"] for r in rows] == [1, 1, 0, 2]


def test_images_stay_byte_for_byte_beside_their_product(tmp_path: Path) -> None:
    images = [b"\xff\xd8" + bytes([i % 256]) * (i % 50) if i % 7 else None for i in range(2500)]
    products: list[Row] = [
        {"product_id": f"p{i // 2 if i % 100 == 1 else i}", "title": "", "image": image}
        for i, image in enumerate(images)
    ]
    first: dict[str, bytes | None] = {}
    for row in products:
        first.setdefault(row["product_id"], row["image"])
    log = [row | {"product_id": "p0"} for row in LOG]
    got = run(tmp_path, log, products)
    assert {r["product_id"]: r["image"] for r in got.rows("products")} == first
    assert [r["product"] for r in got.rows("products")] == list(range(len(first)))
    for part in (got.path / "products").iterdir():
        meta = pq.read_metadata(part)
        assert max(meta.row_group(i).num_rows for i in range(meta.num_row_groups)) <= 1000
    assert got.report["products"]["without_image"] == sum(v is None for v in first.values())


def test_queries_are_normalized_and_numbered_by_text_with_training_clicks(tmp_path: Path) -> None:
    rows = run(tmp_path).rows("queries.parquet")
    assert [(r["query"], r["text"], r["clicks"]) for r in rows] == [
        (0, "blue shoe", 1),
        (1, "hat", 1),
        (2, "red shoe", 1),
        (3, "shoe", 1),
    ]


def test_a_planted_own_day_query_is_in_no_list_it_must_not_be_in(tmp_path: Path) -> None:
    def clicks(day: int, query: str, n: int) -> list[Row]:
        return [shown(day, query, "a", True, user_id=f"u{i}") for i in range(n)]

    log = [
        *clicks(0, "leak of day 0", 9),
        *clicks(0, "steady", 1),
        *clicks(1, "steady", 2),
        *clicks(2, "leak of validation", 9),
        *clicks(3, "leak of test", 9),
    ]
    got = run(tmp_path, log)
    lists = {
        (got.texts[r["query"]], str(r["day"])): got.hot(r["hot_list"])
        for r in got.rows("pairs.parquet")
    }
    assert lists == {
        ("leak of day 0", "2026-01-01"): ["steady"],
        ("steady", "2026-01-01"): ["steady"],
        ("steady", "2026-01-02"): ["leak of day 0", "steady"],
    }
    product = got.rows("product_hot_lists.parquet")[0]
    assert got.hot(product["train"]) == ["leak of day 0", "steady"]
    assert got.hot(product["test"]) == ["leak of day 0", "leak of validation", "steady"]
    every = {query for row in got.rows("hot_lists.parquet") for query in row["queries"]}
    assert "leak of test" not in {got.texts[query] for query in every}


def test_searches_are_groups_by_search_id_or_by_query_where_there_is_none(tmp_path: Path) -> None:
    test_day = [
        shown(3, "hat", "c", True, search_id="s1"),
        shown(3, "hat", "a", False, search_id="s2"),
        shown(3, "hat", "d", False, search_id="s1"),
        shown(3, "shoe", "b", True, search_id="s3"),
    ]
    train = [row for row in LOG if row["timestamp"].day < 4]
    rows = run(tmp_path / "ids", [*train, *test_day]).rows("test_impressions.parquet")
    assert [r["search"] for r in rows] == [0, 0, 1, 2]
    bare = [{k: v for k, v in row.items() if k != "search_id"} for row in [*train, *test_day]]
    rows = run(tmp_path / "none", bare).rows("test_impressions.parquet")
    assert [r["search"] for r in rows] == [0, 0, 0, 1]


def test_parquet_csv_and_json_lines_give_the_same_tables(tmp_path: Path) -> None:
    quirks = [shown(1, 'quoted "x", y', "a", True), shown(1, "two\nlines", "b", True)]
    got = {}
    for suffix in (".parquet", ".csv", ".jsonl"):
        base = tmp_path / suffix
        products = write(PRODUCTS, base / f"products{suffix}")
        log = write([*LOG, *quirks], base / f"log{suffix}")
        stage = ingest(make_settings(tmp_path / "work"), products, log)
        assert not stage.reused
        got[suffix] = Result(stage).content()
    assert "two lines" in {row["text"] for row in got[".csv"]["queries.parquet"]}
    assert got[".csv"] == got[".parquet"]
    assert got[".jsonl"] == got[".parquet"]


def test_a_directory_is_read_through_and_other_files_are_passed_over(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    log = tmp_path / "log"
    write(LOG[:3], log / "2026" / "a.parquet")
    write(LOG[3:6], log / "2026" / "b.csv")
    write(LOG[6:], log / "c.jsonl")
    (log / "c.jsonl").write_bytes(gzip.compress((log / "c.jsonl").read_bytes()))
    (log / "c.jsonl").rename(log / "c.jsonl.gz")
    (log / "README.md").write_text("notes")
    (log / "_SUCCESS").touch()
    (log / ".hidden.csv").write_text("x")
    (log / "empty.csv").touch()
    products = write(PRODUCTS, tmp_path / "products.parquet")
    got = Result(ingest(make_settings(tmp_path / "work"), products, f"file://{log}"))
    assert got.content() == whole.content()


def test_columns_are_mapped_and_others_ignored(tmp_path: Path) -> None:
    products = [{"sku": r["product_id"], **r, "colour": "x"} for r in PRODUCTS]
    for row in products:
        del row["product_id"]
    log = [{**r, "email": "someone@example.org"} for r in LOG]
    got = run(tmp_path, log, products, columns={"product_id": "sku"})
    assert got.ids == ["a", "b", "c", "d"]
    assert "email" not in pq.read_schema(got.path / "quarantine/impressions.parquet").names


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_mapped_name_that_no_file_has_is_refused_with_the_nearest_there_are(
    suffix: str, tmp_path: Path
) -> None:
    products = [
        {"product_id": r["product_id"], "title": "Kleid", "name_en": "dress", "sku": 1}
        for r in PRODUCTS
    ]
    where = write(products, tmp_path / f"p{suffix}")
    log = write(LOG, tmp_path / "log.parquet")
    settings = make_settings(tmp_path / "work", columns={"title": "nmae_en"})
    with pytest.raises(UserError) as error:
        ingest(settings, where, log)
    assert "--data.columns title=nmae_en: there is no column 'nmae_en' in" in str(error.value)
    assert str(error.value).endswith("Columns there: name_en")


def test_a_mapping_that_is_used_is_said_with_the_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    renamed = [{"term" if k == "query" else k: v for k, v in r.items()} for r in LOG]
    products = write(PRODUCTS, tmp_path / "products.parquet")
    for name, rows in (("a", renamed), ("b", LOG), ("c", renamed)):
        write(rows, tmp_path / "log" / f"{name}.parquet")
    settings = make_settings(tmp_path / "work", columns={"query": "term"}, robot_same_click=100)
    with caplog.at_level("INFO"):
        ingest(settings, products, str(tmp_path / "log"))
    said = f"data.columns: query is 'term' in {tmp_path}/log/a.parquet and 1 more"
    assert said in caplog.messages


def test_product_ids_may_be_integers_in_one_file_and_text_or_floats_in_another(
    tmp_path: Path,
) -> None:
    numbers = {"a": 1, "b": 2, "c": 3, "d": 4}
    products = [{**r, "product_id": numbers[r["product_id"]]} for r in PRODUCTS]
    text = [{**r, "product_id": str(numbers[r["product_id"]])} for r in LOG]
    floats = [{**r, "product_id": float(numbers[r["product_id"]])} for r in LOG]
    assert run(tmp_path / "t", text, products).ids == ["1", "2", "3", "4"]
    assert run(tmp_path / "f", floats, products).report["impressions"]["rows_kept"] == len(LOG)


@pytest.mark.parametrize(
    "stamp",
    [
        lambda t: t.replace(tzinfo=UTC),
        lambda t: t.isoformat() + "Z",
        lambda t: (t + timedelta(hours=14)).isoformat() + "+14:00",
        lambda t: int(t.replace(tzinfo=UTC).timestamp()),
        lambda t: int(t.replace(tzinfo=UTC).timestamp()) * 1000,
    ],
    ids=["zone", "iso", "offset", "epoch s", "epoch ms"],
)
def test_days_are_the_same_however_time_is_written(
    tmp_path: Path, stamp: Callable[[datetime], Any]
) -> None:
    log = [{**row, "timestamp": stamp(row["timestamp"])} for row in LOG]
    got, want = run(tmp_path / "a", log), run(tmp_path / "b")
    assert got.content() == want.content()


def test_a_position_may_be_missing(tmp_path: Path) -> None:
    without = [{k: v for k, v in row.items() if k != "position"} for row in LOG]
    rows = run(tmp_path / "a", without).rows("test_impressions.parquet")
    assert [r["position"] for r in rows] == [None, None]
    bad = [{**row, "position": "first" if i < 2 else "3"} for i, row in enumerate(LOG)]
    report = run(tmp_path / "b", bad).report["impressions"]
    assert report["cells_unreadable"] == {"position": 2}
    assert report["rows_kept"] == len(LOG)


def test_a_bare_click_log_trains_and_says_that_it_has_no_negatives(tmp_path: Path) -> None:
    clicks = [{k: v for k, v in row.items() if k != "clicked"} for row in LOG if row["clicked"]]
    got, whole = run(tmp_path / "a", clicks), run(tmp_path / "b")
    assert got.rows("pairs.parquet") == whole.rows("pairs.parquet")
    assert (got.report["has_negatives"], whole.report["has_negatives"]) == (False, True)


def test_a_log_without_timestamps_is_split_by_files_and_leaves_out_own_queries(
    tmp_path: Path,
) -> None:
    def part(name: str, days: tuple[int, ...]) -> str:
        rows = [r for r in LOG if r["timestamp"].day - 1 in days]
        return write(
            [{k: v for k, v in r.items() if k != "timestamp"} for r in rows], tmp_path / name
        )

    products = write(PRODUCTS, tmp_path / "products.parquet")
    train = part("train.csv", (0, 1))
    settings = make_settings(
        tmp_path / "work",
        products=products,
        impressions=train,
        valid_impressions=part("valid.jsonl", (2,)),
        test_impressions=part("test.parquet", (3,)),
    )
    got = Result(ingest(settings, products, train))
    assert {day for *_, day, _ in got.pairs("pairs.parquet")} == {"1970-01-01"}
    assert got.pairs("valid_pairs.parquet") == {("hat", "c", "1970-01-02", 1)}
    assert got.pairs("test_pairs.parquet") == {("red shoe", "a", "1970-01-03", 1)}
    lists = {
        (got.texts[r["query"]], got.ids[r["product"]]): got.hot(r["hot_list"])
        for r in got.rows("pairs.parquet")
    }
    assert lists["red shoe", "a"] == ["shoe"]
    assert lists["shoe", "a"] == ["red shoe"]
    assert lists["hat", "c"] == []
    splits = json.loads((got.path / "report.json").read_text())["splits"]
    assert {split["first"] for split in splits.values()} == {None}  # no days of the calendar
    assert {split["last"] for split in splits.values()} == {None}


def test_the_same_input_gives_the_same_bytes_and_a_second_call_reuses_them(tmp_path: Path) -> None:
    first, second = run(tmp_path / "1"), run(tmp_path / "2")
    for file in first.path.rglob("*.parquet"):
        name = file.relative_to(first.path)
        if name.parts[0] != "quarantine":  # it names the input's path
            assert file.read_bytes() == (second.path / name).read_bytes(), name
    settings = make_settings(tmp_path / "1" / "work")
    again = [str(tmp_path / "1" / name) for name in ("products.parquet", "log.parquet")]
    assert ingest(settings, *again).reused
    less = make_settings(tmp_path / "1" / "work", memory_limit="500MB")
    assert ingest(less, *again).reused
    write(LOG[:-1], tmp_path / "1" / "log.parquet")
    assert not ingest(settings, *again).reused


def test_a_file_that_is_added_while_a_job_runs_is_of_the_next_job(tmp_path: Path) -> None:
    products = write(PRODUCTS, tmp_path / "products.parquet")
    write(LOG, tmp_path / "log" / "1.parquet")
    settings = make_settings(tmp_path / "work")
    with as_first_seen():
        first = ingest(settings, products, str(tmp_path / "log"))
        write([shown(3, "hat", "c", True)], tmp_path / "log" / "2.parquet")
        again = ingest(settings, products, str(tmp_path / "log"))
    after = ingest(settings, products, str(tmp_path / "log"))
    assert (again.reused, again.path) == (True, first.path)
    assert not after.reused
    assert "hat" in Result(after).texts


# Fates


BAD_ROWS = [
    (shown(0, None, "a", True), "no query"),
    (shown(0, " \u2003", "a", True), "query of white space only"),
    (shown(0, "x", None, True), "no product_id"),
    (shown(0, "x", "zzz", True), "unknown product"),
    (shown(0, "x", "a", "maybe"), "clicked is not a boolean"),
    (shown(0, "x", "a", None), "clicked is not a boolean"),
    (shown(0, "x", "a", True, timestamp=None), "no timestamp"),
    (shown(0, "x", "a", True, timestamp="soon"), "bad timestamp"),
]


def test_each_bad_row_is_quarantined_with_its_reason_and_place(tmp_path: Path) -> None:
    rows = [*(row for row, _ in BAD_ROWS), *LOG]
    products = write(PRODUCTS, tmp_path / "p.parquet")
    log = write(rows, tmp_path / "log.jsonl")
    got = Result(ingest(make_settings(tmp_path / "work", max_bad_share=0.9), products, log))
    kept = got.rows("quarantine/impressions.parquet")
    assert [(r["file"], r["row"], r["reason"]) for r in kept] == [
        (log, number, reason) for number, (_, reason) in enumerate(BAD_ROWS, 1)
    ]
    assert kept[3]["product_id"] == "zzz"
    assert got.report["impressions"]["rows_quarantined"] == Counter(r for _, r in BAD_ROWS)


def test_products_without_id_or_with_one_seen_before_are_quarantined(tmp_path: Path) -> None:
    extra: list[Row] = [
        {"product_id": None, "title": "nobody"},
        {"product_id": "a", "title": "second a"},
        {"product_id": " ", "title": "blank"},
    ]
    got = run(tmp_path, products=[PRODUCTS[0], *extra, *PRODUCTS[1:]], max_bad_share=0.5)
    assert got.ids == ["a", "b", "c", "d"]
    assert got.rows("products")[0]["title"] == "Red shoe"
    kept = got.rows("quarantine/products.parquet")
    assert [(r["row"], r["title"], r["reason"]) for r in kept] == [
        (2, "nobody", "no product_id"),
        (3, "second a", "duplicate product_id"),
        (4, "blank", "no product_id"),
    ]
    assert "image" not in kept[0]


def test_robots_are_filtered_with_all_their_rows_by_rule(tmp_path: Path) -> None:
    fast = [
        shown(0, f"q{i}", "a", True, user_id="fast", timestamp=DAY + timedelta(seconds=i))
        for i in range(4)
    ]
    stubborn = [
        shown(0, "same", "b", True, user_id="stubborn", timestamp=DAY + timedelta(minutes=2 * i))
        for i in range(3)
    ]
    human = [
        shown(0, f"h{i}", "a", True, user_id="human", timestamp=DAY + timedelta(minutes=i))
        for i in range(9)
    ]
    innocent = [shown(1, "later", "c", False, user_id="fast")]
    nobody = [shown(0, f"n{i}", "a", True, user_id=None) for i in range(9)]
    log = [{**row, "user_id": f"u{i}"} for i, row in enumerate(LOG)]
    got = run(
        tmp_path,
        [*log, *fast, *stubborn, *human, *innocent, *nobody],
        robot_clicks_per_minute=3,
        robot_same_click=2,
    )
    report = got.report["impressions"]
    assert report["rows_filtered"] == {
        "robot: more than 3 clicks in a minute": 5,
        "robot: the same click more than 2 times in a day": 3,
    }
    assert report["rows_kept"] == len(log) + 9 + 9
    assert list(got.report["robots"].values()) == [1, 1]
    assert not {"q0", "same", "later"} & set(got.texts)


@pytest.mark.parametrize(("day", "kept"), [(0, set()), (2, {0, 1}), (3, {0, 1, 2})])
def test_a_robot_is_filtered_from_the_split_on_where_it_is_caught(
    tmp_path: Path, day: int, kept: set[int]
) -> None:
    """Days 0 and 1 train, 2 validates, 3 tests: a robot of the test day has trained."""
    log = [{**row, "user_id": f"u{i}"} for i, row in enumerate(LOG)]
    burst = [
        shown(day, f"b{i}", "a", True, user_id="r", timestamp=DAY + timedelta(days=day, seconds=i))
        for i in range(4)
    ]
    other = [shown(at, f"r{at}", "a", True, user_id="r") for at in range(4)]
    got = run(
        tmp_path, [*log, *burst, *other], test_from=date(2026, 1, 4), robot_clicks_per_minute=3
    )
    assert {at for at in range(4) if f"r{at}" in got.texts} == kept


def test_user_ids_are_in_no_file(tmp_path: Path) -> None:
    log = [*LOG, shown(0, None, "a", True)]
    products = write(PRODUCTS, tmp_path / "p.csv")
    lines = write(log, tmp_path / "log.csv")
    with open(lines, "a") as file:
        file.write("ragged,u-secret\n")
    settings = make_settings(tmp_path / "work", max_bad_share=0.5)
    stage = ingest(settings, products, lines)
    assert Result(stage).report["impressions"]["rows_quarantined"]
    for path in (p for p in stage.path.rglob("*") if p.is_file()):
        rows = str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else ""
        assert "u-secret" not in rows + path.read_bytes().decode("latin-1"), path
    assert not (stage.path / "scratch").exists()


CELLS = {
    "query": st.sampled_from(["red shoe", "hat", "", " ", "ÉCLAIR", 'a "b", c', None]),
    "product_id": st.sampled_from(["a", "b", "zzz", "", None]),
    "clicked": st.sampled_from(["true", "0", "yes", "maybe", None]),
    "user_id": st.sampled_from(["u", "v", None]),
    "position": st.sampled_from(["1", "x", None]),
    "timestamp": st.sampled_from(
        ["2026-01-01 10:00:00", "2026-01-04", "2026-02-01", "never", None, "1767225600"]
    ),
}


@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.fixed_dictionaries(CELLS), max_size=12),
    suffix=st.sampled_from([".csv", ".jsonl", ".parquet"]),
)
def test_rows_kept_filtered_and_quarantined_are_the_rows_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], suffix: str
) -> None:
    root = tmp_path_factory.mktemp("rows")
    good = [{k: None if v is None else str(v) for k, v in row.items()} for row in LOG]
    good = [{k: row[k] for k in CELLS} for row in good]
    products = write(PRODUCTS, root / "p.parquet")
    log = write([*good, *rows], root / f"log{suffix}")
    settings = make_settings(
        root / "work",
        test_from=date(2026, 1, 4),
        max_bad_share=1.0,
        robot_same_click=1,
    )
    got = Result(ingest(settings, products, log))
    report = got.report["impressions"]
    filtered, bad = sum(report["rows_filtered"].values()), report["rows_quarantined"]
    assert report["rows_read"] == len(good) + len(rows)
    assert report["rows_kept"] + filtered + sum(bad.values()) == report["rows_read"]
    assert len(got.rows("quarantine/impressions.parquet")) == sum(bad.values())
    hopeless = [
        row
        for row in rows
        if not normalize_query(row["query"] or "")
        or row["product_id"] not in ("a", "b")
        or row["clicked"] in ("maybe", None)
        or row["timestamp"] in ("never", None)
    ]
    assert sum(bad.values()) == len(hopeless)


RAW = st.sampled_from(["red shoe", '"red shoe', 'tv 55"', 'a "good" hat', '"hat"', "hat"])


@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    queries=st.lists(RAW, max_size=12),
    titles=st.lists(RAW, max_size=12),
    suffix=st.sampled_from([".csv", ".tsv"]),
)
def test_the_lines_of_raw_text_with_stray_quotes_are_the_rows_read(
    tmp_path_factory: pytest.TempPathFactory, queries: list[str], titles: list[str], suffix: str
) -> None:
    root = tmp_path_factory.mktemp("raw")
    catalogue = ["product_id,title,category,price", "a,x,,", "b,x,,", "c,x,,", "d,x,,"]
    catalogue += [f"p{i},{title},shoes,1.5" for i, title in enumerate(titles)]
    log = ["query,product_id,clicked,timestamp"]
    log += [f"{r['query']},{r['product_id']},{r['clicked']},{r['timestamp']}" for r in LOG]
    log += [f"{query},a,true,2026-01-01 10:00:00" for query in queries]
    paths = []
    for name, lines in (("products", catalogue), ("impressions", log)):
        text = "\n".join(lines) + "\n"
        paths.append(root / f"{name}{suffix}")
        paths[-1].write_text(text if suffix == ".csv" else text.replace(",", "\t"))
    got = Result(ingest(make_settings(root / "work", max_bad_share=1), *map(str, paths)))
    for name, lines in (("products", catalogue), ("impressions", log)):
        report = got.report[name]
        bad = report["rows_quarantined"]
        assert report["rows_read"] == len(lines) - 1
        assert report["rows_kept"] == len(lines) - 1 - sum(bad.values())
        assert len(got.rows(f"quarantine/{name}.parquet")) == sum(bad.values())
        stray = sum('"red shoe' in line for line in lines) if suffix == ".csv" else 0
        assert bad == ({"stray quote": stray} if stray else {})


# What is refused


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    log = [{k: v for k, v in row.items() if k != "query"} for row in LOG]
    message = refused(tmp_path, log)
    assert "log.parquet" in message
    assert "'query'" in message
    assert "--data.columns query=NAME" in message


def test_a_wrong_type_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, [{**row, "query": 5} for row in LOG])
    assert "'query' is int64; it should hold text" in message
    message = refused(tmp_path, None, [{**row, "image": "a.jpg"} for row in PRODUCTS])
    assert "'image' is string" in message


def test_too_many_bad_rows_stop_it_and_are_kept_to_be_looked_at(tmp_path: Path) -> None:
    log = [*LOG, *(shown(0, "x", f"z{i}", True) for i in range(6)), shown(0, None, "a", True)]
    message = refused(tmp_path, log)
    assert "7 of 16 rows (43.8%)" in message
    assert "no query: 1, unknown product: 6" in message
    kept = Path(message.split(" in ")[-1])
    assert kept.is_relative_to(tmp_path / "work" / "quarantine")
    assert pq.read_table(kept).num_rows == 7
    assert not list((tmp_path / "work" / "ingest").glob("[!.]*"))


@pytest.mark.parametrize("content", ["", "query,product_id,clicked,timestamp\n"])
def test_an_empty_log_is_refused(tmp_path: Path, content: str) -> None:
    products = write(PRODUCTS, tmp_path / "p.parquet")
    log = tmp_path / "log.csv"
    log.write_text(content)
    with pytest.raises(UserError, match=r"data.impressions .*log.csv: no rows"):
        ingest(make_settings(tmp_path / "work"), products, str(log))


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    products = write(PRODUCTS, tmp_path / "p.parquet")
    log = tmp_path / "log.parquet"
    log.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"log.parquet: is not readable as parquet"):
        ingest(make_settings(tmp_path / "work"), products, str(log))


def test_a_parquet_file_damaged_inside_is_named(tmp_path: Path) -> None:
    products = write(PRODUCTS, tmp_path / "p.parquet")
    log = Path(write(LOG * 500, tmp_path / "log.parquet"))
    data = bytearray(log.read_bytes())
    data[4 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4)
    log.write_bytes(data)
    with pytest.raises(UserError, match=r"log.parquet: "):
        ingest(make_settings(tmp_path / "work"), products, str(log))


@pytest.mark.parametrize(
    ("where", "what"),
    [("nowhere.csv", "no such file"), ("notes", "no data file"), ("a.xlsx", "unknown kind")],
)
def test_a_path_without_data_says_what_would_be_read(tmp_path: Path, where: str, what: str) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("hello")
    (tmp_path / "a.xlsx").write_text("x")
    products = write(PRODUCTS, tmp_path / "p.parquet")
    with pytest.raises(UserError, match=rf"data.impressions .*{where}: .*{what}"):
        ingest(make_settings(tmp_path / "work"), products, str(tmp_path / where))


def test_an_unknown_uri_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        ingest(make_settings(tmp_path / "work"), "gopher://x/y.csv", "gopher://x/z.csv")


def test_bad_lines_of_json_are_quarantined_with_their_line(tmp_path: Path) -> None:
    products = write(PRODUCTS, tmp_path / "p.parquet")
    log = Path(write(LOG, tmp_path / "log.jsonl"))
    lines = log.read_bytes().splitlines(keepends=True)
    bad = [b'{"query": \n', b"[1, 2]\n", b"\n", b'{"query": "\\ud800"}\n', b"\xff\xfe\n"]
    log.write_bytes(b"".join([*lines[:1], *bad, *lines[1:]]))
    settings = make_settings(tmp_path / "work", max_bad_share=0.5)
    got = Result(ingest(settings, products, str(log)))
    kept = got.rows("quarantine/impressions.parquet")
    assert [(r["row"], r["reason"]) for r in kept] == [
        (line, "not a JSON object") for line in (2, 3, 5, 6)
    ]
    assert got.report["impressions"]["rows_kept"] == len(LOG)


def test_a_json_array_is_told_apart_from_json_lines(tmp_path: Path) -> None:
    products = tmp_path / "products.json"
    products.write_text(json.dumps(PRODUCTS))
    with pytest.raises(UserError, match="JSON array"):
        ingest(make_settings(tmp_path / "work"), str(products), write(LOG, tmp_path / "l.csv"))


def test_columns_of_json_lines_may_come_late(tmp_path: Path) -> None:
    many: list[Row] = [{"product_id": f"p{i}", "title": f"title {i}"} for i in range(1500)]
    many[-1] |= {"category": "hats", "price": 2}
    bare = [{name: row[name] for name in ("product_id", "title")} for row in PRODUCTS]
    products = write([*bare, *many], tmp_path / "p.jsonl")
    rows = [{k: v for k, v in row.items() if k != "position"} for row in LOG]
    log = write([*rows * 120, *LOG], tmp_path / "log.jsonl")
    lax = {"robot_same_click": 10**6, "robot_clicks_per_minute": 10**6}
    got = Result(ingest(make_settings(tmp_path / "work", **lax), products, log))
    last = got.rows("products")[-1]
    assert (last["category"], last["price"]) == ("hats", 2.0)
    positions = {row["position"] for row in got.rows("test_impressions.parquet")}
    assert positions == {None, 1}


def test_clicked_that_comes_late_is_refused_for_earlier_rows_would_be_clicks(
    tmp_path: Path,
) -> None:
    rows = [{k: v for k, v in row.items() if k != "clicked"} for row in LOG]
    log = write([*rows * 120, *LOG], tmp_path / "log.jsonl")
    products = write(PRODUCTS, tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"log.jsonl: 'clicked' first occurs in line 1,081\."):
        ingest(make_settings(tmp_path / "work"), products, log)


def test_a_good_row_is_kept_where_a_bad_one_before_it_has_the_same_id(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b"product_id,title\na,red\nb,bl\xffue\nb,blue\nb,navy\nc,green\nd,x\n")
    settings = make_settings(tmp_path / "work", max_bad_share=0.9)
    got = Result(ingest(settings, str(path), write(LOG, tmp_path / "log.csv")))
    assert [row["title"] for row in got.rows("products")] == ["red", "blue", "green", "x"]
    reasons = [(r["row"], r["reason"]) for r in got.rows("quarantine/products.parquet")]
    assert reasons == [(2, "not UTF-8"), (4, "duplicate product_id")]


def test_images_are_read_from_those_files_that_have_them(tmp_path: Path) -> None:
    parts = tmp_path / "products"
    write([{**PRODUCTS[0], "image": b"A"}], parts / "1.parquet")
    write([PRODUCTS[1]], parts / "2.csv")
    with (parts / "2.csv").open("a") as file:
        file.write("ragged\n")
    write([PRODUCTS[2]], parts / "3.jsonl")
    write([PRODUCTS[3]], parts / "4.parquet")
    write([{"product_id": "e", "title": "e", "image": b"E"}], parts / "5.parquet")
    settings = make_settings(tmp_path / "work", max_bad_share=0.5)
    got = Result(ingest(settings, str(parts), write(LOG, tmp_path / "log.csv")))
    images = {row["product_id"]: row["image"] for row in got.rows("products")}
    assert images == {"a": b"A", "b": None, "c": None, "d": None, "e": b"E"}


def test_ragged_and_undecodable_csv_rows_are_quarantined_with_their_row(tmp_path: Path) -> None:
    log = [*LOG[:2], shown(1, "two\nlines", "a", True), *LOG[2:]]
    path = Path(write(log, tmp_path / "log.csv"))
    text = path.read_text()
    lines = text.replace("two\nlines", "two@lines").splitlines()  # header, then rows from 1
    lines.insert(3, "too,few")
    lines.insert(6, ",".join(["x"] * 9))
    lines = [line.replace("blue  shoe", "bl\\xffue") for line in lines]
    data = "\n".join(lines).replace("two@lines", "two\nlines").encode()
    path.write_bytes(data.replace(b"\\xff", b"\xff"))
    settings = make_settings(tmp_path / "work", max_bad_share=0.5)
    got = Result(ingest(settings, write(PRODUCTS, tmp_path / "p.parquet"), str(path)))
    kept = [(r["row"], r["reason"]) for r in got.rows("quarantine/impressions.parquet")]
    ragged = "not as many CSV fields as the header"
    assert kept == [(3, ragged), (6, ragged), (7, "not UTF-8")]
    assert got.report["impressions"]["rows_read"] == len(log) + 2


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_rows_whose_text_is_no_utf8_are_quarantined_with_their_row(
    kind: str, tmp_path: Path
) -> None:
    """Spark and Hive write such files; readers of Parquet take the bytes for text unseen."""

    def as_they_are(cells: list[bytes]) -> pa.Array:
        large = kind == "large_string"
        raw = pa.array(cells, pa.large_binary() if large else pa.binary())
        type_ = pa.large_string() if large else pa.string()
        text = pa.Array.from_buffers(type_, len(raw), raw.buffers())
        if kind != "dictionary":
            return text
        return pa.DictionaryArray.from_arrays(pa.array(range(len(raw)), pa.int32()), text)

    log = [shown(1, query, "a", True) for query in ("blue", "BROKEN", "red", "green")] + LOG
    table = pa.Table.from_pylist(log)
    cells = [b"bl\xffue" if row["query"] == "BROKEN" else row["query"].encode() for row in log]
    place = table.column_names.index("query")
    pq.write_table(table.set_column(place, "query", as_they_are(cells)), tmp_path / "log.parquet")
    ids = pa.array(["a", "b", "c", "d"])
    titles = as_they_are([b"red", b"\xc3", "grün".encode(), b""])
    products = tmp_path / "p.parquet"
    pq.write_table(pa.table({"product_id": ids, "title": titles}), products)
    settings = make_settings(tmp_path / "work", max_bad_share=0.5)
    got = Result(ingest(settings, str(products), str(tmp_path / "log.parquet")))
    for name, row in (("impressions", 2), ("products", 2)):
        kept = [(r["row"], r["reason"]) for r in got.rows(f"quarantine/{name}.parquet")]
        assert (row, "not UTF-8") in kept
        assert sum(reason == "not UTF-8" for _, reason in kept) == 1
    assert {row["product_id"]: row["title"] for row in got.rows("products")}["c"] == "grün"


def test_images_stay_with_their_products_behind_a_title_of_several_lines_in_another_file(
    tmp_path: Path,
) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "1.csv").write_text('product_id,title\na,"Dress\nred, cotton"\nb,"hat"\n')
    rows = [{"product_id": name, "title": name, "image": name.encode()} for name in "cde"]
    write(rows, parts / "2.parquet")
    log = write(LOG, tmp_path / "log.parquet")
    got = Result(ingest(make_settings(tmp_path / "work"), str(parts), log))
    products = [(row["product_id"], row["title"], row["image"]) for row in got.rows("products")]
    assert products[:3] == [("a", "Dress\nred, cotton", None), ("b", "hat", None), ("c", "c", b"c")]
    assert products[3:] == [("d", "d", b"d"), ("e", "e", b"e")]


def test_image_bytes_in_a_text_file_are_refused_with_the_way_out(tmp_path: Path) -> None:
    products = write([{**row, "image": "abc"} for row in PRODUCTS], tmp_path / "p.csv")
    with pytest.raises(UserError, match=r"p.csv: column 'image'.*Parquet.*image_uri"):
        ingest(make_settings(tmp_path / "work"), products, write(LOG, tmp_path / "l.csv"))


@pytest.mark.parametrize(
    ("test_from", "what"),
    [
        (date(2026, 1, 9), "2026-01-09 is after the last day.*2026-01-01 to 2026-01-04"),
        (date(2026, 1, 2), "no day to train.*2026-01-03"),
    ],
)
def test_a_test_day_outside_the_log_is_refused(tmp_path: Path, test_from: date, what: str) -> None:
    with pytest.raises(UserError, match=what):
        run(tmp_path, test_from=test_from)


def test_fewer_than_three_days_are_refused(tmp_path: Path) -> None:
    assert "needs three days" in refused(tmp_path, LOG[:5])


def test_a_gap_before_the_test_day_is_refused_with_the_days_that_have_rows(
    tmp_path: Path,
) -> None:
    gap = [row for row in LOG if row["timestamp"].day != 3]
    message = refused(tmp_path, gap)
    assert "no row on 2026-01-03, the validation day" in message
    assert "2026-01-01 to 2026-01-02, 2026-01-04" in message


@pytest.mark.parametrize(("days", "split"), [({3}, "valid"), ({4}, "test"), ({1, 2}, "train")])
def test_a_split_without_clicks_is_refused(tmp_path: Path, days: set[int], split: str) -> None:
    log = [{**r, "clicked": r["clicked"] and r["timestamp"].day not in days} for r in LOG]
    assert f"no click in {split} " in refused(tmp_path, log)


def test_a_log_without_timestamps_and_without_split_files_is_refused(tmp_path: Path) -> None:
    log = [{k: v for k, v in row.items() if k != "timestamp"} for row in LOG]
    message = refused(tmp_path, log)
    assert "'timestamp'" in message
    assert "--data.valid_impressions" in message


def test_clicked_in_some_files_only_is_refused(tmp_path: Path) -> None:
    products = write(PRODUCTS, tmp_path / "p.parquet")
    write(LOG[:4], tmp_path / "log" / "a.csv")
    rest = [{k: v for k, v in row.items() if k != "clicked"} for row in LOG[4:]]
    write(rest, tmp_path / "log" / "b.csv")
    with pytest.raises(UserError, match=r"b.csv: there is no column 'clicked', but other files"):
        ingest(make_settings(tmp_path / "work"), products, str(tmp_path / "log"))


def test_a_memory_limit_that_is_no_amount_is_named(tmp_path: Path) -> None:
    assert "--data.memory_limit plenty" in refused(tmp_path, memory_limit="plenty")


# The real catalogue


def test_the_real_catalogue_counts_as_pandas_counts(fashion_small: Path, tmp_path: Path) -> None:
    stage = ingest(
        make_settings(tmp_path),
        str(fashion_small / "products.parquet"),
        str(fashion_small / "impressions"),
    )
    got = Result(stage)
    log = pd.read_parquet(fashion_small / "impressions")
    log["text"] = log["query"].astype(str).map(normalize_query)
    log["day"] = log["timestamp"].dt.date
    products = pd.read_parquet(fashion_small / "products.parquet")
    clicks = log[log["clicked"]].groupby(["text", "product_id", "day"]).size()
    want = {(q, p, str(d), int(n)) for (q, p, d), n in clicks.items()}
    files = ("pairs.parquet", "valid_pairs.parquet", "test_pairs.parquet")
    assert set().union(*(got.pairs(name) for name in files)) == want
    assert got.ids == list(products["product_id"])
    table = pq.read_table(stage.path / "products")
    assert table["image"].to_pylist() == [None if x is None else x for x in products["image"]]
    test = log[log["day"] == date(2026, 1, 7)]
    rows = got.rows("test_impressions.parquet")
    assert len(rows) == len(test)
    assert len({r["search"] for r in rows}) == test["search_id"].nunique()
    assert got.report["splits"]["test"]["searches"] == test["search_id"].nunique()
    keys = [(r["day"], r["query"], r["product"]) for r in got.rows("pairs.parquet")]
    assert keys == sorted(keys)
