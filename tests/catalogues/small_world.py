"""A small catalogue and log as the ingest stage writes them, made by hand from a seed."""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from acebert.config import Settings, load_settings
from acebert.workdir import Stage

COLOURS = ("red", "blue", "green", "black")
TYPES = ("shirt", "shoes", "watch", "bag", "hat")
BRANDS = ("acme", "zenith", "orbit")
DAY = datetime.date(2026, 1, 3)


@dataclass(frozen=True)
class World:
    settings: Settings
    ingested: Stage
    product_ids: list[str]
    titles: list[str]
    queries: list[str]
    """all of the log, by their rows"""
    clicked: set[tuple[str, str]]
    """(query, product_id) of the test day"""
    shown: list[tuple[int, str, str, bool]]
    """(search, query, product_id, clicked) of the test day"""


def make_world(
    root: Path,
    seed: int = 0,
    negatives: bool = True,
    types: tuple[str, ...] = TYPES,
    searches: int = 300,
    **evaluation: object,
) -> World:
    """60 products, 20 queries (the last five on the test day alone, but for the first of these on
    the validation day); with more `types` more of both."""
    rng = np.random.default_rng(seed)
    kinds = [(b, c, t) for b in BRANDS for c in COLOURS for t in types]
    # Every second title does not say the colour, and so is the same as others.
    titles = [f"{b} {t}" if i % 2 else f"{b} {c} {t}" for i, (b, c, t) in enumerate(kinds)]
    product_ids = [f"sku-{i:03d}" for i in range(len(kinds))]
    queries = [f"{c} {t}" for c in COLOURS for t in types]
    known = len(queries) - 5

    ingest = root / "ingest" / f"world{seed}{negatives}"
    (ingest / "products").mkdir(parents=True)
    rows = np.arange(len(kinds), dtype=np.int32)
    pq.write_table(
        pa.table(
            {
                "product": rows,
                "product_id": product_ids,
                "title": titles,
                "category": [t for _, _, t in kinds],
                "category_code": pa.array([types.index(t) for _, _, t in kinds], pa.int32()),
                "price": pa.nulls(len(rows), pa.float32()),
                "listed_at": pa.nulls(len(rows), pa.timestamp("ms")),
                "image": pa.array([b"jpeg" if i % 10 else None for i in rows], pa.binary()),
                "image_uri": pa.nulls(len(rows), pa.string()),
            }
        ),
        ingest / "products" / "part-00000.parquet",
    )

    def wanted(query: int) -> list[int]:
        colour, type_ = queries[query].split()
        return [i for i, (_, c, t) in enumerate(kinds) if (c, t) == (colour, type_)]

    def pairs(rows: list[tuple[int, int]], name: str) -> None:
        counts: dict[tuple[int, int], int] = {}
        for pair in rows:
            counts[pair] = counts.get(pair, 0) + 1
        keys = sorted(counts)
        columns = {
            "pair": np.arange(len(keys)),
            "query": pa.array([q for q, _ in keys], pa.int32()),
            "product": pa.array([p for _, p in keys], pa.int32()),
            "day": pa.array([DAY] * len(keys), pa.date32()),
            "clicks": pa.array([counts[key] for key in keys], pa.int32()),
        }
        pq.write_table(pa.table(columns), ingest / name)

    train = [(q, int(rng.choice(wanted(q)))) for q in range(known) for _ in range(3)]
    pairs(train, "pairs.parquet")
    valid = [*train[::5], (known, wanted(known)[0])]
    pairs(valid, "valid_pairs.parquet")
    shown: list[tuple[int, int, int, int, bool]] = []
    for search in range(searches):
        query = int(rng.integers(len(queries)))
        good = wanted(query)
        others = rng.choice([i for i in rows if i not in good], 6, replace=False)
        products = rng.permutation([*rng.choice(good, 2, replace=False), *others])
        for position, product in enumerate(products.tolist(), 1):
            clicked = bool(rng.random() < (0.5 if product in good else 0.03))
            if clicked or negatives:
                shown.append((search, query, product, position, clicked))
    pairs([(q, p) for _, q, p, _, c in shown if c], "test_pairs.parquet")
    search, query, product, position, clicked = zip(*shown, strict=True)
    pq.write_table(
        pa.table(
            {
                "search": pa.array(np.unique(search, return_inverse=True)[1], pa.int64()),
                "query": pa.array(query, pa.int32()),
                "product": pa.array(product, pa.int32()),
                "position": pa.array(position, pa.int16()),
                "clicked": pa.array(clicked),
            }
        ),
        ingest / "test_impressions.parquet",
    )
    train_clicks = np.bincount([q for q, _ in train], minlength=len(queries))
    rows_of_queries = np.arange(len(queries), dtype=np.int32)
    pq.write_table(
        pa.table({"query": rows_of_queries, "text": queries, "clicks": train_clicks}),
        ingest / "queries.parquet",
    )
    hot: list[list[int]] = [[]]
    own: dict[str, list[int]] = {"train": [], "test": []}
    for column, clicks in (("train", train), ("test", [*train, *valid])):
        for i in range(len(kinds)):
            hot.append(sorted({q for q, p in clicks if p == i}))
            own[column].append(len(hot) - 1)
    pq.write_table(
        pa.table(
            {
                "hot_list": np.arange(len(hot), dtype=np.int32),
                "queries": pa.array(hot, pa.list_(pa.int32())),
            }
        ),
        ingest / "hot_lists.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "product": rows,
                **{column: np.array(lists, np.int32) for column, lists in own.items()},
            }
        ),
        ingest / "product_hot_lists.parquet",
    )
    (ingest / "report.json").write_text(json.dumps({"has_negatives": negatives}))
    arguments = ["--workdir", str(root), "--eval.bootstrap", "200"]
    for key, value in evaluation.items():
        arguments += [f"--eval.{key}", str(value)]
    return World(
        settings=load_settings(arguments),
        ingested=Stage("ingest", ingest, f"world{seed}{negatives}", 0.0, reused=True),
        product_ids=product_ids,
        titles=titles,
        queries=queries,
        clicked={(queries[q], product_ids[p]) for _, q, p, _, c in shown if c},
        shown=[(s, queries[q], product_ids[p], c) for s, q, p, _, c in shown],
    )


def write_vectors(
    directory: Path, products: dict[str, np.ndarray], queries: dict[str, np.ndarray]
) -> Path:
    """products.parquet and queries.parquet as the embed stage writes them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, column, vectors in (
        ("products", "product_id", products),
        ("queries", "query", queries),
    ):
        embedding = pa.array([v.astype(np.float32) for v in vectors.values()])
        table = pa.table({column: list(vectors), "embedding": embedding})
        pq.write_table(table, directory / f"{name}.parquet")
    return directory


def random_vectors(names: list[str], seed: int, dimensions: int = 16) -> dict[str, np.ndarray]:
    vectors = np.random.default_rng(seed).standard_normal((len(names), dimensions))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return dict(zip(names, vectors, strict=True))
