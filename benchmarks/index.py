"""FAISS indexes at the size of a catalogue: build time, size, recall@100 against exact, speed.

    python benchmarks/index.py                       # 1 million × 128, all kinds
    python benchmarks/index.py --products 100000 --kinds HNSW32 IVF

Vectors are drawn: products lie in groups within categories, on a spectrum that falls as 1/√i, as
learned embeddings' do; sizes of groups are Zipf's. Queries are drawn from the same groups, with
noise of their own: they lie elsewhere than products do. An index's effort (nprobe, efSearch) is
raised until recall no longer grows. A point: all queries in one call (queries a second), and one
at a time (p50). Size is that of the index written to a file, links and codes included.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

K = 100
GOOD = 0.95
EFFORTS = {"IVF": (1, 2, 4, 8, 16, 32, 64, 128, 256), "HNSW": (100, 140, 200, 280, 400, 560, 800)}
SINGLE = 200  # queries asked one at a time

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Point:
    effort: int
    recall: float
    queries_a_second: float
    single_ms: float


@dataclass(frozen=True)
class Built:
    name: str
    seconds: float
    megabytes: float
    points: list[Point]


def draw(n: int, queries: int, d: int, seed: int) -> tuple[Vectors, Vectors]:
    """Products float32 [n, d] and queries float32 [queries, d], of length 1."""
    rng = np.random.default_rng(seed)
    spectrum = (1 / np.sqrt(np.arange(1, d + 1))).astype(np.float32)

    def normal(rows: int) -> Vectors:
        return rng.standard_normal((rows, d), np.float32) * spectrum

    groups = max(1, n // 50)
    centres = normal(max(1, groups // 40))[rng.integers(max(1, groups // 40), size=groups)]
    centres += 0.7 * normal(groups)
    share = 1 / np.arange(1, groups + 1) ** 0.8

    def members(rows: int, noise: float) -> Vectors:
        of = rng.choice(groups, rows, p=share / share.sum())
        x = centres[of] + noise * normal(rows)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return members(n, 0.5), members(queries, 0.7)


def kinds(n: int) -> list[str]:
    """FAISS factory strings: flat, IVF, HNSW × fp32, fp16, int8, PQ (two of it: 8 bits a pair of
    dimensions, and 4 bits for the SIMD scan, its first candidates scored again)."""
    ivf = f"IVF{max(1, min(round(4 * n**0.5), n // 64))}"
    stores = ("Flat", "SQfp16", "SQ8")
    return [
        *stores,
        "PQ64",
        *(f"{ivf},{store}" for store in (*stores, "PQ64", "PQ64x4fs,RFlat")),
        *(f"HNSW32,{store}" for store in (*stores, "PQ64")),
    ]


def build(name: str, products: Vectors) -> tuple[Any, float, float]:
    """The index, seconds to train and fill it, and its size [10^6 bytes]."""
    index: Any = faiss.index_factory(products.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    if name.startswith("HNSW"):
        index.hnsw.efConstruction = 100
    start = time.perf_counter()
    if not index.is_trained:
        rows = np.random.default_rng(0).permutation(len(products))
        nlist = faiss.extract_index_ivf(index).nlist if "IVF" in name else 1000
        index.train(products[np.sort(rows[: 64 * nlist])])
    index.add(products)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "index"
        faiss.write_index(index, str(path))
        return index, seconds, path.stat().st_size / 1e6


def measure(index: Any, queries: Vectors, exact: Rows) -> tuple[float, float, float]:
    """recall@K, queries a second in one call, p50 of a call with one query [ms].

    `exact`: row of the K-th and better products of each query, int64 [queries, K].
    """
    index.search(queries[:10], K)
    start = time.perf_counter()
    _, found = index.search(queries, K)
    seconds = time.perf_counter() - start
    singles = []
    for query in queries[:SINGLE]:
        once = time.perf_counter()
        index.search(query[None], K)
        singles.append(time.perf_counter() - once)
    common = [len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True)]
    return float(np.mean(common) / K), len(queries) / seconds, 1e3 * float(np.median(singles))


def run(name: str, products: Vectors, queries: Vectors, exact: Rows) -> Built:
    """Build an index and raise its effort until recall no longer grows."""
    index, seconds, megabytes = build(name, products)
    space = faiss.ParameterSpace()
    family = next((f for f in EFFORTS if name.startswith(f)), None)
    parameter = {"IVF": "nprobe", "HNSW": "efSearch", None: ""}[family]
    points: list[Point] = []
    for effort in EFFORTS[family] if family else (0,):
        if parameter:
            space.set_index_parameter(index, parameter, effort)
        if "RFlat" in name:
            space.set_index_parameter(index, "k_factor_rf", 4)
        points.append(Point(effort, *measure(index, queries, exact)))
        p = points[-1]
        print(
            f"{name:<24}{parameter:>9} {effort:>4}  recall@{K} {p.recall:.4f}"
            f"  {p.queries_a_second:9.1f} q/s  single {p.single_ms:7.3f} ms"
            f"  built in {seconds:7.1f} s, {megabytes:7.1f} MB",
            flush=True,
        )
        before = points[-2].recall if len(points) > 1 else -1.0
        if p.recall > 0.995 or (p.recall > 0.5 and p.recall - before < 0.002):
            break
    return Built(name, seconds, megabytes, points)


def figure(built: list[Built], path: Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    marker = {"I": "o-", "H": "s-"}
    for one in built:
        x = [p.recall for p in one.points]
        y = [p.queries_a_second for p in one.points]
        axes.plot(x, y, marker.get(one.name[0], "*"), label=one.name, markersize=5)
    axes.axvline(GOOD, color="0.7", linewidth=1, zorder=0)
    axes.set_yscale("log")
    axes.set_xlabel(f"recall@{K} against exact search")
    axes.set_ylabel("queries a second, all in one call")
    axes.set_title(title)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    picture.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--products", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--kinds", nargs="*", help="factory strings that start with one of these")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("index.png"))
    arguments = parser.parse_args()
    n, d = arguments.products, arguments.dimensions
    faiss.omp_set_num_threads(arguments.threads)
    products, queries = draw(n, arguments.queries, d, arguments.seed)
    _, exact = faiss.knn(queries, products, K, metric=faiss.METRIC_INNER_PRODUCT)
    names = [
        name for name in kinds(n) if not arguments.kinds or name.startswith(tuple(arguments.kinds))
    ]
    built = [run(name, products, queries, exact) for name in names]
    title = f"{n:,} × {d}, {arguments.threads} threads"
    figure(built, arguments.out, title)
    good = [
        (point.queries_a_second, one.name, point.effort)
        for one in built
        for point in one.points
        if point.recall >= GOOD
    ]
    if good:
        speed, name, effort = max(good)
        print(f"fastest with recall@{K} ≥ {GOOD}: {name}, effort {effort}, {speed:.0f} q/s")
    print(arguments.out)


if __name__ == "__main__":
    main()
