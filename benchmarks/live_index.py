"""What changes cost: seconds to apply many of them, and to search beside them.

    python benchmarks/live_index.py [--products 100000] [--changes 100000] [--dimensions 128]

Drawn unit vectors; half of the changes replace products of the bundle, half are new. They are
applied as a replica gets them, `LIMIT` at a time. Milliseconds are medians of single searches
for the first 10, on one thread.
"""

import argparse
import time
from types import SimpleNamespace

import faiss
import numpy as np
from numpy.typing import NDArray

from acebert.index import ProductIndex
from acebert.serving.catalogue import LIMIT
from acebert.serving.live_index import LiveIndex
from acebert.serving.products import Change, Filter, Product

CATEGORIES = [f"category {i}" for i in range(20)]
FILTERS = {
    "no filter": Filter(),
    "a category": Filter(category=CATEGORIES[3]),
    "a price and in stock": Filter(max_price=20.0, in_stock=True),
}
SEARCHES = 30


def product(name: str, i: int) -> Product:
    return Product(name, f"thing {i}", CATEGORIES[i % 20], float(i % 100), i % 5 > 0)


def drawn(vectors: NDArray[np.float32]) -> SimpleNamespace:
    """What a live index asks of a bundle, without the files."""
    n = len(vectors)
    return SimpleNamespace(
        vectors=vectors,
        index=ProductIndex.build(
            vectors, [f"p{i}" for i in range(n)], vectors[:10], ann_from=n, kind="flat"
        ),
        columns=lambda: ([CATEGORIES[i % 20] for i in range(n)], np.arange(n) % 100.0),
        products=lambda rows: [product(f"p{row}", row) for row in rows],
        row_of=lambda name: int(name[1:]) if name[0] == "p" else None,
        titles_with=lambda word: 0,
    )


def main(arguments: argparse.Namespace) -> None:
    faiss.omp_set_num_threads(1)
    n, count = arguments.products, arguments.changes
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((n + count, arguments.dimensions)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"p{i}" if i % 2 and i < n else f"new-{i}" for i in range(count)]
    changes = [
        Change(i + 1, name, product(name, i), vectors[n + i]) for i, name in enumerate(names)
    ]
    index = LiveIndex(drawn(vectors[:n]))  # type: ignore[arg-type]

    def report(when: str) -> None:
        for what, where in FILTERS.items():
            seconds = []
            for i in range(SEARCHES):
                start = time.perf_counter()
                index.search(vectors[i][None], 10, where)
                seconds.append(time.perf_counter() - start)
            print(f"{when}, {what}: {1000 * np.median(seconds):.1f} ms a search", flush=True)

    report("without changes")
    start = time.perf_counter()
    for first in range(0, count, LIMIT):
        index.apply(changes[first : first + LIMIT])
    print(f"{count:,} changes applied in {time.perf_counter() - start:.1f} s", flush=True)
    report(f"beside {count:,} changes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--products", type=int, default=100_000)
    parser.add_argument("--changes", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=128)
    main(parser.parse_args())
