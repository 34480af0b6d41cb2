"""What training looks up by row, memory-mapped: one copy a node, in the page cache.

    lookups = Lookups.open(ingest.path)
    lookups.pair_hot_list[pairs]

The same numbers as in ingest's Parquet files, which cannot be read at random: 25 million pairs of
them would be half a gigabyte in each worker. Ingest writes these files, a batch at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.data.mapped import new_array
from acebert.data.tokens import Ragged

if TYPE_CHECKING:
    import duckdb

READ_ROWS = 131_072
FOLDER = "lookups"


@dataclass(frozen=True)
class Lookups:
    """Arrays of ingest, mapped.

    Attributes:
        pair_hot_list: int32 [pairs], hot list of other days
        product_hot_lists: int32 [products, 2]: `train`, the list of all training days, and `test`,
            of all days before the test day
        product_pairs: int32 [products], training pairs of each product
        clicked: row = query, values = the products clicked for it in training, ascending
        hot_lists: row = hot list, values = query rows, most clicked first; row 0 is empty
    """

    pair_hot_list: NDArray[np.int32]
    product_hot_lists: NDArray[np.int32]
    product_pairs: NDArray[np.int32]
    clicked: Ragged
    hot_lists: Ragged

    @classmethod
    def open(cls, ingested: Path) -> "Lookups":
        folder = ingested / FOLDER

        def mapped(name: str) -> NDArray[np.int32]:
            return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

        return cls(
            mapped("pair_hot_list"),
            mapped("product_hot_lists"),
            mapped("product_pairs"),
            Ragged.load(folder, "clicked"),
            Ragged.load(folder, "hot_lists"),
        )


def write_lookups(con: "duckdb.DuckDBPyConnection", out: Path) -> None:
    """Write the files under `out`/lookups from the Parquet files in `out` and, for `clicked` and
    `product_pairs`, from ingest's table `train_clicks`."""
    folder = out / FOLDER
    folder.mkdir()
    _columns(out / "pairs.parquet", ["hot_list"], folder / "pair_hot_list.npy")
    of_products = folder / "product_hot_lists.npy"
    _columns(out / "product_hot_lists.parquet", ["train", "test"], of_products)

    products = pq.read_metadata(out / "product_hot_lists.parquet").num_rows
    drawn = new_array(folder / "product_pairs.npy", np.int32, (products,))
    for product, pairs in _rows(con, "SELECT product, count(*) FROM train_clicks GROUP BY product"):
        drawn[product] = pairs

    distinct = "SELECT DISTINCT query, product FROM train_clicks ORDER BY query, product"
    total = con.sql(f"SELECT count(*) FROM ({distinct})").fetchall()[0][0]
    queries = pq.read_metadata(out / "queries.parquet").num_rows
    with _RaggedFile(folder, "clicked", queries, total) as file:
        for query, product in _rows(con, distinct):
            first = int(query[0])
            file.append(first, np.bincount(query - first), product)

    lists = pq.ParquetFile(out / "hot_lists.parquet")
    total = sum(len(b.column(0).flatten()) for b in lists.iter_batches(columns=["queries"]))
    with _RaggedFile(folder, "hot_lists", lists.metadata.num_rows, total) as file:
        first = 0
        for batch in lists.iter_batches(columns=["queries"]):
            column = batch.column(0)
            file.append(first, column.value_lengths().to_numpy(), column.flatten().to_numpy())
            first += len(column)


def _columns(parquet: Path, names: list[str], path: Path) -> None:
    """Columns of int32 as an array [rows], or [rows, columns] where there are several."""
    with pq.ParquetFile(parquet) as file:
        rows = file.metadata.num_rows
        shape = (rows,) if len(names) == 1 else (rows, len(names))
        array = new_array(path, np.int32, shape)
        at = 0
        for batch in file.iter_batches(columns=names):
            values = np.stack([column.to_numpy() for column in batch.columns], axis=1)
            array[at : at + len(values)] = values.reshape(-1, *shape[1:])
            at += len(values)


class _RaggedFile:
    """The files of a `Ragged`, written in order and mapped: no row is held in memory."""

    def __init__(self, folder: Path, name: str, rows: int, total: int) -> None:
        # A map of no bytes cannot be made, so there is one value at least.
        self._ids = new_array(folder / f"{name}.ids.npy", np.int32, (max(total, 1),))
        self._offsets = new_array(folder / f"{name}.offsets.npy", np.int64, (rows + 1,))
        self._at = 0

    def append(self, first: int, lengths: NDArray[np.integer], values: NDArray[np.integer]) -> None:
        """Values of rows `first`, `first` + 1, …; a row may go on in the next call."""
        self._offsets[first + 1 : first + 1 + len(lengths)] += lengths
        self._ids[self._at : self._at + len(values)] = values
        self._at += len(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        np.cumsum(self._offsets, out=self._offsets)


def _rows(
    con: "duckdb.DuckDBPyConnection", sql: str
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Both columns of a result, a batch at a time."""
    for batch in con.sql(sql).to_arrow_reader(READ_ROWS):
        if batch.num_rows:
            yield batch.column(0).to_numpy(), batch.column(1).to_numpy()
