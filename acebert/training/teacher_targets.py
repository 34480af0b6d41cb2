"""What a student is to learn, as files that every rank maps: the teacher's answers to texts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from acebert.data.tokens import Ragged


@dataclass(frozen=True)
class TeacherTargets:
    """n texts to train on, followed by m queries of the validation day.

    Attributes:
        texts: word pieces, row = text
        vectors: the teacher's, float32 [n + m, d], length 1
        best: catalogue rows of its first K products, best first, int32 [n + m, K]
        products: vectors of the catalogue, float32 [products, d]
        valid_pairs: clicked on the validation day, int64 [T, 2]: validation query (from 0) and
            catalogue row; sorted
        valid_new: validation queries that are not among the n texts, bool [m]
    """

    texts: Ragged
    vectors: NDArray[np.float32]
    best: NDArray[np.int32]
    products: NDArray[np.float32]
    valid_pairs: NDArray[np.int64]
    valid_new: NDArray[np.bool_]

    @property
    def n(self) -> int:
        return len(self.texts) - len(self.valid_new)

    def save(self, directory: Path) -> None:
        self.texts.save(directory, "texts")
        for name in ("vectors", "best", "products", "valid_pairs", "valid_new"):
            np.save(directory / f"{name}.npy", getattr(self, name))

    @classmethod
    def open(cls, directory: Path) -> "TeacherTargets":
        """Memory-maps what `save` wrote; copy-on-write, since torch takes no read-only array."""
        names = ("vectors", "best", "products", "valid_pairs", "valid_new")
        arrays = (
            np.load(directory / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in names
        )
        return cls(Ragged.load(directory, "texts"), *arrays)
