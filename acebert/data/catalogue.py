"""The products of ingest: numbered, category-coded, and copied with their images undecoded.

All columns but the image go through DuckDB. The images are read a second time and written beside
their row, a few at a time: no more than a row group of them is ever in memory.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from acebert.data.database import feed, read
from acebert.data.schema import number_sql, plausible_sql, time_sql
from acebert.data.source import Source

log = logging.getLogger(__name__)

RAW_PRODUCT = ("product_id", "title", "category", "price", "listed_at", "image_uri")
"""Columns of a quarantined row: all that are read but the image."""

PART_ROWS = 20_000  # a part is what one Ray Data read task takes
GROUP_ROWS = 1_000
GROUP_BYTES = 64 << 20  # of images

SCHEMA = pa.schema(
    [
        ("product", pa.int32()),
        ("product_id", pa.string()),
        ("title", pa.string()),
        ("category", pa.string()),
        ("category_code", pa.int32()),
        ("price", pa.float32()),
        ("listed_at", pa.timestamp("ms")),
        ("image", pa.binary()),
        ("image_uri", pa.string()),
    ]
)


def load_products(con: duckdb.DuckDBPyConnection, source: Source) -> None:
    """Write the table `catalogue`: every row of the input, those to keep with a number.

    Columns: seq; product (dense, in file order; null: quarantined), reason (null: kept), raw (the
    row as text), product_id, title ('' if none), category, category_code, price, listed_at,
    image_uri, and unreadable_price, unreadable_listed_at: there, but meaning nothing.
    Category codes follow the names' order; products without a category have the code after.
    """
    feed(con, "CREATE TABLE raw_products AS FROM incoming", source.batches(), source.schema)
    con.sql(
        _CATALOGUE.format(
            price=number_sql("price", "REAL"),
            listed_at=time_sql("listed_at"),
            plausible=plausible_sql("instant"),
            raw=", ".join(f"{column}: {column}" for column in RAW_PRODUCT),
        )
    )
    con.sql("DROP TABLE raw_products")


_CATALOGUE = """
CREATE TABLE catalogue AS
WITH typed AS (
    SELECT seq, product_id, coalesce(title, '') AS title, category, image_uri,
        {price} AS price_read, {listed_at} AS instant,
        price, listed_at,
        {{{raw}}} AS raw,
        CASE
            WHEN problem IS NOT NULL THEN problem
            WHEN product_id IS NULL OR trim(product_id) = '' THEN 'no product_id'
            -- Among the rows without a problem: a bad first one does not condemn the good second.
            WHEN row_number() OVER (PARTITION BY product_id, problem IS NULL ORDER BY seq) > 1
                THEN 'duplicate product_id'
        END AS reason
    FROM raw_products
), plausible AS (
    SELECT *, {plausible} AS listed_at_read FROM typed
), codes AS (
    SELECT category, row_number() OVER (ORDER BY category) - 1 AS code
    FROM (SELECT DISTINCT category FROM typed WHERE reason IS NULL AND category IS NOT NULL)
), numbers AS (
    SELECT seq, row_number() OVER (ORDER BY seq) - 1 AS product FROM typed WHERE reason IS NULL
)
SELECT seq, CAST(product AS INTEGER) AS product, reason,
    CASE WHEN reason IS NOT NULL THEN raw END AS raw,
    product_id, title, category,
    CAST(coalesce(code, (SELECT count(*) FROM codes)) AS INTEGER) AS category_code,
    price_read AS price, listed_at_read AS listed_at, image_uri,
    price IS NOT NULL AND price_read IS NULL AS unreadable_price,
    listed_at IS NOT NULL AND listed_at_read IS NULL AS unreadable_listed_at
FROM plausible LEFT JOIN codes USING (category) LEFT JOIN numbers USING (seq)
ORDER BY seq
"""


def count_catalogue(con: duckdb.DuckDBPyConnection, source: Source) -> dict[str, Any]:
    """Rows read and kept, what they lack, and cells that could not be read (now null)."""
    read_, kept, titles, categories, codes, prices, times = con.sql(_COUNTS).fetchall()[0]
    return {
        "files": len(source.files),
        "rows_read": read_,
        "rows_kept": kept,
        "without_title": titles,
        "without_category": categories,
        "categories": codes,
        "cells_unreadable": {"price": prices, "listed_at": times},
    }


_COUNTS = """
SELECT count(*), count(product), count(product) FILTER (title = ''),
    count(product) FILTER (category IS NULL), count(DISTINCT category) FILTER (reason IS NULL),
    count(product) FILTER (unreadable_price), count(product) FILTER (unreadable_listed_at)
FROM catalogue
"""


def write_products(con: duckdb.DuckDBPyConnection, source: Source, out: Path) -> int:
    """Write `out/part-*.parquet` (SCHEMA); returns how many products have an image.

    Parts hold about PART_ROWS rows, row groups at most GROUP_ROWS.
    """
    out.mkdir()
    total = _count(con)
    groups = _image_groups(con, source) if source.has("image") else _imageless(total)
    writer: pq.ParquetWriter | None = None
    part = done = in_part = with_image = 0
    for images in groups:
        if writer is None:
            # Photos are compressed already; zstd shrinks the text columns.
            codecs = {name: "NONE" if name == "image" else "ZSTD" for name in SCHEMA.names}
            writer = pq.ParquetWriter(out / f"part-{part:05d}.parquet", SCHEMA, compression=codecs)
        n = len(images)
        rows = read(con, _ROWS.format(start=done, end=done + n))
        table = rows.append_column("image", images).select(SCHEMA.names).cast(SCHEMA)
        writer.write_table(table, row_group_size=GROUP_ROWS)
        with_image += n - images.null_count
        done, in_part = done + n, in_part + n
        if in_part >= PART_ROWS or done == total:
            writer.close()
            writer, part, in_part = None, part + 1, 0
            if source.has("image"):
                log.info("products: %s of %s copied with their images", f"{done:,}", f"{total:,}")
    return with_image


_ROWS = """
SELECT product, product_id, title, category, category_code, price, listed_at, image_uri
FROM catalogue WHERE product >= {start} AND product < {end} ORDER BY product
"""


def _count(con: duckdb.DuckDBPyConnection) -> int:
    return con.sql("SELECT count(product) FROM catalogue").fetchall()[0][0]


def _imageless(total: int) -> Iterator[pa.ChunkedArray]:
    for start in range(0, total, PART_ROWS):
        yield pa.chunked_array([pa.nulls(min(PART_ROWS, total - start), pa.binary())])


def _image_groups(con: duckdb.DuckDBPyConnection, source: Source) -> Iterator[pa.ChunkedArray]:
    """Images of the kept products in order, in groups that make one row group each."""
    kept = read(con, "SELECT product IS NOT NULL AS kept FROM catalogue ORDER BY seq")["kept"]
    group: list[pa.Array] = []
    rows = size = read_rows = 0
    for column in source.images():
        images = column.filter(kept.slice(read_rows, len(column)).combine_chunks())
        read_rows += len(column)
        full = rows + len(images) > GROUP_ROWS or size + images.nbytes > GROUP_BYTES
        if rows and full:
            yield pa.chunked_array(group)
            group, rows, size = [], 0, 0
        group.append(images)
        rows, size = rows + len(images), size + images.nbytes
    if rows:
        yield pa.chunked_array(group)
