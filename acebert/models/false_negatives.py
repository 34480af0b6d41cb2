"""In-batch negatives that are none: the query and the product were clicked together.

They are kept as coordinates of the score matrix, a few for a row. As a mask the matrix alone has
268 million cells at W = 16,384.

Letters: W pairs in the global batch, b of them on this rank.
"""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acebert.data.tokens import Ragged


@dataclass(frozen=True)
class FalseNegatives:
    """Cells of this rank's scores [b, W] (or wider, with mined products behind the batch's) that
    stay out of the denominator.

    Attributes:
        rows, columns: int64 [n], sorted by row
        starts: int64 [b + 1], on the host: row i's cells are starts[i] … starts[i + 1] − 1
    """

    rows: Tensor
    columns: Tensor
    starts: NDArray[np.int64]

    @classmethod
    def at(cls, rows: NDArray[np.integer], columns: NDArray[np.integer], b: int) -> Self:
        """Of the cells (row, column), both [n] and sorted by row, of a matrix with b rows."""
        starts = np.searchsorted(rows, np.arange(b + 1))
        return cls(torch.from_numpy(rows), torch.from_numpy(columns), starts)

    def fill_(self, scores: Tensor, first: int) -> Tensor:
        """-inf in place where `scores` [r, W], rows first … first + r − 1, have such a cell."""
        cells = slice(self.starts[first], self.starts[first + len(scores)])
        at = self.rows[cells] - first, self.columns[cells]
        # Filled on the device: a tensor made on the host would be waited for.
        return scores.index_put_(at, scores.new_full((), -torch.inf))


def false_negatives(
    query: NDArray[np.integer],
    product: NDArray[np.integer],
    form: Literal["keep", "batch", "log"],
    clicked: Ragged | None,
    rows: slice,
    mined: NDArray[np.integer] | None = None,
) -> tuple[FalseNegatives | None, FalseNegatives | None]:
    """Which in-batch negatives of `rows` are none, because the query and the product were clicked.

    A pair of the batch makes every combination of its query and its product a click, so rows with
    the same query or the same product are no negatives of each other in 'batch' and 'log'. A row's
    own pair is never among them.

    Args:
        query, product: ids of the whole batch [W], the same on every rank
        form: 'keep' finds none (paper), 'batch' what the batch shows as clicked, 'log' also what
            `clicked` has
        clicked: for 'log', row = query, values = the products clicked for it
        rows: this rank's b rows
        mined: further products, which come behind the batch's own as columns [W + M]

    Returns:
        Cells of queries against products [b, W + M], and of products against queries [b, W]; None
        for 'keep'.
    """
    if form == "keep":
        return None, None
    W = len(query)
    queries, q = np.unique(query, return_inverse=True)
    columns = product if mined is None else np.concatenate([product, mined])
    products, p = np.unique(columns, return_inverse=True)
    known = q * len(products) + p[:W]
    if form == "log":
        if clicked is None:
            raise ValueError("false_negatives: form 'log' needs the clicked pairs")
        clicks, lengths = clicked.take(queries)
        at = np.repeat(np.arange(len(queries)), lengths)
        column = np.minimum(np.searchsorted(products, clicks), len(products) - 1)
        hit = products[column] == clicks
        known = np.concatenate([known, at[hit] * len(products) + column[hit]])
    known_q, known_p = np.divmod(np.unique(known), len(products))
    return _cells(q, p, _grouped(known_q, known_p), rows), _cells(
        p[:W], q, _grouped(known_p, known_q), rows
    )


def _cells(
    own: NDArray[np.int64], other: NDArray[np.int64], known: Ragged, rows: slice
) -> FalseNegatives:
    """Of each of `rows` of `own` [W]: the columns whose `other` id is among those known for its
    `own` id."""
    mine = np.arange(len(own))[rows]
    ids, of_row = known.take(own[mine])
    column, of_id = _grouped(other, np.arange(len(other))).take(ids)
    row = np.repeat(np.repeat(np.arange(len(mine)), of_row), of_id)
    negative = column != mine[row]
    return FalseNegatives.at(row[negative], column[negative].astype(np.int64), len(mine))


def _grouped(key: NDArray[np.int64], value: NDArray[np.int64]) -> Ragged:
    """Columns [n]: row k holds the values whose key is k."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(key))])
    return Ragged(value[np.argsort(key, kind="stable")].astype(np.int32), offsets)
