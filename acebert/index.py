"""Product vectors in FAISS: exact search, and an approximate index for speed.

One FAISS index serves both. HNSW keeps the vectors in a flat store that can be searched by itself;
IVF with every list probed is exact. HNSW up to `ann_from` products, since it is fast and needs no
training; IVF from there, since it is built in minutes and takes no memory for links. Score is the
inner product: cosine, for vectors of length 1.
"""

import dataclasses
import json
import logging
import math
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


@dataclass(frozen=True)
class IndexInfo:
    kind: Literal["hnsw", "ivf"]
    products: int
    dimensions: int
    effort: int
    """efSearch of HNSW, nprobe of IVF: set at building to reach `target_recall`"""
    effort_k: int
    """neighbours that it was set for"""
    target_recall: float
    tuned_recall: float
    """what it reached on the queries that it was set on"""


class ProductIndex:
    """n products; build or load one, then search it."""

    def __init__(self, index: Any, product_ids: list[str], info: IndexInfo) -> None:
        self.product_ids = product_ids
        self.info = info
        self._stored = index
        flat = faiss.downcast_index(index.storage) if info.kind == "hnsw" else index
        self._exact = _on_gpu(flat)
        self._approximate = self._exact if info.kind == "ivf" else index  # HNSW has no GPU form

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
    ) -> Self:
        """Index the vectors; set the search effort on a sample of real queries.

        Args:
            vectors: float32 [n, D], of length 1.
            product_ids: [n].
            queries: float32 [m, D], m > 0; queries lie elsewhere than products do.
            ann_from: products from which the index is IVF.
            k: neighbours at which `target_recall` of the exact ones are to be found.

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
        kind: Literal["hnsw", "ivf"] = "hnsw" if n < ann_from else "ivf"
        index = _hnsw(vectors) if kind == "hnsw" else _ivf(vectors)
        most = n if kind == "hnsw" else index.nlist
        effort = min(k if kind == "hnsw" else 1, most)
        step = max(1, len(queries) // TUNE_QUERIES)
        sample = queries[::step][:TUNE_QUERIES]
        info = IndexInfo(kind, n, d, effort, k, target_recall, tuned_recall=0.0)
        built = cls(index, product_ids, info)
        exact, _ = built.search(sample, k, exact=True)
        while True:
            reached = _found(*built.search(sample, k), exact)
            built.info = dataclasses.replace(built.info, tuned_recall=reached)
            if reached >= target_recall or built.info.effort == most:
                break
            more = min(math.ceil(built.info.effort * EFFORT_STEP), most)
            built.info = dataclasses.replace(built.info, effort=more)
        log.info("index: %s", built.info)
        return built

    def search(
        self, queries: NDArray[np.float32], k: int, *, exact: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best k products of each query, best first.

        Args:
            queries: float32 [m, D].

        Returns:
            Scores [m, k] and rows of `product_ids` [m, k]; row -1 where fewer were found.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if exact and self.info.kind == "hnsw":
            return self._exact.search(queries, k)
        if self.info.kind == "hnsw":
            effort = faiss.SearchParametersHNSW(efSearch=max(self.info.effort, k))  # type: ignore[attr-defined]
        else:
            probed = self._stored.nlist if exact else self.info.effort
            effort = faiss.SearchParametersIVF(nprobe=probed)  # type: ignore[call-arg]
        return self._approximate.search(queries, k, params=effort)

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
    def load(cls, directory: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: a file is missing, or the files do not belong together.
        """
        for name in ("index.faiss", "products.parquet", "index.json"):
            if not (directory / name).is_file():
                raise UserError(f"{directory}: not an index, it has no {name}")
        try:
            info = IndexInfo(**json.loads((directory / "index.json").read_text()))
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
        return cls(index, ids, info)


def _found(
    scores: NDArray[np.float32], rows: NDArray[np.int64], exact: NDArray[np.float32]
) -> float:
    """Share of the k best that were found, from the scores of both searches [m, k]."""
    good = (scores >= exact[:, -1:] - 1e-6) & (rows >= 0)
    return float(good.mean())


def _hnsw(vectors: NDArray[np.float32]) -> Any:
    index = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = HNSW_BUILD
    index.add(vectors)
    return index


def _ivf(vectors: NDArray[np.float32]) -> Any:
    n, d = vectors.shape
    nlist = max(1, min(round(4 * n**0.5), n // TRAIN_A_LIST))
    coarse = faiss.IndexFlatIP(d)
    index = faiss.IndexIVFFlat(coarse, d, nlist, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(n, min(n, nlist * TRAIN_A_LIST), replace=False)
    index.train(vectors[np.sort(sample)])
    index.add(vectors)
    return index


def _on_gpu(index: Any) -> Any:
    return faiss.index_cpu_to_all_gpus(index) if faiss.get_num_gpus() else index
