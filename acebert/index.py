"""Product vectors in FAISS: exact search, and an approximate index for speed.

One FAISS index serves both. HNSW keeps the vectors in a flat store that can be searched by itself;
IVF with every list probed is exact. HNSW up to `ann_from` products, since it is fast and needs no
training; IVF from there, since it is built in minutes and takes no memory for links. Score is the
inner product: cosine, for vectors of length 1.

Codes (fp16, int8, PQ) take less memory and score less exactly; where the exact vectors are at hand,
mapped from a file, more candidates than asked for are taken by codes and scored again by these.

A search among some products only (`among`) looks through all of these where they are few, which is
cheaper than to walk a graph or lists in which hardly anything counts, and raises the search effort
by their share where they are many. Where that finds too few, as among products that all lie far
from the query, all of the allowed are looked through after all.
"""

import dataclasses
import json
import logging
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.errors import UserError

log = logging.getLogger(__name__)

HNSW_LINKS = 32
HNSW_BUILD = 100
TRAIN_A_LIST = 64  # vectors to train each list of IVF on; FAISS warns below 39
TUNE_QUERIES = 500
EFFORT_STEP = 1.4
GPU_MOST = 2048  # lists of IVF that FAISS looks through for a query on a GPU, and hits it returns
RESCORED = 3  # candidates by codes for each hit that is asked for

Kind = Literal["flat", "hnsw", "ivf"]
Codec = Literal["fp32", "fp16", "int8", "pq"]
_CODES = {"fp32": "Flat", "fp16": "SQfp16", "int8": "SQ8"}


@dataclass(frozen=True)
class IndexInfo:
    kind: Kind
    products: int
    dimensions: int
    effort: int
    """efSearch of HNSW, nprobe of IVF: set at building to reach `target_recall`"""
    effort_k: int
    """neighbours that it was set for"""
    target_recall: float
    tuned_recall: float
    """what it reached on the queries that it was set on"""
    codec: Codec = "fp32"

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Of a saved index.

        Raises:
            UserError: it has no index.json that can be read.
        """
        try:
            return cls(**json.loads((directory / "index.json").read_text()))
        except FileNotFoundError as error:
            raise UserError(f"{directory}: not an index, it has no index.json") from error
        except (TypeError, ValueError, OSError) as error:
            raise UserError(f"{directory}: the index cannot be read: {error}") from error


class ProductIndex:
    """n products; build or load one, then search it."""

    def __init__(
        self,
        index: Any,
        product_ids: list[str],
        info: IndexInfo,
        vectors: NDArray[np.float32] | None = None,
    ) -> None:
        """`vectors`: float32 [n, D], those that were indexed, to score candidates of codes by."""
        self.product_ids = product_ids
        self.info = info
        self._stored = index
        self._vectors = vectors if info.codec != "fp32" else None
        flat = faiss.downcast_index(index.storage) if info.kind == "hnsw" else index
        self._exact = _on_gpu(flat)
        self._approximate = index if info.kind == "hnsw" else self._exact  # HNSW has no GPU form
        self._exact_on_cpu = flat

    @classmethod
    def build(
        cls,
        vectors: NDArray[np.float32],
        product_ids: list[str],
        queries: NDArray[np.float32],
        *,
        ann_from: int,
        k: int = 100,
        target_recall: float = 0.95,
        kind: Kind | None = None,
        codec: Codec = "fp32",
    ) -> Self:
        """Index the vectors; set the search effort on a sample of real queries.

        Args:
            vectors: float32 [n, D], of length 1.
            product_ids: [n].
            queries: float32 [m, D], m > 0; queries lie elsewhere than products do.
            ann_from: products from which the index is IVF.
            k: neighbours at which `target_recall` of the exact ones are to be found.
            kind: which index, whatever the number of products (none: by `ann_from`).
            codec: what a vector is kept as.

        Raises:
            UserError: no product, no query, or shapes that do not fit.
        """
        if vectors.ndim != 2 or len(vectors) != len(product_ids) or not len(vectors):
            raise UserError(
                f"index: {len(product_ids)} product ids for vectors of shape {vectors.shape}"
            )
        if not len(queries):
            raise UserError("index: no query to set the search effort on")
        n, d = vectors.shape
        k = min(k, n)
        kind = kind or ("hnsw" if n < ann_from else "ivf")
        index = {"flat": _flat, "hnsw": _hnsw, "ivf": _ivf}[kind](vectors, codec)
        most = index.nlist if kind == "ivf" else n
        effort = {"flat": n, "hnsw": min(k, n), "ivf": 1}[kind]
        step = max(1, len(queries) // TUNE_QUERIES)
        sample = queries[::step][:TUNE_QUERIES]
        info = IndexInfo(kind, n, d, effort, k, target_recall, tuned_recall=0.0, codec=codec)
        built = cls(index, product_ids, info, vectors)
        exact = built.search(sample, k, exact=True)[0] if codec == "fp32" else None
        if exact is None:
            exact, _ = faiss.knn(sample, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        while True:
            reached = _found(*built.search(sample, k), exact)
            built.info = dataclasses.replace(built.info, tuned_recall=reached)
            if reached >= target_recall or built.info.effort == most:
                break
            more = min(math.ceil(built.info.effort * EFFORT_STEP), most)
            built.info = dataclasses.replace(built.info, effort=more)
        info = built.info
        log.info(
            "index: %s %s, %d × %d, effort %d: recall@%d %.3f (wanted: %.2f)",
            *(info.kind, info.codec, info.products, info.dimensions),
            *(info.effort, info.effort_k, info.tuned_recall, info.target_recall),
        )
        return built

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        exact: bool = False,
        among: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best k products of each query, best first.

        Args:
            queries: float32 [m, D].
            exact: look at all products (of codes, where vectors are kept as such).
            among: bool [n]: only these (none: all).

        Returns:
            Scores [m, k] and rows of `product_ids` [m, k]; row -1 where fewer were found.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        wider = max(1.0, k / self.info.effort_k)
        if self._vectors is None or exact:
            return self._whole(queries, k, exact, among, wider)
        _, rows = self._whole(queries, min(RESCORED * k, self.info.products), exact, among, wider)
        scores = np.einsum("md,mkd->mk", queries, self._vectors[rows])
        scores[rows < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        missing = ((0, 0), (0, k - order.shape[1]))
        best = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        return (
            np.pad(best[0], missing, constant_values=-np.inf),
            np.pad(best[1], missing, constant_values=-1),
        )

    def _whole(
        self,
        queries: NDArray[np.float32],
        k: int,
        exact: bool,
        among: NDArray[np.bool_] | None,
        wider: float,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """With as many hits as there are products to be found, where some are not allowed or more
        are asked for than the effort was set for (`wider` > 1): a query that the approximate search
        found too few for is searched exactly."""
        scores, rows = self._search(queries, k, exact, among, wider)
        there = min(k, self.info.products if among is None else int(among.sum()))
        if there and (among is not None or wider > 1):
            lacking = rows[:, there - 1] < 0
            if lacking.any():
                found = self._search(queries[lacking], k, True, among)
                scores[lacking], rows[lacking] = found
        return scores, rows

    def _search(
        self,
        queries: NDArray[np.float32],
        k: int,
        exact: bool,
        among: NDArray[np.bool_] | None,
        wider: float = 1.0,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        kind, n = self.info.kind, self.info.products
        share, selector = 1.0, None
        if among is not None:
            share = float(among.mean())
            bits: Any = np.packbits(among, bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg]
            exact = exact or share**2 * n < self._looked_at()
        # A selector is looked at on the CPU; HNSW's own store is searched by itself.
        on = self._exact if selector is None and k <= GPU_MOST else self._exact_on_cpu
        if kind == "flat" or (kind == "hnsw" and exact):
            chosen: Any = selector and faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
            return on.search(queries, k, params=chosen)
        if kind == "hnsw":
            effort = min(n, math.ceil(max(self.info.effort * wider, k) / share))
            chosen = faiss.SearchParametersHNSW(efSearch=effort, sel=selector)  # type: ignore[attr-defined]
            return self._approximate.search(queries, k, params=chosen)
        lists = self._stored.nlist
        probed = lists if exact else min(lists, math.ceil(self.info.effort * wider / share))
        if probed > GPU_MOST:
            on = self._exact_on_cpu
        chosen = faiss.SearchParametersIVF(nprobe=probed, sel=selector)  # type: ignore[call-arg]
        return on.search(queries, k, params=chosen)

    def _looked_at(self) -> float:
        """About how many products a search without a filter compares with a query."""
        if self.info.kind == "hnsw":
            return self.info.effort * HNSW_LINKS
        return self.info.products * self.info.effort / getattr(self._stored, "nlist", 1)

    def recall(self, queries: NDArray[np.float32], k: int) -> float:
        """Share of the exact k best that the approximate search finds, over m queries.

        A product as good as the k-th counts as found whichever of its equals is returned.
        """
        k = min(k, self.info.products)
        exact, _ = self.search(queries, k, exact=True)
        return _found(*self.search(queries, k), exact)

    def save(self, directory: Path) -> None:
        """Write index.faiss, products.parquet (product_id) and index.json."""
        directory.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self._stored, str(directory / "index.faiss"))
        pq.write_table(pa.table({"product_id": self.product_ids}), directory / "products.parquet")
        (directory / "index.json").write_text(
            json.dumps(dataclasses.asdict(self.info), indent=2) + "\n"
        )

    @classmethod
    def load(cls, directory: Path, vectors: NDArray[np.float32] | None = None) -> Self:
        """Read what `save` wrote; `vectors` as the constructor takes them.

        Raises:
            UserError: a file is missing, or the files do not belong together.
        """
        info = IndexInfo.read(directory)
        for name in ("index.faiss", "products.parquet"):
            if not (directory / name).is_file():
                raise UserError(f"{directory}: not an index, it has no {name}")
        try:
            ids = pq.read_table(directory / "products.parquet")["product_id"].to_pylist()
            index = faiss.read_index(str(directory / "index.faiss"))
        except (TypeError, ValueError, KeyError, RuntimeError, pa.ArrowException) as error:
            raise UserError(f"{directory}: the index cannot be read: {error}") from error
        if not index.ntotal == len(ids) == info.products or index.d != info.dimensions:
            raise UserError(
                f"{directory}: index.faiss holds {index.ntotal} vectors of {index.d} dimensions, "
                f"products.parquet {len(ids)} ids, index.json says {info.products} and "
                f"{info.dimensions}: they do not belong together"
            )
        return cls(index, ids, info, vectors)


def _found(
    scores: NDArray[np.float32], rows: NDArray[np.int64], exact: NDArray[np.float32]
) -> float:
    """Share of the k best that were found, from the scores of both searches [m, k]."""
    good = (scores >= exact[:, -1:] - 1e-6) & (rows >= 0)
    return float(good.mean())


def ivf_lists(n: int) -> int:
    """Into how many lists IVF puts n vectors."""
    return max(1, min(round(4 * n**0.5), n // TRAIN_A_LIST))


def _flat(vectors: NDArray[np.float32], codec: Codec) -> Any:
    return _made(vectors, _CODES[codec])


def _hnsw(vectors: NDArray[np.float32], codec: Codec) -> Any:
    return _made(vectors, f"HNSW{HNSW_LINKS}_{_CODES[codec]}")


def _ivf(vectors: NDArray[np.float32], codec: Codec) -> Any:
    n, d = vectors.shape
    nlist = ivf_lists(n)
    return _made(vectors, f"IVF{nlist},{_CODES.get(codec, f'PQ{d // 2}')}", nlist * TRAIN_A_LIST)


def _made(vectors: NDArray[np.float32], factory: str, train: int = 100_000) -> Any:
    """The index that FAISS's `factory` string names, trained on `train` of the vectors."""
    n, d = vectors.shape
    index: Any = faiss.index_factory(d, factory, faiss.METRIC_INNER_PRODUCT)
    if factory.startswith("HNSW"):
        index.hnsw.efConstruction = HNSW_BUILD
    if not index.is_trained:
        sample = np.random.default_rng(0).choice(n, min(n, train), replace=False)
        index.train(vectors[np.sort(sample)])
    index.add(vectors)
    return index


def _on_gpu(index: Any) -> Any:
    """On the first GPU that this process sees, where there is one and FAISS has such an index for
    GPUs (not of scalar codes outside of IVF). Copies on several take no search parameters."""
    if not faiss.get_num_gpus():
        return index
    try:
        copy = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    except RuntimeError as error:  # says why in its first line; the rest is of its C++ code
        log.info("index: searched on the CPU (%s)", str(error).splitlines()[0])
        return index
    return _OneAtATime(copy)


class _OneAtATime:
    """An index on a GPU. FAISS's are for one thread at a time, also to search (its wiki, 'Threads
    and asynchronous calls'), and the service has several."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._turn = threading.Lock()

    def search(self, queries: NDArray[np.float32], k: int, params: Any) -> Any:
        with self._turn:
            return self._index.search(queries, k, params=params)
