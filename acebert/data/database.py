"""DuckDB as ingest uses it: on disk beside the result, bounded in memory, fed and read by batches.

The order of a table's rows means nothing here (threads write it); every read that must be
reproducible says ORDER BY.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from acebert.errors import UserError

READ_ROWS = 131_072


@contextmanager
def open_database(scratch: Path, memory_limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in the directory `scratch`, which is made, and removed at the end.

    Raises:
        UserError: `memory_limit` (the setting data.memory_limit) is no amount of memory, or a
            query needs more; or a query fills the disk.
    """
    scratch.mkdir()
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": memory_limit,
        "threads": len(os.sched_getaffinity(0)),
        "temp_directory": str(scratch / "spill"),
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
    }
    try:
        with duckdb.connect(str(scratch / "ingest.duckdb"), config=config) as con:
            con.sql("SET TimeZone = 'UTC'")
            yield con
    except duckdb.ParserException as error:
        if "emory" not in str(error):
            raise
        raise UserError(f"--data.memory_limit {memory_limit}: {error}") from error
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"--data.memory_limit {memory_limit} is too little for this log, or the disk under "
            f"{scratch.parent.parent} has no room left to spill to: {str(error).splitlines()[0]}"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def feed(
    con: duckdb.DuckDBPyConnection, sql: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema
) -> None:
    """Run a statement that reads `incoming`, a stream of batches.

    What the iterator raises is raised here as it is, not as the text of a DuckDB error.
    """
    failure: list[Exception] = []

    def guarded() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except Exception as error:
            failure.append(error)
            raise

    con.register("incoming", pa.RecordBatchReader.from_batches(schema, guarded()))
    try:
        con.sql(sql)
    except duckdb.Error:
        if failure:
            raise failure[0] from failure[0].__cause__
        raise
    finally:
        con.unregister("incoming")


def read(con: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    """A small result as a table."""
    return con.sql(sql).to_arrow_table()


def write_parquet(con: duckdb.DuckDBPyConnection, sql: str, path: Path, schema: pa.Schema) -> int:
    """Stream a result (in the order that `sql` gives it) to a Parquet file; returns its rows."""
    rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in con.sql(sql).to_arrow_reader(READ_ROWS):
            writer.write_table(pa.Table.from_batches([batch]).cast(schema))
            rows += batch.num_rows
    return rows
