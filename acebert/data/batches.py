"""From rows to padded token batches, in numpy, without a loop over rows.

Query side: `[CLS] query [SEP]`, hot-query segment. Product side: `[CLS] title [SEP] q1 [SEP] …`,
title segment up to the first [SEP], hot-query segment after it. Rows are padded to the longest of
their batch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from acebert.data.lookups import Lookups
from acebert.data.tokens import Ragged, ranges, special_ids

TITLE, HOT_QUERY = 0, 1  # segments; 2 and 3 are patches and pixels (models/encoder.py)


@dataclass(frozen=True)
class TextArrays:
    """Padded tokens, each [B, L]."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.bool_]
    segment_ids: NDArray[np.int64]


@dataclass(frozen=True)
class TextStore:
    """Word pieces of all titles and queries with the lists of hot queries.

    Attributes:
        titles: row = product
        queries: row = query
        hot_lists: row = hot list, values = query rows
        cls, sep, pad: token ids
    """

    titles: Ragged
    queries: Ragged
    hot_lists: Ragged
    cls: int
    sep: int
    pad: int

    @classmethod
    def open(cls, tokens: Path, ingested: Path) -> "TextStore":
        """Memory-maps the stages 'tokens' and 'ingest'."""
        special = special_ids(tokens / "tokenizer")
        return cls(
            Ragged.load(tokens, "titles"),
            Ragged.load(tokens, "queries"),
            Lookups.open(ingested).hot_lists,
            special["cls"],
            special["sep"],
            special["pad"],
        )

    def query_batch(self, queries: NDArray[np.integer]) -> TextArrays:
        """Query rows [B] → padded tokens."""
        pieces, lengths = self.queries.take(queries)
        segments = np.full(len(queries), HOT_QUERY)
        return self._assemble(len(queries), np.arange(len(queries)), segments, pieces, lengths)

    def product_batch(
        self, products: NDArray[np.integer], hot_lists: NDArray[np.integer] | None
    ) -> TextArrays:
        """Product rows [B] and the rows of their hot lists [B] (none: titles alone) → tokens."""
        B = len(products)
        pieces, lengths = self.titles.take(products)
        rows, segments = np.arange(B), np.full(B, TITLE)
        if hot_lists is not None:
            hot, per_row = self.hot_lists.take(hot_lists)
            hot_pieces, hot_lengths = self.queries.take(hot)
            pieces = np.concatenate([pieces, hot_pieces])
            lengths = np.concatenate([lengths, hot_lengths])
            rows = np.concatenate([rows, np.repeat(rows, per_row)])
            segments = np.concatenate([segments, np.full(len(hot), HOT_QUERY)])
        return self._assemble(B, rows, segments, pieces, lengths)

    def single_batch(
        self, products: NDArray[np.integer], queries: NDArray[np.integer]
    ) -> TextArrays:
        """Titles of product rows [P] alone, then queries of query rows [Q] → tokens [P + Q, L]."""
        titles, title_lengths = self.titles.take(products)
        pieces, lengths = self.queries.take(queries)
        P, Q = len(products), len(queries)
        return self._assemble(
            P + Q,
            np.arange(P + Q),
            np.repeat([TITLE, HOT_QUERY], [P, Q]),
            np.concatenate([titles, pieces]),
            np.concatenate([title_lengths, lengths]),
        )

    def _assemble(
        self,
        B: int,
        rows: NDArray[np.integer],
        segments: NDArray[np.integer],
        pieces: NDArray[np.int32],
        lengths: NDArray[np.int64],
    ) -> TextArrays:
        """Spans of word pieces, each closed by [SEP], put into their rows in the order given.

        `rows`, `segments`, `lengths` [spans]; `pieces` [sum of lengths].
        """
        taken = lengths + 1  # the span and its [SEP]
        row_length = 1 + np.bincount(rows, weights=taken, minlength=B).astype(np.int64)
        L = int(row_length.max()) if B else 1
        order = np.argsort(rows, kind="stable")  # spans of a row keep their order
        before = np.cumsum(taken[order]) - taken[order]  # over all rows
        row_start = np.concatenate([[0], np.cumsum(row_length - 1)])[:-1]
        start = np.empty(len(rows), np.int64)
        start[order] = rows[order] * L + 1 + before - row_start[rows[order]]

        input_ids = np.full(B * L, self.pad, np.int64)
        segment_ids = np.zeros(B * L, np.int64)
        input_ids[np.arange(B) * L] = self.cls
        segment_ids[np.arange(B) * L] = segments[:B]  # span i < B is row i's first
        input_ids[ranges(start, lengths)] = pieces
        input_ids[start + lengths] = self.sep
        segment_ids[ranges(start, taken)] = np.repeat(segments, taken)
        mask = np.arange(L)[None, :] < row_length[:, None]
        return TextArrays(input_ids.reshape(B, L), mask, segment_ids.reshape(B, L))


def query_arrays(pieces: Ragged, cls: int, sep: int, pad: int) -> TextArrays:
    """Word pieces of n queries that no stage holds → padded tokens, as `query_batch` makes them."""
    none = Ragged.from_rows([])
    store = TextStore(none, pieces, none, cls, sep, pad)
    return store.query_batch(np.arange(len(pieces)))
