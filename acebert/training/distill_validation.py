"""How much of its teacher a student keeps, on queries of the validation day."""

import numpy as np
from numpy.typing import NDArray

from acebert.evaluation.recall import DotProduct, recall, search_catalogue
from acebert.training.teacher_targets import TeacherTargets

K = 100


class HeldOutQueries:
    """Up to `most` of the validation queries and what the teacher finds for them.

    Attributes:
        rows: validation queries, int64 [q], ascending
    """

    def __init__(self, targets: TeacherTargets, most: int, seed: int = 0) -> None:
        m = len(targets.valid_new)
        order = np.random.default_rng(seed).permutation(m)
        self.rows = np.sort(order[:most])
        self._teacher = np.array(targets.vectors[targets.n + self.rows])
        self._best = np.array(targets.best[targets.n + self.rows])
        self._products = np.asarray(targets.products)
        self._new = np.array(targets.valid_new[self.rows])
        place = np.full(m, -1)
        place[self.rows] = np.arange(len(self.rows))
        query, product = place[targets.valid_pairs[:, 0]], targets.valid_pairs[:, 1]
        self._query, self._product = query[query >= 0], np.array(product[query >= 0])
        self._teacher_recall = self._recall(self._teacher)[0]

    def measure(self, vectors: NDArray[np.float32]) -> dict[str, float]:
        """Vectors of `rows`, float32 [q, d] of length 1, against the whole catalogue.

        Returns:
            `recall_100`, of the products clicked on the validation day; `kept_100`, its share of
            the teacher's; the same of queries that were not trained on, as `…_new` (nan where
            there is none); `overlap_100`, the share of the teacher's first 100 products that are
            among the student's; `cosine` to the teacher's vectors, its mean and as `cosine_least`
            the least.
        """
        found, top = self._recall(vectors)
        teacher, new = self._teacher_recall, self._new
        cosine = np.einsum("qd,qd->q", vectors, self._teacher)
        common = [len(np.intersect1d(a, b)) for a, b in zip(top, self._best, strict=True)]
        return {
            "recall_100": float(found.mean()),
            "kept_100": float(found.mean() / teacher.mean()),
            "recall_100_new": float(found[new].mean()) if new.any() else float("nan"),
            "kept_100_new": (
                float(found[new].mean() / teacher[new].mean()) if new.any() else float("nan")
            ),
            "overlap_100": float(np.mean(common) / self._best.shape[1]),
            "cosine": float(cosine.mean()),
            "cosine_least": float(cosine.min()),
        }

    def _recall(
        self, vectors: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Recall@100 of each query [q], and its best products [q, K]."""
        q, depth = len(vectors), self._best.shape[1]
        scorer = DotProduct(vectors, self._products)
        found = search_catalogue(scorer, q, self._query, self._product, depth)
        return recall(found.greater, found.equal, self._query, q, K), found.top
