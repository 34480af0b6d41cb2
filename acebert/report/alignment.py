"""Fig. 7 as data: queries and products of a few categories on a plane, and a fresh domain probe.

The picture cannot tell how well the two domains are aligned, and the adversary's own accuracy may
only say that it is weak. So classifiers that no encoder has played against are trained on frozen
vectors to tell queries from products, and measured on vectors that they have not seen.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.errors import UserError
from acebert.evaluation.domain_probe import LEAST, domain_probe
from acebert.evaluation.evaluate import read_vectors
from acebert.workdir import Stage, run_stage

log = logging.getLogger(__name__)

VERSION = 1
CATEGORIES = 8
POINTS = 8000  # queries, and products, at most (paper section 4.6)
PERPLEXITY = 30


@dataclass(frozen=True)
class Sample:
    """Queries and products of the categories with most clicks on the test day.

    Attributes:
        categories: names, most clicks first
        queries: texts; of_query: rows of `categories`
        products: ids; of_product: rows of `categories`
    """

    categories: list[str]
    queries: list[str]
    of_query: NDArray[np.int64]
    products: list[str]
    of_product: NDArray[np.int64]


def alignment_stage(
    settings: Settings, ingested: Stage, systems: Mapping[str, Sequence[Path]]
) -> Stage:
    """points.parquet (system, side, category, x, y: t-SNE of the first seed) and probe.json
    ({system: [{linear, mlp}, …] by seed}: held-out accuracies; ½ is a coin's).

    Args:
        systems: name → directories of vectors as the embed stage writes them, one a seed

    Raises:
        UserError: no category was clicked on the test day, or there are too few vectors to probe.
    """
    key = {
        "version": VERSION,
        "ingest": ingested.digest,
        "systems": {name: [path.name for path in paths] for name, paths in systems.items()},
        "points": POINTS,
    }

    def build(out: Path) -> None:
        sample = draw_sample(ingested.path)
        tables: list[pa.Table] = []
        probes: dict[str, list[dict[str, float]]] = {}
        for name, directories in systems.items():
            log.info("report: t-SNE and domain probe of %s", name)
            probes[name] = []
            for i, directory in enumerate(directories):
                products = read_vectors(
                    directory / "products.parquet", "product_id", sample.products
                )
                queries = read_vectors(directory / "queries.parquet", "query", sample.queries)
                probe = domain_probe(queries, products)
                if not probe["points"]:
                    raise UserError(
                        f"{name}: fewer than {LEAST} distinct vectors of queries or of products in "
                        "the categories with most clicks"
                    )
                probes[name].append(probe)
                if i == 0:
                    tables.append(_table(name, sample, _plane(queries, products)))
        pq.write_table(pa.concat_tables(tables), out / "points.parquet")
        (out / "probe.json").write_text(json.dumps(probes, indent=2) + "\n")

    return run_stage(settings.workdir, "alignment", key, build)


def draw_sample(ingested: Path, points: int = POINTS, seed: int = 0) -> Sample:
    """A query's category is the one that it was clicked in most on the test day.

    Raises:
        UserError: no product that was clicked there has a category.
    """
    pairs = pq.read_table(ingested / "test_pairs.parquet", columns=["query", "product", "clicks"])
    columns = ["product", "product_id", "category"]
    catalogue = pq.read_table(ingested / "products", columns=columns).sort_by("product")
    category = catalogue["category"].combine_chunks().dictionary_encode()
    names = category.dictionary.to_pylist()
    code = category.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    query, product, clicks = (column.to_numpy() for column in pairs.columns)
    known = code[product] >= 0
    if not known.any():
        raise UserError("no product that was clicked on the test day has a category")
    query, of, clicks = query[known], code[product][known], clicks[known]
    total = np.bincount(of, clicks, minlength=len(names))
    chosen = np.argsort(-total, kind="stable")[: min(CATEGORIES, int((total > 0).sum()))]
    place = np.full(len(names) + 1, -1, np.int64)
    place[chosen] = np.arange(len(chosen))

    asked, row = np.unique(query, return_inverse=True)
    # By distinct (query, category): a table of all of them would not fit where both are many.
    cells, cell = np.unique(row * len(names) + of, return_inverse=True)
    of_row, voted = np.divmod(cells, len(names))
    order = np.lexsort((voted, -np.bincount(cell, clicks), of_row))
    most = order[np.unique(of_row[order], return_index=True)[1]]
    of_query = place[voted[most]]
    of_product = place[code]
    rng = np.random.default_rng(seed)

    def drawn(of: NDArray[np.int64]) -> NDArray[np.int64]:
        inside = np.flatnonzero(of >= 0)
        return np.sort(rng.permutation(inside)[:points])

    q, p = drawn(of_query), drawn(of_product)
    texts = pq.read_table(ingested / "queries.parquet", columns=["text"])["text"]
    return Sample(
        [names[c] for c in chosen],
        texts.take(pa.array(asked[q])).to_pylist(),
        of_query[q],
        catalogue["product_id"].take(pa.array(p)).to_pylist(),
        of_product[p],
    )


def _plane(queries: NDArray[np.float32], products: NDArray[np.float32]) -> NDArray[np.float64]:
    """t-SNE of all together, cosine distance: [Q + n, 2], queries first."""
    from openTSNE import TSNE

    x = np.concatenate([queries, products])
    tsne = TSNE(
        perplexity=min(PERPLEXITY, max(2, (len(x) - 1) // 4)),
        metric="cosine",
        initialization="pca",
        random_state=0,
        n_jobs=-1,
    )
    return np.asarray(tsne.fit(x))


def _table(name: str, sample: Sample, plane: NDArray[np.float64]) -> pa.Table:
    of = np.concatenate([sample.of_query, sample.of_product])
    return pa.table(
        {
            "system": [name] * len(of),
            "side": ["query"] * len(sample.queries) + ["product"] * len(sample.products),
            "category": [sample.categories[c] for c in of],
            "x": plane[:, 0],
            "y": plane[:, 1],
        }
    )
