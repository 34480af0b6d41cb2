"""The same products in Milvus, for catalogues that one machine does not hold.

A bundle is a collection, filled when it is first opened; changes are written to it. The change log
stays the truth: whoever opens the collection writes its changes again, each product's last one, so
a lost or doubled write mends itself. Milvus Lite (a file in place of a server) takes one process;
which index types are real in it is in docs/serving.md.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from acebert.errors import UserError
from acebert.index import HNSW_LINKS, ivf_lists
from acebert.serving.bundle import Bundle
from acebert.serving.catalogue import Unavailable
from acebert.serving.products import Change, Filter, Hit, Product

log = logging.getLogger(__name__)

ROWS = 1000  # of an insert
FIELDS = ["product_id", "title", "category", "price", "in_stock"]
NO_PRICE = -1.0  # Milvus Lite has no nulls to compare with


@contextmanager
def _answering() -> Iterator[None]:
    """
    Raises:
        Unavailable: Milvus does not answer, or not as it should.
    """
    try:
        yield
    except MilvusException as error:
        raise Unavailable(f"Milvus: {error}") from error


def drop_collections(uri: str, bundles: Sequence[Path]) -> None:
    """Those of bundles that are gone. A file of Milvus Lite is its service's alone, and is left."""
    if "://" not in uri:
        return
    client = MilvusClient(uri)
    for bundle in bundles:
        for name in (_collection(bundle), f"{_collection(bundle)}_filled"):
            if client.has_collection(name):
                client.drop_collection(name)


def _collection(bundle: Path) -> str:
    return f"acebert_{bundle.name}"


class MilvusIndex:
    """`live_index.LiveProducts` on Milvus."""

    def __init__(self, bundle: Bundle, uri: str) -> None:
        """
        Raises:
            UserError: Milvus cannot be reached.
        """
        self._name = _collection(bundle.directory)
        self._info = bundle.index_info
        self._changed: set[str] = set()
        self._categories = {name for name in bundle.columns()[0] if name is not None}
        try:
            self._client = MilvusClient(uri)
            lock = bundle.directory.with_name(f".{bundle.directory.name}.milvus.lock")
            with FileLock(lock):  # replicas start together
                if not self._client.has_collection(f"{self._name}_filled"):
                    self._fill(bundle)
            self._client.load_collection(self._name)
        except MilvusException as error:
            raise UserError(f"serve.milvus_uri {uri}: {error}") from error

    def _fill(self, bundle: Bundle) -> None:
        if self._client.has_collection(self._name):
            self._client.drop_collection(self._name)
        n, d = bundle.vectors.shape
        schema = self._client.create_schema()
        schema.add_field("product_id", DataType.VARCHAR, is_primary=True, max_length=800)
        schema.add_field("title", DataType.VARCHAR, max_length=8000)
        schema.add_field("category", DataType.VARCHAR, max_length=800)
        schema.add_field("price", DataType.DOUBLE)
        schema.add_field("in_stock", DataType.BOOL)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=d)
        index = self._client.prepare_index_params()
        kind = self._info.kind
        params = {"hnsw": {"M": HNSW_LINKS, "efConstruction": 200}, "ivf": {"nlist": ivf_lists(n)}}
        index.add_index(
            "vector",
            index_type={"flat": "FLAT", "hnsw": "HNSW", "ivf": "IVF_FLAT"}[kind],
            metric_type="IP",
            params=params.get(kind, {}),
        )
        self._client.create_collection(
            self._name, schema=schema, index_params=index, consistency_level="Strong"
        )
        for start in range(0, n, ROWS):
            rows = list(range(start, min(start + ROWS, n)))
            self._write(bundle.products(rows), np.asarray(bundle.vectors[rows]))
        self._client.create_collection(f"{self._name}_filled", dimension=2)  # whole from here on
        log.info("milvus: %d products in %s", n, self._name)

    def _write(self, products: Sequence[Product], vectors: NDArray[np.float32]) -> None:
        rows = [
            {
                "product_id": product.product_id,
                "title": product.title,
                "category": product.category or "",
                "price": NO_PRICE if product.price is None else product.price,
                "in_stock": product.in_stock,
                "vector": vector,
            }
            for product, vector in zip(products, vectors, strict=True)
        ]
        self._client.upsert(self._name, rows)

    def _effort(self, k: int) -> dict[str, int]:
        """As it was set for the bundle's FAISS index, which has as many links, or lists;
        Milvus Lite 3.2 reads neither as pymilvus 3.0 sends it: it has 16 links, 128 lists."""
        effort = self._info.effort
        return {"flat": {}, "hnsw": {"ef": max(effort, k)}, "ivf": {"nprobe": effort}}[
            self._info.kind
        ]

    @_answering()
    def search(self, queries: NDArray[np.float32], k: int, where: Filter) -> list[list[Hit]]:
        found = self._client.search(
            self._name,
            data=list(queries),
            limit=k,
            filter=_expression(where),
            output_fields=FIELDS,
            search_params={"metric_type": "IP", "params": self._effort(k)},
        )
        return [[Hit(_product(hit["entity"]), hit["distance"]) for hit in hits] for hits in found]

    def by_words(self, query: str, vector: NDArray[np.float32], k: int, where: Filter) -> list[Hit]:
        """
        Raises:
            UserError: always; words are matched by the FAISS index's own tables.
        """
        raise UserError("hybrid search needs the products here, not in Milvus (serve.milvus_uri)")

    def by_ids(
        self, product_ids: Sequence[str], vector: NDArray[np.float32], where: Filter
    ) -> list[Hit]:
        rows = self._get(product_ids, [*FIELDS, "vector"])
        hits = [Hit(_product(row), float(np.dot(row["vector"], vector))) for row in rows]
        return [hit for hit in hits if where.allows(hit.product)]

    def product(self, product_id: str) -> Product | None:
        rows = self._get([product_id], FIELDS)
        return _product(rows[0]) if rows else None

    def vector(self, product_id: str) -> NDArray[np.float32] | None:
        rows = self._get([product_id], ["vector"])
        return np.asarray(rows[0]["vector"], np.float32) if rows else None

    @_answering()
    def _get(self, product_ids: Sequence[str], fields: list[str]) -> list[dict[str, Any]]:
        return self._client.get(self._name, ids=list(product_ids), output_fields=fields)

    def is_changed(self, product_id: str) -> bool:
        return product_id in self._changed

    def categories(self) -> list[str]:
        return sorted(self._categories)

    @_answering()
    def apply(self, changes: Sequence[Change]) -> None:
        last: dict[str, tuple[Product, NDArray[np.float32]] | None] = {}
        for change in changes:
            name = change.product_id
            if change.patch is None:
                self._changed.add(name)
                last[name] = None
                if change.product is not None and change.vector is not None:
                    last[name] = change.product, change.vector
            elif (known := last[name] if name in last else self._known(name)) is not None:
                last[name] = change.patch.of(known[0]), known[1]
        kept = [row for row in last.values() if row is not None]
        if kept:
            self._write([product for product, _ in kept], np.stack([vector for _, vector in kept]))
        gone = [name for name, row in last.items() if row is None]
        if gone:
            self._client.delete(self._name, ids=gone)
        self._categories |= {p.category for p, _ in kept if p.category is not None}

    def _known(self, product_id: str) -> tuple[Product, NDArray[np.float32]] | None:
        rows = self._get([product_id], [*FIELDS, "vector"])
        return (_product(rows[0]), np.asarray(rows[0]["vector"], np.float32)) if rows else None


def _expression(where: Filter) -> str:
    parts = []
    if where.category is not None:
        parts.append(f"category == {json.dumps(where.category, ensure_ascii=False)}")
    if where.min_price is not None or where.max_price is not None:
        parts.append(f"price >= {max(0.0, where.min_price or 0.0)}")
    if where.max_price is not None:
        parts.append(f"price <= {where.max_price}")
    if where.in_stock is not None:
        parts.append(f"in_stock == {str(where.in_stock).lower()}")
    return " and ".join(parts)


def _product(row: dict[str, Any]) -> Product:
    price = row["price"]
    return Product(
        row["product_id"],
        row["title"],
        row["category"] or None,
        None if price == NO_PRICE else float(price),
        bool(row["in_stock"]),
    )
