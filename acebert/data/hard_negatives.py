"""Products near a query that were never clicked for it: the files, and how a batch draws of them.

Written by `acebert.evaluation.mine`, memory-mapped by each worker.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

MINED, SHARE = "mined.npy", "share.npy"


@dataclass(frozen=True)
class HardNegatives:
    """M products for each query of the training days.

    Attributes:
        mined: int32 [queries, M], nearest first; a row says nothing where a query was not clicked
            in training
        share: float32 [products], chance that a product is the one drawn for a random training pair
    """

    mined: NDArray[np.int32]
    share: NDArray[np.float32]

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Memory-maps the stage 'hard_negatives'."""
        mined, share = (
            np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in (MINED, SHARE)
        )
        return cls(mined, share)

    @staticmethod
    def save(
        directory: Path,
        mined: NDArray[np.int32],
        pairs: NDArray[np.integer],
        products: int,
    ) -> None:
        """Write the files.

        Args:
            mined: int32 [queries, M]
            pairs: training pairs of each query [queries]
            products: of the catalogue
        """
        M = mined.shape[1]
        weights = np.repeat(pairs / (M * pairs.sum()), M)
        share = np.bincount(mined.ravel(), weights, minlength=products)
        np.save(directory / MINED, mined)
        np.save(directory / SHARE, share.astype(np.float32))

    def draw(self, query: NDArray[np.integer], H: int, seed: tuple[int, ...]) -> NDArray[np.int32]:
        """H mined products for each query [W] → [W·H], those of a query side by side."""
        column = np.random.default_rng((*seed, 2)).integers(
            self.mined.shape[1], size=(len(query), H)
        )
        return self.mined[query[:, None], column].ravel()
