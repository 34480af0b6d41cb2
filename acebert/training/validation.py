"""GAUC and Recall@100 on a fixed sample of the validation day, small enough to run in training.

The ranks encode a share of the sample each; the numbers are lower bounds on work, not results:
the corpus is a sample too, so its Recall@100 lies above the whole catalogue's.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.config import Settings
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
        `train.valid_products`; random products fill the corpus up to that number."""
        rows = pq.read_table(paths.ingest / "valid_impressions.parquet")
        search = rows["search"].to_numpy()
        product = rows["product"].to_numpy()
        lists = pq.read_table(paths.ingest / "product_hot_lists.parquet", columns=["train"])
        hot_lists = lists["train"].to_numpy()
        rng = np.random.default_rng(6)  # the same for all seeds, so that their validations compare

        order = rng.permutation(np.unique(search))[: settings.train.valid_searches]
        place = np.full(int(search.max(initial=-1)) + 1, len(order), np.int64)
        place[order] = np.arange(len(order))
        first_seen = np.full(len(hot_lists), len(order), np.int64)
        np.minimum.at(first_seen, product, place[search])
        new_products = np.bincount(first_seen[first_seen < len(order)], minlength=len(order))
        fitting = np.searchsorted(np.cumsum(new_products), settings.train.valid_products, "right")
        kept = place[search] < max(1, int(fitting))

        shown, product_index = np.unique(product[kept], return_inverse=True)
        others = rng.permutation(np.setdiff1d(np.arange(len(hot_lists)), shown))
        free = max(0, settings.train.valid_products - len(shown))
        corpus = np.concatenate([shown, others[:free]]).astype(np.int32)
        queries, query_index = np.unique(rows["query"].to_numpy()[kept], return_inverse=True)
        return cls(
            queries.astype(np.int32),
            corpus,
            hot_lists[corpus],
            search[kept],
            query_index,
            product_index,
            rows["clicked"].to_numpy(zero_copy_only=False)[kept],
        )

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
