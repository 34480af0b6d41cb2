"""Kinds of index: build time, memory, recall@100 against exact search, queries a second.

    python benchmarks/index.py [--products 1000000] [--bundle DIR] [--kinds hnsw-fp32 ...]

Unit vectors around 1,000 centres, queries around the same ones; with `--bundle` around the product
and hot-query vectors of a model, which lie less apart. Each index at the search effort that its
build set for recall 0.95. `filtered` is the recall@100 among the 2 % of products that a filter
allows. All cores build; one thread searches, a query at a time.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from acebert.index import ProductIndex

KINDS = (
    *("flat-fp32", "flat-fp16", "flat-int8", "hnsw-fp32", "hnsw-fp16", "hnsw-int8"),
    *("ivf-fp32", "ivf-fp16", "ivf-int8", "ivf-pq"),
)
K = 100


def around(centres: np.ndarray, n: int, away: float, seed: int) -> np.ndarray:
    """`away`: length of the random step from a unit vector that is drawn, before normalising."""
    rng = np.random.default_rng(seed)
    d = centres.shape[1]
    step = away / math.sqrt(d) * rng.standard_normal((n, d), np.float32)
    vectors = centres[rng.integers(0, len(centres), n)] + step
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, exact, strict=True)]))


def main(arguments: argparse.Namespace) -> None:
    n, d, away = arguments.products, arguments.dimensions, 0.7
    of_products = np.random.default_rng(0).standard_normal((1000, d), np.float32)
    of_products /= np.linalg.norm(of_products, axis=1, keepdims=True)
    of_queries = of_products
    if arguments.bundle:
        of_products = np.load(arguments.bundle / "vectors.npy").astype(np.float32)
        of_queries = np.load(arguments.bundle / "hot.npy").astype(np.float32)
        d, away = of_products.shape[1], 0.3
    products = around(of_products, n, away, 0)
    tuning, queries = around(of_queries, 500, away, 1), around(of_queries, 200, away, 2)
    among = np.random.default_rng(9).random(n) < 0.02
    _, exact = faiss.knn(queries, products, K, metric=faiss.METRIC_INNER_PRODUCT)
    rows = np.flatnonzero(among)
    _, few = faiss.knn(queries, products[rows], K, metric=faiss.METRIC_INNER_PRODUCT)
    ids = [str(i) for i in range(n)]
    threads = faiss.omp_get_max_threads()
    print(f"{n} × {d}; build s, MiB, effort, recall@{K}, queries/s, filtered recall, queries/s")
    for name in arguments.kinds:
        kind, codec = name.split("-")
        faiss.omp_set_num_threads(threads)
        start = time.perf_counter()
        index = ProductIndex.build(products, ids, tuning, ann_from=1, kind=kind, codec=codec)
        built = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            index.save(Path(folder))
            size = (Path(folder) / "index.faiss").stat().st_size / 2**20
        faiss.omp_set_num_threads(1)
        row = [f"{name:10} {built:8.1f} {size:8.0f} {index.info.effort:8}"]
        for allowed, truth in ((None, exact), (among, rows[few])):
            start = time.perf_counter()
            found = [index.search(query[None], K, among=allowed)[1][0] for query in queries]
            rate = len(queries) / (time.perf_counter() - start)
            row.append(f"{recall(np.array(found), truth):8.4f} {rate:8.1f}")
        print(*row, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--products", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    main(parser.parse_args())
