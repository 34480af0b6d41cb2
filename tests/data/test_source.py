"""Queries from a file of any kind (`distinct_queries`); memory while files are read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from acebert.data.source import distinct_queries
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
    assert distinct_queries(str(path), "queries", "query") == QUERIES[:3]


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("blank", [None, "", " \u3000 "])
def test_a_row_without_the_text_is_told_by_file_and_row(
    tmp_path: Path, format: str, blank: str | None
):
    path = written(tmp_path, format, ["watch", blank, "dress"])
    with pytest.raises(UserError, match=rf"--queries {path}: row 2: it has no query"):
        distinct_queries(str(path), "queries", "query")


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_a_file_without_rows_is_told(tmp_path: Path, format: str):
    path = written(tmp_path, format, [])
    with pytest.raises(UserError, match=rf"--queries {path}: there is no row"):
        distinct_queries(str(path), "queries", "query")


def test_what_pandas_writes_for_a_missing_cell_is_no_text(tmp_path: Path):
    path = tmp_path / "queries.jsonl"
    path.write_text('{"query": "watch"}\n{"query": NaN}\n')
    with pytest.raises(UserError, match="row 2: it has no query"):
        distinct_queries(str(path), "queries", "query")


def test_a_line_that_is_no_json_is_told(tmp_path: Path):
    path = tmp_path / "queries.jsonl"
    path.write_text('{"query": "watch"}\n{"query": \n')
    with pytest.raises(UserError, match="row 2: not a JSON object"):
        distinct_queries(str(path), "queries", "query")


def test_a_missing_column_and_a_missing_file_are_told(tmp_path: Path):
    pq.write_table(pa.table({"text": ["watch"]}), tmp_path / "queries.parquet")
    with pytest.raises(UserError, match=r"queries.parquet.*'query'"):
        distinct_queries(str(tmp_path / "queries.parquet"), "queries", "query")
    with pytest.raises(UserError, match=r"--queries .*no such file"):
        distinct_queries(str(tmp_path / "none.parquet"), "queries", "query")


PEAK_AFTER_EACH = """
import re, sys
from pathlib import Path
from acebert.data.schema import PRODUCTS
from acebert.data.source import find_files, open_source

what, *files = sys.argv[1:]
for file in files:
    source = open_source(find_files(file, "data.products"), "data.products", PRODUCTS, {})
    print(sum(len(batch) for batch in getattr(source, what)()), end=" ")
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.parametrize(
    ("what", "name"), [("batches", "p.csv"), ("batches", "p.parquet"), ("images", "p.parquet")]
)
def test_memory_does_not_grow_with_the_file(what: str, name: str, tmp_path: Path) -> None:
    """64 and 256 MB, of Parquet in one row group. What reading needs is there after the first."""
    size = 200 if what == "batches" else 20_000
    files: list[Path] = []
    rng = np.random.default_rng(0)
    for megabytes in (64, 256):
        n = megabytes * 1_000_000 // size
        table = pa.table({"product_id": range(n)})
        letters = pa.py_buffer(rng.integers(97, 123, n * size, np.uint8))
        cells = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), n, [None, letters])
        if what == "batches":
            table = table.append_column("title", cells.cast(pa.binary()).cast(pa.string()))
        else:
            table = table.append_column("title", pa.nulls(n, pa.string()))
            table = table.append_column("image", cells.cast(pa.binary()))
        files.append(tmp_path / str(megabytes) / name)
        files[-1].parent.mkdir()
        if name.endswith(".csv"):
            pyarrow.csv.write_csv(table, files[-1])
        else:
            pq.write_table(table, files[-1], row_group_size=n, compression="none")
    done = subprocess.run(
        [sys.executable, "-c", PEAK_AFTER_EACH, what, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    peaks = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    (rows, first), (more_rows, second) = peaks
    assert more_rows == 4 * rows
    assert second - first < 64_000, peaks  # kB
