"""In-batch negatives that were clicked, against brute force."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from acebert.data.tokens import Ragged
from acebert.models.false_negatives import FalseNegatives, false_negatives


def masks(
    query: NDArray[np.integer],
    product: NDArray[np.integer],
    form: Any,
    clicked: Ragged | None,
    rows: slice,
) -> list[torch.Tensor]:
    """`false_negatives` as matrices, bool [b, W]."""

    def dense(cells: FalseNegatives | None) -> torch.Tensor:
        scores = torch.zeros(len(query[rows]), len(query))
        return (scores if cells is None else cells.fill_(scores, 0)) == -torch.inf

    return [dense(cells) for cells in false_negatives(query, product, form, clicked, rows)]


ids = st.integers(0, 6)
pair_lists = st.lists(st.tuples(ids, ids), min_size=1, max_size=12)


def columns(pairs: list[tuple[int, int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    table = np.array(pairs, np.int32).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def clicked_for(log: Iterable[tuple[int, int]]) -> Ragged:
    """The log's distinct products of each of nine queries."""
    known = set(map(tuple, log))
    return Ragged.from_rows(sorted(p for q, p in known if q == query) for query in range(9))


@settings(max_examples=200, deadline=None)
@given(batch=pair_lists, log=st.lists(st.tuples(ids, ids), max_size=20), data=st.data())
@pytest.mark.parametrize("form", ["keep", "batch", "log"])
def test_mask_is_the_brute_force_one(
    form: Any, batch: list[tuple[int, int]], log: list[tuple[int, int]], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(batch) - 1))
    stop = data.draw(st.integers(start + 1, len(batch)))
    clicked = clicked_for(log)
    query_mask, product_mask = masks(*columns(batch), form, clicked, slice(start, stop))
    known = {"keep": set(), "batch": set(batch), "log": set(batch) | set(log)}[form]
    for i in range(start, stop):
        for j in range(len(batch)):
            (query, product), (other_query, other_product) = batch[i], batch[j]
            assert query_mask[i - start, j] == (i != j and (query, other_product) in known)
            assert product_mask[i - start, j] == (i != j and (other_query, product) in known)


def test_same_query_and_same_product_are_masked_and_the_own_pair_never() -> None:
    query, product = np.array([1, 1, 2, 1]), np.array([5, 6, 5, 5])
    query_mask, product_mask = masks(query, product, "batch", None, slice(0, 4))
    #      (1,5) (1,6) (2,5) (1,5)
    assert query_mask.int().tolist() == [
        [0, 1, 1, 1],
        [1, 0, 1, 1],
        [1, 0, 0, 1],
        [1, 1, 1, 0],
    ]
    assert product_mask.int().tolist() == [
        [0, 1, 1, 1],
        [1, 0, 0, 1],
        [1, 1, 0, 1],
        [1, 1, 1, 0],
    ]


def test_rows_of_a_rank_are_the_rows_of_the_whole_mask() -> None:
    rng = np.random.default_rng(0)
    query, product = rng.integers(0, 9, 12), rng.integers(0, 9, 12)
    clicked = clicked_for(rng.integers(0, 9, (40, 2)).tolist())
    whole = masks(query, product, "log", clicked, slice(0, 12))
    shards = [masks(query, product, "log", clicked, slice(6 * r, 6 * r + 6)) for r in range(2)]
    for side in (0, 1):
        assert torch.equal(torch.cat([shard[side] for shard in shards]), whole[side])


@settings(max_examples=100, deadline=None)
@given(
    batch=pair_lists,
    log=st.lists(st.tuples(ids, ids), max_size=20),
    mined=st.lists(ids, min_size=1, max_size=8),
)
@pytest.mark.parametrize("form", ["batch", "log"])
def test_mined_products_are_columns_behind_the_batch_and_masked_where_they_were_clicked(
    form: Any, batch: list[tuple[int, int]], log: list[tuple[int, int]], mined: list[int]
) -> None:
    W = len(batch)
    rows, extra = slice(0, W), np.array(mined, np.int32)
    query, product = columns(batch)
    own, others = false_negatives(query, product, form, clicked_for(log), rows, extra)
    assert own is not None
    assert others is not None
    mask = own.fill_(torch.zeros(W, W + len(mined)), 0) == -torch.inf
    plain_mask, product_mask = masks(query, product, form, clicked_for(log), rows)
    assert torch.equal(mask[:, :W], plain_mask)
    assert torch.equal(others.fill_(torch.zeros(W, W), 0) == -torch.inf, product_mask)
    known = set(batch) | (set(log) if form == "log" else set())
    for i, (asked, _) in enumerate(batch):
        for j, one in enumerate(mined):
            assert mask[i, W + j] == ((asked, one) in known)


def test_cells_fill_the_rows_they_are_given() -> None:
    cells = FalseNegatives.at(np.array([0, 2, 2]), np.array([1, 0, 3]), 4)
    whole = cells.fill_(torch.zeros(4, 4), 0)
    assert (whole == -torch.inf).nonzero().tolist() == [[0, 1], [2, 0], [2, 3]]
    blocks = [cells.fill_(torch.zeros(2, 4), first) for first in (0, 2)]
    assert torch.equal(torch.cat(blocks), whole)


def test_the_log_form_asks_for_the_log() -> None:
    with pytest.raises(ValueError, match="needs the clicked pairs"):
        false_negatives(np.array([0, 1]), np.array([0, 1]), "log", None, slice(0, 2))
