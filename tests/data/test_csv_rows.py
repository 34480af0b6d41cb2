"""CSV and TSV as they are written in the wild: no line is lost, whatever its quotes."""

import csv
import io
import logging
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from acebert.data import csv_rows
from acebert.data.schema import IMPRESSIONS, PRODUCTS
from acebert.data.source import ROW_BITS, Source, find_files, open_source
from acebert.errors import UserError

LOG = "query,product_id,clicked,timestamp\n"
CATALOGUE = "product_id,title,category,price\n"

Read = list[tuple[str | None, list[str | None]]]
"""For each row, in the file's order: its problem, and the cells that are asked for."""


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows: every kind of row comes to lie over their ends."""
    monkeypatch.setattr(csv_rows, "BLOCK", 50)
    monkeypatch.setattr(csv_rows, "LONGEST", 200)


def opened(path: Path, text: str | bytes) -> Source:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    log = path.name.startswith("log")
    setting, spec = ("data.impressions", IMPRESSIONS) if log else ("data.products", PRODUCTS)
    return open_source(find_files(str(path), setting), setting, spec, {})


def read(path: Path, text: str | bytes) -> Read:
    """Rows of a log (path log.*: query, product_id) or a catalogue (product_id, title)."""
    source = opened(path, text)
    names = ("query", "product_id") if path.name.startswith("log") else ("product_id", "title")
    table = pa.Table.from_batches(source.batches(), source.schema).sort_by("seq").to_pylist()
    assert [row["seq"] & ((1 << ROW_BITS) - 1) for row in table] == list(range(1, len(table) + 1))
    return [(row["problem"], [row[name] for name in names]) for row in table]


def log_lines(n: int) -> list[str]:
    return [f"red shoe {i},p{i},true,2026-01-02 00:00:00" for i in range(n)]


def queries(rows: Read) -> list[str | None]:
    return [cells[0] for problem, cells in rows if problem is None]


NOTHING: list[str | None] = [None, None]


@pytest.mark.parametrize("gap", [1, 2, 30, 3000])
@pytest.mark.parametrize("second", ['"red shoe', 'tv 55"', 'a "good" shoe', '"a ""b"" c"', None])
def test_a_stray_quote_costs_its_own_line_only(
    tmp_path: Path, gap: int, second: str | None
) -> None:
    """Whatever the next quote is, and however far: the lines between are read."""
    lines = log_lines(gap + 10)
    lines[4] = '"' + lines[4]
    if second is not None:
        lines[4 + gap] = lines[4 + gap].replace(f"red shoe {4 + gap}", second)
    got = read(tmp_path / "log.csv", LOG + "\n".join(lines) + "\n")
    assert len(got) == len(lines)
    assert got[4] == ("stray quote", NOTHING)
    others = [i for i in range(len(lines)) if i not in (4, 4 + gap)]
    assert [got[i] for i in others] == [(None, [f"red shoe {i}", f"p{i}"]) for i in others]


def test_a_stray_quote_loses_no_line_of_a_file_of_many_blocks(tmp_path: Path) -> None:
    lines = log_lines(250_000)
    for i in (10, 120_000, 249_998):
        lines[i] = '"' + lines[i]
    text = LOG + "\n".join(lines) + "\n"
    assert len(text) > 2 * csv_rows.BLOCK
    got = read(tmp_path / "log.csv", text)
    assert len(got) == len(lines)
    assert [i for i, (problem, _) in enumerate(got) if problem] == [10, 120_000, 249_998]


CELL = st.sampled_from(["red", '"', '"red', 'tv 55"', '15" tv', '"a" b', '"a"', '""', "", "é", " "])


@hypothesis_settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.lists(CELL, min_size=4, max_size=4), max_size=30),
    name=st.sampled_from(["log.csv", "products.csv", "log.tsv", "products.tsv"]),
    end=st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
)
@pytest.mark.usefixtures("tiny_blocks")
def test_each_line_is_a_row_and_those_without_quotes_are_read_as_they_are(
    tmp_path: Path, rows: list[list[str]], name: str, end: str
) -> None:
    comma = "," if name.endswith("csv") else "\t"
    header = (LOG if name.startswith("log") else CATALOGUE).strip().replace(",", comma)
    got = read(tmp_path / name, end.join([header, *(comma.join(row) for row in rows)]) + end)
    assert len(got) == len(rows)
    for (problem, cells), row in zip(got, rows, strict=True):
        plain = not any('"' in cell for cell in row)
        if plain or comma == "\t":
            assert problem is None
        if plain:
            assert cells == [cell or None for cell in row[:2]]


TITLE = st.text(st.sampled_from('ab "\n\ré'), max_size=12)


@hypothesis_settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    titles=st.lists(st.tuples(TITLE, st.sampled_from(["", ",", ", c"]), TITLE), max_size=12),
    style=st.sampled_from([("\r\n", csv.QUOTE_MINIMAL), ("\n", csv.QUOTE_ALL)]),
)
@pytest.mark.usefixtures("tiny_blocks")
def test_line_breaks_in_quoted_titles_are_read_as_rfc_4180_has_them(
    tmp_path: Path, titles: list[tuple[str, str, str]], style: tuple[str, Literal[0, 1]]
) -> None:
    text = io.StringIO()
    end, quoting = style
    writer = csv.writer(text, lineterminator=end, quoting=quoting)
    rows = [(f"p{i}", "".join(title)) for i, title in enumerate(titles)]
    writer.writerows([("product_id", "title", "category"), *((*row, "c") for row in rows)])
    got = read(tmp_path / "products.csv", text.getvalue())
    assert got == [(None, [product, title or None]) for product, title in rows]


def test_line_breaks_within_cells_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = 'p1,"Red\nshoe\n",a,1\n\np2,Hat,b,2\n'
    got = read(tmp_path / "products.csv", CATALOGUE + rows)
    assert [cells for _, cells in got] == [["p1", "Red\nshoe\n"], ["p2", "Hat"]]
    assert "2 line breaks within quoted cells" in caplog.text


@pytest.mark.usefixtures("tiny_blocks")
def test_a_quote_that_is_open_for_too_long_is_a_stray_one(tmp_path: Path) -> None:
    lines = ["x" for _ in range(300)]
    rows = "\n".join(['p1,"Red', *lines, 'shoe",a,1', "p2,Hat,b,2"])
    problems = [problem for problem, _ in read(tmp_path / "products.csv", CATALOGUE + rows)]
    assert problems == ["stray quote", *["not as many CSV fields as the header"] * 301, None]


@pytest.mark.usefixtures("tiny_blocks")
def test_a_line_too_long_for_a_row_is_named(tmp_path: Path) -> None:
    source = opened(tmp_path / "log.csv", LOG + "x,p1,true,2026-01-01\n" + "x" * 1000)
    with pytest.raises(UserError, match=r"log.csv: cannot be read: row 2 is longer than .*Parquet"):
        list(source.batches())


def test_a_stray_quote_in_the_header_is_refused(tmp_path: Path) -> None:
    """Its column would be one that is ignored, and rows would be gone with it."""
    for header in ('query,product_id,clicked,timestamp,"note\n', '"query"x,product_id\n'):
        with pytest.raises(UserError, match=r"log.csv: is not readable as csv: "):
            opened(tmp_path / "log.csv", header + 'a,p1,true,2026-01-01,\nb",p2,true,2026-01-01,\n')


def test_a_tsv_has_no_quotes_but_those_around_a_cell(tmp_path: Path) -> None:
    text = '"product_id"\ttitle\np1\t"15"" screen, wide"\np2\t"15 inch\np3\t15" tv\np4\t""\n'
    got = read(tmp_path / "products.tsv", text)
    titles = ['15" screen, wide', '"15 inch', '15" tv', None]
    assert got == [(None, [f"p{i}", title]) for i, title in enumerate(titles, 1)]


def test_a_ragged_row_that_is_not_utf8_fails_alone(tmp_path: Path) -> None:
    text = LOG.encode() + "é,p1,true,\n".encode() + b"\xff,p2\n\xff,p3,true,\nx,p4,true,\n"
    assert read(tmp_path / "log.csv", text) == [
        (None, ["é", "p1"]),
        ("not as many CSV fields as the header", NOTHING),
        ("not UTF-8", [None, "p3"]),
        (None, ["x", "p4"]),
    ]


@pytest.mark.usefixtures("tiny_blocks")
def test_ragged_rows_are_handed_on_with_their_block(tmp_path: Path) -> None:
    source = opened(tmp_path / "log.csv", LOG + "too,few\n" * 1000)
    assert max(batch.num_rows for batch in source.batches()) < 50
