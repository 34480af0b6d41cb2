"""What the columns of a user's file may be, and what their text means."""

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acebert.data.schema import (
    IMPRESSIONS,
    PRODUCTS,
    Kind,
    as_text,
    check_mapping,
    check_type,
    flag_sql,
    normalize_query,
    normalized,
    number_sql,
    plausible_sql,
    resolve,
    time_sql,
)
from acebert.errors import UserError


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Red  Shoes", "red shoes"),
        ("  red\tshoes\n", "red shoes"),
        ("ｒｅｄ　ｓｈｏｅｓ", "red shoes"),  # full-width letters and space
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("cafe\u0301", "café"),  # combining accent
        ("ﬁt", "fit"),  # ligature
        ("red\u00a0shoes", "red shoes"),
        (" \u2003 ", ""),
        ("\u200b", ""),
        ("\ufeff \u200e", ""),
        ("\u200c\u200d", ""),
        ("\u200c\u2028\u200d", ""),  # with a line separator
        ("dre\u00adss\u200b", "dress"),  # a soft hyphen, a zero width space
        ("می\u200cخواهم", "می\u200cخواهم"),  # a joiner that is part of the word
    ],
)
def test_queries_that_read_alike_become_one(text: str, want: str) -> None:
    assert normalize_query(text) == want


@given(st.text())
def test_normalizing_twice_changes_nothing(text: str) -> None:
    assert normalize_query(normalize_query(text)) == normalize_query(text)


@given(st.lists(st.none() | st.text(max_size=5)))
def test_a_column_is_normalized_value_by_value(queries: list[str | None]) -> None:
    want = [None if query is None else normalize_query(query) for query in queries]
    assert normalized(pa.array(queries, pa.string())).to_pylist() == want


def test_a_missing_column_is_named_with_those_there_and_the_way_to_map_it() -> None:
    with pytest.raises(UserError) as error:
        resolve("p.csv", ["sku", "title"], PRODUCTS, {})
    message = str(error.value)
    assert "p.csv" in message
    assert "'product_id'" in message
    assert "sku, title" in message
    assert "--data.columns product_id=NAME" in message


def test_a_mapping_applies_where_the_file_has_the_name() -> None:
    mapping = {"product_id": "sku"}
    assert resolve("p", ["sku", "title"], PRODUCTS, mapping)["product_id"] == "sku"
    log = resolve("i", ["query", "product_id"], IMPRESSIONS, mapping)
    assert log["product_id"] == "product_id"


def test_a_mapped_column_that_is_not_there_is_an_error_though_it_be_optional() -> None:
    with pytest.raises(UserError, match="'dept'"):
        resolve("p", ["product_id", "title"], PRODUCTS, {"category": "dept"})


def test_mapping_an_unknown_column_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no column sku.*product_id"):
        check_mapping({"sku": "product_id"})


def test_a_column_that_occurs_twice_is_refused() -> None:
    with pytest.raises(UserError, match="occurs 2 times"):
        resolve("p", ["product_id", "title", "title"], PRODUCTS, {})


@pytest.mark.parametrize(
    ("kind", "type_"),
    [
        (Kind.TEXT, pa.int64()),
        (Kind.ID, pa.bool_()),
        (Kind.ID, pa.list_(pa.string())),
        (Kind.FLAG, pa.timestamp("s")),
        (Kind.TIME, pa.bool_()),
        (Kind.NUMBER, pa.binary()),
        (Kind.BYTES, pa.string()),
    ],
)
def test_a_wrong_type_names_file_column_and_what_it_should_be(
    kind: Kind, type_: pa.DataType
) -> None:
    with pytest.raises(UserError) as error:
        check_type("some.parquet", "col", kind, type_)
    for part in ("some.parquet", "'col'", str(type_), kind.value):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("array", "want"),
    [
        (pa.array([1, None]), ["1", None]),
        (pa.array([12.0, 12.5, None]), ["12", "12.5", None]),
        (pa.array([1.0, float("nan")]), ["1", None]),  # pandas' missing id
        (pa.array(["a", "", None]), ["a", None, None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array(["a"], pa.large_string()), ["a"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array([Decimal("123")]), ["123"]),
        (pa.array([None, None], pa.null()), [None, None]),
        (pa.array([date(2026, 1, 2)]), ["2026-01-02"]),
        (
            pa.array([datetime(2026, 1, 2, 1, tzinfo=timezone(timedelta(hours=2)))]),
            ["2026-01-01 23:00:00.000000"],
        ),
    ],
)
def test_arrow_values_as_text(array: pa.Array, want: list[str | None]) -> None:
    assert as_text(array).to_pylist() == want


def _sql(expression: str, text: str | None) -> object:
    with duckdb.connect() as con:
        con.sql("SET TimeZone = 'UTC'")
        sql = f"SELECT {expression} FROM (SELECT CAST($1 AS VARCHAR) AS x)"
        return con.sql(sql, params=[text]).fetchall()[0][0]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("true", True),
        ("T", True),
        ("Yes", True),
        ("1", True),
        (" FALSE ", False),
        ("f", False),
        ("no", False),
        ("0", False),
        ("2", None),
        ("maybe", None),
        (None, None),
    ],
)
def test_flags(text: str | None, want: bool | None) -> None:
    assert _sql(flag_sql("x"), text) is want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("3", 3),
        ("3.0", 3),
        ("1e2", 100),
        ("nan", None),
        ("inf", None),
        ("x", None),
        ("99999", None),
    ],
)
def test_numbers_that_do_not_fit_are_null(text: str, want: int | None) -> None:
    assert _sql(number_sql("x", "SMALLINT"), text) == want


NOON = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("2026-01-02 12:00:00", NOON),
        ("2026-01-02T12:00:00Z", NOON),
        ("2026-01-02T14:00:00+02:00", NOON),
        ("2026-01-02T08:30:00-0330", NOON),
        ("2026-01-02 13:00:00 Europe/Berlin", NOON),
        ("2026-01-02", NOON.replace(hour=0)),
        ("20260102", NOON.replace(hour=0)),
        (str(int(NOON.timestamp())), NOON),
        (str(NOON.timestamp() + 0.5), NOON + timedelta(seconds=0.5)),
        (str(int(NOON.timestamp()) * 10**3), NOON),
        (str(int(NOON.timestamp()) * 10**6), NOON),
        (str(int(NOON.timestamp()) * 10**9), NOON),
        ("02/01/2026", None),
        ("2026-13-01", None),
        ("yesterday", None),
        ("infinity", None),
        ("nan", None),
        ("9999-01-01", None),
        ("-5", None),
        ("20261301", None),
        (None, None),
    ],
)
def test_times_are_utc_whatever_they_came_as(text: str | None, want: datetime | None) -> None:
    inner = f"SELECT {time_sql('x')} AS t FROM (SELECT CAST($1 AS VARCHAR) AS x)"
    with duckdb.connect() as con:
        con.sql("SET TimeZone = 'UTC'")
        sql = f"SELECT {plausible_sql('t')} FROM ({inner})"
        got = con.sql(sql, params=[text]).fetchall()[0][0]
    assert got == (want.replace(tzinfo=None) if want else None)
