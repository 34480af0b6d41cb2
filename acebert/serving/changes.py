"""The change log: what happened to products since the bundle was made, in SQLite.

One row a product, its last change, numbered by `seq`; whoever asks for what came after the last
number it saw gets every product's newest state, in order. Where price or stock alone are changed,
each has a row of its own, until the product is put or deleted. WAL with synchronous=FULL: when a
method that writes returns, the change is on the disk. One process writes (the lock is exclusive,
which is also what lets WAL work on a network file system); replicas follow by asking it.

Vectors are kept by model version, beside the product and its photo: for another model the same
products are encoded again.

Each change has its time: a bundle of a catalogue that was written later holds it already, so those
who serve that bundle begin `before` that time, with what was out of stock then: a catalogue does
not say.
"""

import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from acebert.errors import UserError
from acebert.serving.products import Change, Patch, Product

WAIT_SECONDS = 30.0  # for the process that had the log before to end

_SCHEMA = """
CREATE TABLE IF NOT EXISTS change (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, product_id TEXT NOT NULL, part TEXT NOT NULL,
    title TEXT, category TEXT, price REAL, in_stock INTEGER, photo BLOB, at REAL NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS of_product ON change (product_id, part);
-- `+seq` in a query makes SQLite take one of these, where it would read every row, photo and all.
CREATE INDEX IF NOT EXISTS of_time ON change (at);
CREATE INDEX IF NOT EXISTS without_stock ON change (product_id, part) WHERE in_stock = 0;
CREATE TABLE IF NOT EXISTS vector (
    seq INTEGER NOT NULL, version TEXT NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (seq, version)
);
CREATE TRIGGER IF NOT EXISTS forget AFTER DELETE ON change BEGIN
    DELETE FROM vector WHERE seq = old.seq;
END;
"""


Part = Literal["product", "deleted", "price", "in_stock"]
"""what a row of `change` holds"""
WHOLE = "product", "deleted"


@dataclass(frozen=True)
class Source:
    """A product as it was sent: what a vector is made from."""

    product: Product
    photo: bytes | None


@dataclass(frozen=True)
class Logged:
    """What the log says of a product."""

    at: datetime
    deleted: bool
    photo: bytes | None


class ChangeLog:
    def __init__(self, path: Path) -> None:
        """Open or create the log at `path`, waiting for a process that is about to leave it.

        Raises:
            UserError: another process has it, or the file is no SQLite database.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=WAIT_SECONDS, check_same_thread=False)
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA recursive_triggers=ON")  # REPLACE deletes the old row's vector
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: the change log cannot be opened: {error}") from error

    def put(self, sources: Sequence[Source], vectors: NDArray[np.float32], version: str) -> int:
        """Add or replace products; durable when it returns. The last one's `seq`.

        Args:
            vectors: float32 [n, d] by the model `version`.
        """
        seq = 0
        with self._lock, self._db:
            for source, vector in zip(sources, vectors, strict=True):
                product = source.product
                self._forget(product.product_id)
                seq = self._insert(
                    product.product_id,
                    "product",
                    title=product.title,
                    category=product.category,
                    price=product.price,
                    in_stock=product.in_stock,
                    photo=source.photo,
                )
                self._set_vector(seq, version, vector)
        return seq

    def delete(self, product_id: str) -> int:
        """Mark a product as deleted; durable when it returns. Its `seq`."""
        with self._lock, self._db:
            self._forget(product_id)
            return self._insert(product_id, "deleted")

    def patch(self, product_id: str, patch: Patch) -> int:
        """Change price or stock of a product; durable when it returns. Its `seq`.

        Args:
            patch: that changes something.
        """
        seq = 0
        with self._lock, self._db:
            if patch.price is not None:
                seq = self._insert(product_id, "price", price=patch.price)
            if patch.in_stock is not None:
                seq = self._insert(product_id, "in_stock", in_stock=patch.in_stock)
        return seq

    def _forget(self, product_id: str) -> None:
        self._db.execute("DELETE FROM change WHERE product_id = ?", (product_id,))

    def _insert(self, product_id: str, part: Part, **columns: object) -> int:
        row = {"product_id": product_id, "part": part, "at": time.time(), **columns}
        marks = ", ".join("?" * len(row))
        found = self._db.execute(
            f"REPLACE INTO change ({', '.join(row)}) VALUES ({marks})", list(row.values())
        )
        assert found.lastrowid is not None
        return found.lastrowid

    def since(self, seq: int, version: str, limit: int) -> list[Change]:
        """The next changes after `seq`, at most `limit`, up to the first that has no vector of
        `version` yet (`lacking` names these)."""
        with self._lock:
            rows = self._db.execute(
                "SELECT change.seq, product_id, part, title, category, price, in_stock, vector "
                "FROM change LEFT JOIN vector ON vector.seq = change.seq AND version = ? "
                "WHERE change.seq > ? ORDER BY change.seq LIMIT ?",
                (version, seq, limit),
            ).fetchall()
        known = takewhile(lambda row: row[2] != "product" or row[-1] is not None, rows)
        return [_change(*row) for row in known]

    def lacking(self, seq: int, version: str, limit: int) -> list[tuple[int, Source]]:
        """Of the next `limit` changes after `seq` the products, by their own `seq`, that have no
        vector of `version`."""
        with self._lock:
            rows = self._db.execute(
                "SELECT seq, product_id, title, category, price, in_stock, photo FROM change "
                "WHERE seq IN (SELECT seq FROM change WHERE seq > ? ORDER BY seq LIMIT ?) "
                "AND part = 'product' AND NOT EXISTS "
                "(SELECT 1 FROM vector WHERE vector.seq = change.seq AND version = ?) ORDER BY seq",
                (seq, limit, version),
            ).fetchall()
        return [
            (seq, Source(Product(product_id, title, category, price, bool(in_stock)), photo))
            for seq, product_id, title, category, price, in_stock, photo in rows
        ]

    def add_vectors(self, seqs: Sequence[int], vectors: NDArray[np.float32], version: str) -> None:
        """Vectors of products as they were at `seqs`; a product that changed since is passed by."""
        with self._lock, self._db:
            for seq, vector in zip(seqs, vectors, strict=True):
                known = self._db.execute("SELECT 1 FROM change WHERE seq = ?", (seq,)).fetchone()
                if known:
                    self._set_vector(seq, version, vector)

    def _set_vector(self, seq: int, version: str, vector: NDArray[np.float32]) -> None:
        blob = np.ascontiguousarray(vector, np.float32).tobytes()
        self._db.execute("REPLACE INTO vector VALUES (?, ?, ?)", (seq, version, blob))

    def photo(self, product_id: str) -> bytes | None:
        """The photo of a product that was put."""
        logged = self.logged(product_id)
        return None if logged is None else logged.photo

    def logged(self, product_id: str) -> Logged | None:
        """The last time that a product was put or deleted."""
        with self._lock:
            row = self._db.execute(
                "SELECT at, part, photo FROM change WHERE product_id = ? AND part IN (?, ?)",
                (product_id, *WHOLE),
            ).fetchone()
        return row and Logged(datetime.fromtimestamp(row[0], UTC), row[1] == "deleted", row[2])

    def before(self, moment: datetime) -> int:
        """`seq` of the last change made before `moment`; 0: there is none."""
        with self._lock:
            return self._db.execute(
                "SELECT coalesce(max(+seq), 0) FROM change WHERE at < ?",
                (moment.timestamp(),),
            ).fetchone()[0]

    def out_of_stock(self, seq: int) -> list[str]:
        """Products that changes up to `seq` took out of stock; no later one says they are back."""
        with self._lock:
            rows = self._db.execute(
                "SELECT product_id FROM change WHERE in_stock = 0 AND +seq <= ? AND (part = "
                "'in_stock' OR NOT EXISTS (SELECT 1 FROM change AS own WHERE own.part = 'in_stock' "
                "AND own.product_id = change.product_id)) ORDER BY +seq",
                (seq,),
            ).fetchall()
        return [name for (name,) in rows]

    def last(self) -> int:
        """`seq` of the last change; 0: there is none."""
        with self._lock:
            return self._db.execute("SELECT coalesce(max(seq), 0) FROM change").fetchone()[0]

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _change(
    seq: int,
    product_id: str,
    part: Part,
    title: str,
    category: str | None,
    price: float | None,
    in_stock: int | None,
    vector: bytes | None,
) -> Change:
    if part == "deleted":
        return Change(seq, product_id, None, None)
    if vector is None:
        patch = Patch(price, None if in_stock is None else bool(in_stock))
        return Change(seq, product_id, None, None, patch)
    product = Product(product_id, title, category, price, bool(in_stock))
    return Change(seq, product_id, product, np.frombuffer(vector, np.float32))
