import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from acebert.data.batches import TextStore
from acebert.data.tokens import Ragged, ranges

CLS, SEP, PAD = 101, 102, 0
rows = st.lists(st.lists(st.integers(200, 900), max_size=5), min_size=3, max_size=8)


def store(titles, queries, hot) -> TextStore:
    ragged = Ragged.from_rows
    return TextStore(ragged(titles), ragged(queries), ragged(hot), CLS, SEP, PAD)


def plain_product(titles, queries, hot, product, hot_list):
    """What a product's row is, without padding: ids and segments."""
    ids, segments = [CLS, *titles[product], SEP], [0] * (len(titles[product]) + 2)
    for query in hot[hot_list]:
        ids += [*queries[query], SEP]
        segments += [1] * (len(queries[query]) + 1)
    return ids, segments


@given(rows, rows, st.data())
def test_product_batch_equals_rows_put_together_one_by_one(titles, queries, data):
    hot = [[], *data.draw(st.lists(st.lists(st.integers(0, len(queries) - 1), max_size=4)))]
    B = data.draw(st.integers(1, 6))
    products = np.array(
        data.draw(st.lists(st.integers(0, len(titles) - 1), min_size=B, max_size=B))
    )
    lists = np.array(data.draw(st.lists(st.integers(0, len(hot) - 1), min_size=B, max_size=B)))
    batch = store(titles, queries, hot).product_batch(products, lists)
    expected = [
        plain_product(titles, queries, hot, p, h) for p, h in zip(products, lists, strict=True)
    ]
    L = max(len(ids) for ids, _ in expected)
    assert batch.input_ids.shape == (B, L)  # padded to the longest, no further
    for row, (ids, segments) in enumerate(expected):
        n = len(ids)
        assert batch.input_ids[row].tolist() == ids + [PAD] * (L - n)
        assert batch.attention_mask[row].tolist() == [True] * n + [False] * (L - n)
        assert batch.segment_ids[row, :n].tolist() == segments


def test_query_batch_is_cls_query_sep_in_the_hot_query_segment():
    batch = store([], [[7, 8], [], [9]], [[]]).query_batch(np.array([2, 0, 1]))
    assert batch.input_ids.tolist() == [[CLS, 9, SEP, PAD], [CLS, 7, 8, SEP], [CLS, SEP, PAD, PAD]]
    assert batch.attention_mask.sum(1).tolist() == [3, 4, 2]
    assert batch.segment_ids[1].tolist() == [1, 1, 1, 1]


def test_no_hot_lists_means_titles_alone():
    batch = store([[5], [6, 7]], [[8]], [[], [0]]).product_batch(np.array([0, 1]), None)
    assert batch.input_ids.tolist() == [[CLS, 5, SEP, PAD], [CLS, 6, 7, SEP]]
    assert not batch.segment_ids.any()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5))))
def test_ranges_are_the_concatenated_aranges(spans):
    starts = np.array([s for s, _ in spans], dtype=np.int64)
    lengths = np.array([n for _, n in spans], dtype=np.int64)
    plain = [v for s, n in spans for v in range(s, s + n)]
    assert ranges(starts, lengths).tolist() == plain
