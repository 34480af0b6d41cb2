"""GAUC and Recall@100 on a fixed sample of the validation day, small enough to run in training.

The ranks encode a share of the sample each; the numbers are lower bounds on work, not results:
the corpus is a sample too, so its Recall@100 lies above the whole catalogue's.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.data.lookups import Lookups
from acebert.evaluation.gauc import gauc
from acebert.evaluation.recall import DotProduct, recall, search_catalogue
from acebert.training.pairs import StagePaths

K = 100


@dataclass(frozen=True)
class ValidationSample:
    """Searches of the validation day.

    Attributes:
        queries: query rows, int32 [Q]
        products: product rows of the corpus, int32 [C]
        hot_lists: rows of the products' hot lists, int32 [C]
        search, query, product: int64 [I], impressions; query and product index the arrays above
        clicked: bool [I]
    """

    queries: NDArray[np.int32]
    products: NDArray[np.int32]
    hot_lists: NDArray[np.int32]
    search: NDArray[np.int64]
    query: NDArray[np.int64]
    product: NDArray[np.int64]
    clicked: NDArray[np.bool_]

    @classmethod
    def draw(cls, settings: Settings, paths: StagePaths) -> "ValidationSample":
        """Searches in random order until `train.valid_searches` are drawn or their products are
        `train.valid_products`; random products fill the corpus up to that number. Of the log, no
        more is held than the rows of drawn searches."""
        train = settings.train
        hot_lists = Lookups.open(paths.ingest).product_hot_lists
        rng = np.random.default_rng(6)  # the same for all seeds, so that their validations compare
        with pq.ParquetFile(paths.ingest / "valid_impressions.parquet") as file:
            searches = _searches(file)
            order = rng.permutation(searches)[: train.valid_searches]
            places = np.full(searches, len(order), np.int32)
            places[order] = np.arange(len(order))
            search, query, product, clicked = _impressions(file, places < len(order))
        place = places[search]
        distinct, which = np.unique(product, return_inverse=True)
        first_seen = np.full(len(distinct), len(order))
        np.minimum.at(first_seen, which, place)
        new_products = np.bincount(first_seen, minlength=len(order))
        fitting = np.searchsorted(np.cumsum(new_products), train.valid_products, "right")
        kept = place < max(1, int(fitting))

        shown, product_index = np.unique(product[kept], return_inverse=True)
        others = rng.permutation(np.delete(np.arange(len(hot_lists), dtype=np.int32), shown))
        free = max(0, train.valid_products - len(shown))
        corpus = np.concatenate([shown, others[:free]])
        queries, query_index = np.unique(query[kept], return_inverse=True)
        return cls(
            queries,
            corpus,
            hot_lists[corpus, 0],
            search[kept],
            query_index,
            product_index,
            clicked[kept],
        )

    @property
    def has_gauc(self) -> bool:
        """Whether a search has both a click and none."""
        clicks = np.bincount(self.search, self.clicked)
        return bool(((clicks > 0) & (clicks < np.bincount(self.search))).any())

    def measure(
        self, queries: NDArray[np.float32], products: NDArray[np.float32]
    ) -> dict[str, float]:
        """Vectors [Q, d] and [C, d] → {'gauc', 'recall_100'}, nan where the sample has no negatives
        or no clicks. Ties count as in the evaluation: encoders that give all products one vector
        are no better than chance."""
        query, product = self._targets().T
        asked = self.query, self.product
        scorer = DotProduct(queries, products)
        found = search_catalogue(scorer, len(queries), query, product, K, *asked)
        groups = gauc(self.search, found.pair_score, self.clicked, scorer.tie)
        recalls = recall(found.greater, found.equal, query, len(queries), K)
        return {
            "gauc": float("nan") if groups.value is None else groups.value,
            "recall_100": float(np.nanmean(recalls)) if len(query) else float("nan"),
        }

    def _targets(self) -> NDArray[np.int64]:
        """Distinct (query, product) that were clicked, int64 [T, 2], sorted."""
        pairs = np.stack([self.query, self.product], axis=1)[self.clicked]
        return np.unique(pairs, axis=0)


def _searches(file: pq.ParquetFile) -> int:
    """How many there are in impressions, which are sorted by their number from 0 on."""
    lasts = (batch["search"][-1].as_py() for batch in file.iter_batches(columns=["search"]))
    return max(lasts, default=-1) + 1


def _impressions(
    file: pq.ParquetFile, wanted: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """search, query, product and clicked of the searches that are `wanted` [S], in their order."""
    schema = file.schema_arrow
    columns = ["search", "query", "product", "clicked"]
    parts = [pa.table({name: pa.array([], schema.field(name).type) for name in columns})]
    for batch in file.iter_batches(columns=columns):
        mask = pa.array(wanted[batch["search"].to_numpy()])
        parts.append(pa.Table.from_batches([batch.select(columns)]).filter(mask))
    found = pa.concat_tables(parts)
    search, query, product, clicked = (found[name].to_numpy() for name in columns)
    return search, query, product, clicked
