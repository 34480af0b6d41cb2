"""Training batches: the plan's mini-batches with tokens, images and false-negative masks.

A batch depends on (seed, epoch, step) alone, and a rank takes its rows of it, so a run that is
resumed, or has another number of workers, sees the same batches.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.data.batches import TextArrays, TextStore
from acebert.data.features import FeatureStore
from acebert.data.partitions import Plan
from acebert.models.encoder import ImageInputs, TextInputs
from acebert.models.losses import ClickedPairs, false_negative_mask

EMPTY_LIST = 0  # row of ingest's hot_lists.parquet that holds no query


@dataclass(frozen=True)
class StagePaths:
    """Where the stages lie that training and embedding read."""

    ingest: Path
    tokens: Path
    features: Path | None
    plan: Path | None = None


@dataclass
class TrainBatch:
    """One rank's rows (b of the global W) of a mini-batch.

    Attributes:
        query: tokens [b, L]
        product: tokens [b, L']
        image: image tokens [b, …], or None for a text-only model
        query_mask: bool [b, W], True where a product is no negative of a query
        product_mask: bool [b, W], True where a query is no negative of a product
        product_log_share: float32 [W], log of each product's share of the training pairs, or None
            without popularity correction
    """

    query: TextInputs
    product: TextInputs
    image: ImageInputs | None
    query_mask: torch.Tensor | None
    product_mask: torch.Tensor | None
    product_log_share: torch.Tensor | None

    def to(self, device: torch.device) -> "TrainBatch":
        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return TrainBatch(
            self.query.to(device),
            self.product.to(device),
            None if self.image is None else self.image.to(device),
            move(self.query_mask),
            move(self.product_mask),
            move(self.product_log_share),
        )


class InputStore:
    """Model inputs of any product or query rows: tokens from `TextStore`, images from features."""

    def __init__(self, settings: Settings, paths: StagePaths) -> None:
        self.text = TextStore.open(paths.tokens, paths.ingest)
        self.features = FeatureStore(paths.features) if paths.features else None
        self.patches = settings.model.patches
        self.pixels = settings.model.pixels

    def queries(self, queries: NDArray[np.integer]) -> TextInputs:
        """Query rows [B] → tokens."""
        return as_inputs(self.text.query_batch(queries))

    def products(
        self, products: NDArray[np.integer], hot_lists: NDArray[np.integer] | None
    ) -> tuple[TextInputs, ImageInputs | None]:
        """Product rows [B] and the rows of their hot lists [B] → tokens and images."""
        text = as_inputs(self.text.product_batch(products, hot_lists))
        if self.features is None:
            return text, None
        image = ImageInputs(
            has_image=torch.from_numpy(self.features.has_image(products)),
            patches=torch.from_numpy(self.features.patches(products)) if self.patches else None,
            pixels=torch.from_numpy(self.features.pixels(products)) if self.pixels else None,
        )
        return text, image


def as_inputs(text: TextArrays) -> TextInputs:
    return TextInputs(
        torch.from_numpy(text.input_ids),
        torch.from_numpy(text.attention_mask),
        torch.from_numpy(text.segment_ids),
    )


class PairBatches:
    """The plan's batches as one rank trains on them."""

    def __init__(self, settings: Settings, paths: StagePaths, rank: int, world_size: int) -> None:
        assert paths.plan is not None
        self.settings = settings
        self.plan = Plan(paths.plan)
        self.inputs = InputStore(settings, paths)
        W = settings.train.batch_size
        self.rows = slice(rank * W // world_size, (rank + 1) * W // world_size)
        columns = ["query", "product", "hot_list"]
        pairs = pq.read_table(paths.ingest / "pairs.parquet", columns=columns)
        self._other_days = pairs["hot_list"].to_numpy()
        lists = pq.read_table(paths.ingest / "product_hot_lists.parquet", columns=["train"])
        self._as_is = lists["train"].to_numpy()
        self._clicked = (
            ClickedPairs(pairs["query"].to_numpy(), pairs["product"].to_numpy(), len(lists))
            if settings.loss.false_negatives == "log"
            else None
        )

        self._log_share = None
        if settings.loss.popularity_correction:
            drawn = np.bincount(pairs["product"].to_numpy(), minlength=len(lists))
            with np.errstate(divide="ignore"):  # never in a batch
                self._log_share = np.log(drawn / len(pairs)).astype(np.float32)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches an epoch; the remainder that is smaller than W is not trained on."""
        return self.plan.steps(0)

    def batch(self, step: int) -> TrainBatch:
        """The batch of global step `step`, counted from 0 over all epochs."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        record = self.plan.batch(epoch, in_epoch)
        query, product = record["query"].to_numpy(), record["product"].to_numpy()
        hot = self._hot_lists(record["pair"].to_numpy(), product, step)
        rows = self.rows
        query_mask, product_mask = false_negative_mask(
            query, product, self.settings.loss.false_negatives, self._clicked, rows
        )
        text, image = self.inputs.products(product[rows], None if hot is None else hot[rows])
        share = None if self._log_share is None else torch.from_numpy(self._log_share[product])
        return TrainBatch(
            self.inputs.queries(query[rows]), text, image, query_mask, product_mask, share
        )

    def _hot_lists(
        self, pair: NDArray[np.int64], product: NDArray[np.int32], step: int
    ) -> NDArray[np.int32] | None:
        model = self.settings.model
        if model.hot_queries == "off":
            return None
        lists = (
            self._other_days[pair] if model.hot_queries == "other_days" else self._as_is[product]
        )
        draw = np.random.default_rng((self.settings.seed, step)).random(len(product))
        return np.where(draw < model.hot_query_dropout, EMPTY_LIST, lists)

    def stream(self, start: int, stop: int) -> Iterator[TrainBatch]:
        """Batches of steps start … stop − 1, each made in a thread while the last one trains."""
        with ThreadPoolExecutor(1) as maker:
            ahead = maker.submit(self.batch, start) if start < stop else None
            for step in range(start, stop):
                assert ahead is not None
                ready = ahead.result()
                ahead = maker.submit(self.batch, step + 1) if step + 1 < stop else None
                yield ready
