"""Rows that cannot be used: written with their reason, and a limit on their share."""

from pathlib import Path

import duckdb
import pyarrow as pa

from acebert.data.database import write_parquet
from acebert.data.source import ROW_BITS, Source
from acebert.errors import UserError


def write_quarantine(
    con: duckdb.DuckDBPyConnection, table: str, columns: tuple[str, ...], path: Path
) -> None:
    """Rows of `table` that have a reason, in file order: `file`, `row` (data rows count from 1,
    lines in JSON lines), `columns` as the text they were, `reason`.

    Reads the table `files` (file, name).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = ", ".join(f'raw."{column}"' for column in columns)
    sql = (
        f"SELECT name AS file, seq & {(1 << ROW_BITS) - 1} AS row, {raw}, reason "
        f"FROM {table} JOIN files ON files.file = seq >> {ROW_BITS} "
        "WHERE reason IS NOT NULL ORDER BY seq"
    )
    texts = [(column, pa.string()) for column in columns]
    schema = pa.schema(
        [("file", pa.string()), ("row", pa.int64()), *texts, ("reason", pa.string())]
    )
    write_parquet(con, sql, path, schema)


def count_quarantined(
    con: duckdb.DuckDBPyConnection, table: str, source: Source
) -> tuple[int, dict[str, int]]:
    """Rows of `table` that came from this input, and those with a reason, by reason."""
    first = source.first_file << ROW_BITS
    after = (source.first_file + len(source.files)) << ROW_BITS
    counts = con.sql(
        f"SELECT reason, count(*) FROM {table} WHERE seq >= {first} AND seq < {after} "
        "GROUP BY reason ORDER BY reason"
    ).fetchall()
    bad = {reason: n for reason, n in counts if reason is not None}
    return sum(n for _, n in counts), bad


def check_share(
    source: Source, where: str, read: int, bad: dict[str, int], limit: float, kept: Path
) -> None:
    """
    Raises:
        UserError: no row at all, or more than `limit` (the setting data.max_bad_share) of them
            are bad; `kept` is where the bad rows can be looked at.
    """
    if not read:
        raise UserError(f"--{source.setting} {where}: no rows in it (files: {len(source.files)})")
    share = sum(bad.values()) / read
    if share > limit:
        reasons = ", ".join(f"{reason}: {n:,}" for reason, n in bad.items())
        raise UserError(
            f"--{source.setting} {where}: {sum(bad.values()):,} of {read:,} rows ({share:.1%}) "
            f"cannot be used, more than --data.max_bad_share {limit:g} allows ({reasons}). "
            f"They are kept, each with its reason, in {kept}"
        )
