"""Texts of one column, from a file of any kind (`distinct_texts`)."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from acebert.data.source import distinct_texts
from acebert.errors import UserError

QUERIES = ["Red  Dress", "watch", 'a "blue", shirt', "watch"]


def written(directory: Path, format: str, queries: list[str | None]) -> Path:
    path = directory / f"queries.{format}"
    table = pa.table({"count": range(len(queries)), "query": pa.array(queries, pa.string())})
    if format == "parquet":
        pq.write_table(table, path)
    elif format == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_each_text_comes_once_as_it_was_given_whatever_the_format(tmp_path: Path, format: str):
    path = written(tmp_path, format, QUERIES)
    assert distinct_texts(str(path), "queries", "query") == QUERIES[:3]


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_a_row_without_the_text_is_told_by_file_and_row(tmp_path: Path, format: str):
    path = written(tmp_path, format, ["watch", None, "dress"])
    with pytest.raises(UserError, match=rf"--queries {path}: row 2: it has no query"):
        distinct_texts(str(path), "queries", "query")


def test_a_line_that_is_no_json_is_told(tmp_path: Path):
    path = tmp_path / "queries.jsonl"
    path.write_text('{"query": "watch"}\n{"query": \n')
    with pytest.raises(UserError, match="row 2: not a JSON object"):
        distinct_texts(str(path), "queries", "query")


def test_a_missing_column_and_a_missing_file_are_told(tmp_path: Path):
    pq.write_table(pa.table({"text": ["watch"]}), tmp_path / "queries.parquet")
    with pytest.raises(UserError, match=r"queries.parquet.*'query'"):
        distinct_texts(str(tmp_path / "queries.parquet"), "queries", "query")
    with pytest.raises(UserError, match=r"--queries .*no such file"):
        distinct_texts(str(tmp_path / "none.parquet"), "queries", "query")
