"""Batches: each row once, by length, and ranks together see what one process sees."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from acebert.config import Settings
from acebert.data.hard_negatives import HardNegatives
from acebert.data.partitions import Plan
from acebert.training.pairs import InputStore, PairBatches, Side, StagePaths, TrainBatch


@pytest.fixture(scope="module")
def batch(settings: Settings, paths: StagePaths) -> TrainBatch:
    return PairBatches(settings, paths, rank=0, world_size=1).batch(7)


def texts(side: Side) -> list[tuple[int, ...]]:
    """Tokens of each pair's row, without padding."""
    rows = zip(side.text.input_ids, side.text.attention_mask, strict=True)
    distinct = [tuple(ids[mask].tolist()) for ids, mask in rows]
    return [distinct[row] for row in side.pair_row]


def test_pairs_find_the_tokens_and_photos_that_a_plain_batch_has(
    settings: Settings, paths: StagePaths, batch: TrainBatch
) -> None:
    """One row a pair, as the stores give them."""
    batches = PairBatches(settings, paths, rank=0, world_size=1)
    epoch, step = divmod(7, batches.steps_per_epoch)
    assert paths.plan is not None
    record = Plan(paths.plan).batch(epoch, step)
    query, product = record["query"].to_numpy(), record["product"].to_numpy()
    inputs = InputStore(settings, paths)
    plain = inputs.queries(query)
    assert texts(batch.query) == [
        tuple(ids[mask].tolist())
        for ids, mask in zip(plain.input_ids, plain.attention_mask, strict=True)
    ]
    assert batch.product.image is not None
    pixels = batch.product.image.pixels[batch.product.pair_row]
    assert torch.equal(pixels, inputs.images(product).pixels)
    has_image = torch.from_numpy(batch.product.has_image)[batch.product.pair_row]
    assert torch.equal(has_image, inputs.images(product).has_image)
    titles, _ = inputs.products(product, None)
    for whole, ids, mask in zip(
        texts(batch.product), titles.input_ids, titles.attention_mask, strict=True
    ):
        title = tuple(ids[mask].tolist())
        assert whole[: len(title)] == title  # its hot list comes behind


def test_a_query_and_a_product_with_its_list_stand_there_once(
    settings: Settings, paths: StagePaths, batch: TrainBatch
) -> None:
    W = settings.train.batch_size
    assert len(batch.query) == len(set(texts(batch.query))) < W
    lists = settings.model.model_copy(
        update={"hot_queries": "other_days", "hot_query_dropout": 0.5}
    )
    some_without = settings.model_copy(update={"model": lists})
    one = PairBatches(some_without, paths, rank=0, world_size=1).batch(7)
    # A product of two pairs, with its list in one of them, is two rows.
    assert len(batch.product) < len(one.product) < W


def test_rows_stand_by_length(batch: TrainBatch) -> None:
    for side in (batch.query, batch.product):
        assert (np.diff(side.tokens) >= 0).all()
        assert side.text.attention_mask.sum(1).tolist() == side.tokens.tolist()


@pytest.mark.parametrize("micro_batch", [None, 1, 5, 1000])
def test_parts_hold_every_row_once_and_no_padding_but_their_own(
    batch: TrainBatch, micro_batch: int | None
) -> None:
    parts = batch.parts(micro_batch)
    rows = max(len(batch.query), len(batch.product))
    assert len(parts) == (1 if micro_batch is None else -(-rows // micro_batch))
    for side, name in ((batch.query, "query"), (batch.product, "product")):
        pieces = [getattr(part, name) for part in parts]
        ids = [
            row[mask].tolist()
            for piece in pieces
            for row, mask in zip(piece.input_ids, piece.attention_mask, strict=True)
        ]
        whole = zip(side.text.input_ids, side.text.attention_mask, strict=True)
        assert ids == [row[mask].tolist() for row, mask in whole]
        for piece in pieces:
            assert len(piece.input_ids) <= (micro_batch or rows)
            if len(piece.input_ids):
                assert piece.attention_mask.sum(1).max() == piece.input_ids.shape[1]
    assert len(parts[-1].query.input_ids) > 0
    assert len(parts[-1].product.input_ids) > 0
    assert batch.product.image is not None
    assert batch.product.image.pixels is not None
    pixels = torch.cat([part.image.pixels for part in parts if part.image is not None])
    assert torch.equal(pixels, batch.product.image.pixels)


def test_ranks_together_see_the_batch_that_one_process_sees(
    settings: Settings, paths: StagePaths
) -> None:
    loss = settings.loss.model_copy(update={"false_negatives": "batch"})
    settings = settings.model_copy(update={"loss": loss})
    batch, *halves = [
        PairBatches(settings, paths, rank, world).batch(7)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    for side in ("query", "product"):
        both = [text for half in halves for text in texts(getattr(half, side))]
        assert both == texts(getattr(batch, side))
    W = settings.train.batch_size

    def dense(one: TrainBatch, rows: int) -> torch.Tensor:
        assert one.query_mask is not None
        return one.query_mask.fill_(torch.zeros(rows, W), 0)

    stacked = torch.cat([dense(half, W // 2) for half in halves])
    assert torch.equal(stacked, dense(batch, W))
    assert stacked.isinf().any()


def test_a_stream_gives_the_steps_in_order_and_says_how_long_it_was_waited_for(
    settings: Settings, paths: StagePaths
) -> None:
    batches = PairBatches(settings, paths, rank=0, world_size=1)
    streamed = list(batches.stream(3, 6))
    assert [texts(b.query) for b in streamed] == [
        texts(batches.batch(step).query) for step in (3, 4, 5)
    ]
    assert all(b.waited >= 0 for b in streamed)
    assert streamed[0].waited > 0
    assert dataclasses.replace(streamed[0], waited=0.0).to(torch.device("cpu")).waited == 0


# ---- mined negatives


@pytest.fixture(scope="module")
def mined_paths(
    settings: Settings, paths: StagePaths, tmp_path_factory: pytest.TempPathFactory
) -> StagePaths:
    """Five products for each query, at random."""
    queries = pq.read_metadata(paths.ingest / "queries.parquet").num_rows
    mined = np.random.default_rng(0).integers(120, size=(queries, 5)).astype(np.int32)
    directory = tmp_path_factory.mktemp("mined")
    pairs = pq.read_table(paths.ingest / "pairs.parquet")["query"].to_numpy()
    HardNegatives.save(directory, mined, np.bincount(pairs, minlength=queries), 120)
    return dataclasses.replace(paths, hard_negatives=directory)


def with_mined(settings: Settings) -> Settings:
    loss = settings.loss.model_copy(
        update={"hard_negatives": 2, "popularity_correction": True, "false_negatives": "log"}
    )
    return settings.model_copy(update={"loss": loss})


def test_each_pair_brings_products_mined_for_its_query(
    settings: Settings, mined_paths: StagePaths
) -> None:
    settings = with_mined(settings)
    batches = PairBatches(settings, mined_paths, rank=0, world_size=1)
    batch = batches.batch(7)
    W = settings.train.batch_size
    assert batch.mined_row is not None
    assert mined_paths.plan is not None
    assert mined_paths.hard_negatives is not None
    record = Plan(mined_paths.plan).batch(*divmod(7, batches.steps_per_epoch))
    negatives = HardNegatives.open(mined_paths.hard_negatives)
    titles = InputStore(settings, mined_paths).text.titles
    words = [
        tuple(row[mask].tolist())
        for row, mask in zip(
            batch.product.text.input_ids, batch.product.text.attention_mask, strict=True
        )
    ]
    for i, query in enumerate(record["query"].to_numpy()):
        known = {tuple(titles[p].tolist()) for p in negatives.mined[query]}
        for row in batch.mined_row[2 * i : 2 * i + 2]:
            title = words[int(row)][1:]  # without [CLS]; the hot list comes behind
            assert any(title[: len(one)] == one for one in known)
    assert batch.product_log_share is not None
    assert batch.product_log_share.shape == (3 * W,)
    # A product's expected number in the batch, over W: as a pair's own, or as one of two mined.
    product = record["product"].to_numpy()
    pairs = pq.read_table(mined_paths.ingest / "pairs.parquet")["product"].to_numpy()
    expected = (
        np.bincount(pairs, minlength=120)[product] / len(pairs) + 2 * negatives.share[product]
    )
    np.testing.assert_allclose(batch.product_log_share[:W].exp(), expected, rtol=1e-5)


def test_ranks_see_the_mined_products_that_one_process_sees(
    settings: Settings, mined_paths: StagePaths
) -> None:
    settings = with_mined(settings)
    whole, *halves = [
        PairBatches(settings, mined_paths, rank, world).batch(7)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]

    def mined(batch: TrainBatch) -> list[tuple[int, ...]]:
        assert batch.mined_row is not None
        return texts(dataclasses.replace(batch.product, pair_row=batch.mined_row))

    def dense(batch: TrainBatch, rows: int) -> torch.Tensor:
        assert batch.query_mask is not None
        return batch.query_mask.fill_(torch.zeros(rows, 3 * W), 0)

    W = settings.train.batch_size
    assert mined(whole) == [text for half in halves for text in mined(half)]
    assert torch.equal(dense(whole, W), torch.cat([dense(half, W // 2) for half in halves]))
    assert dense(whole, W)[:, W:].isinf().any()
