"""How far what is searched for has moved from what the model was trained on.

The measure is the cosine distance between two means of query vectors: of the last searches, and of
the log's searches on the day that the model was first published. 0 is no drift; a season's new
words, a robot, or a broken client show as a rise that stays.
"""

import numpy as np
from numpy.typing import NDArray

WINDOW = 1_000  # searches; older ones fade away


class QueryDrift:
    """The drift of a stream of vectors from `reference`, float32 [d]."""

    def __init__(self, reference: NDArray[np.float32]) -> None:
        self._reference = reference / np.linalg.norm(reference)
        self._mean = np.zeros_like(reference)
        self._count = 0

    def add(self, vector: NDArray[np.float32]) -> None:
        """One search's vector [d]."""
        self._count = min(self._count + 1, WINDOW)
        self._mean += (vector - self._mean) / self._count

    @property
    def value(self) -> float | None:
        """Cosine distance, 0 to 2; None until there were WINDOW searches, for fewer would say how
        they were drawn."""
        length = float(np.linalg.norm(self._mean))
        if self._count < WINDOW or length == 0:
            return None
        return 1 - float(self._mean @ self._reference) / length
