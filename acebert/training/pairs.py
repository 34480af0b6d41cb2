"""Training batches: the plan's mini-batches with tokens, images and false negatives.

* A batch depends on (seed, epoch, step) alone, and a rank takes its rows of it, so a run that is
  resumed, or has another number of workers, sees the same batches.
* A query or product that stands in several pairs is there once, and encoded once. A product's hot
  list is part of what it is: two pairs may see the same product with different lists. Pairs that
  share a row share its dropout too.
* Rows are ordered by length, so that those encoded together need little padding.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.data.batches import TextArrays, TextStore
from acebert.data.feature_cache import open_features
from acebert.data.hard_negatives import HardNegatives
from acebert.data.lookups import Lookups
from acebert.data.partitions import Plan
from acebert.models.encoder import ImageInputs, TextInputs
from acebert.models.false_negatives import FalseNegatives, false_negatives
from acebert.training.device_features import DeviceFeatures
from acebert.training.prefetch import prefetched

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

EMPTY_LIST = 0  # row of ingest's hot_lists.parquet that holds no query


@dataclass(frozen=True)
class StagePaths:
    """Where the stages lie that training and embedding read."""

    ingest: Path
    tokens: Path
    features: Path | None
    plan: Path | None = None
    hard_negatives: Path | None = None


class Part(NamedTuple):
    """Rows of both sides that are encoded in one forward; a side may have none."""

    query: TextInputs
    product: TextInputs
    image: ImageInputs | None


@dataclass(frozen=True)
class Side:
    """The distinct queries, or products, of a rank's b pairs: n rows, shortest text first.

    Attributes:
        text: tokens [n, L]
        image: image tokens [n, …], or None
        tokens: of each text, int64 [n], on the host
        has_image: bool [n], on the host; False for a model or a side without images
        pair_row: int64 [b], the row of each pair
    """

    text: TextInputs
    image: ImageInputs | None
    tokens: NDArray[np.int64]
    has_image: NDArray[np.bool_]
    pair_row: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, start: int, stop: int) -> tuple[TextInputs, ImageInputs | None]:
        """Rows start … stop − 1, padded to their own longest."""
        L = int(self.tokens[start:stop].max(initial=1))
        image = None if self.image is None else self.image.span(start, stop)
        return self.text.span(start, stop, L), image


@dataclass
class TrainBatch:
    """One rank's pairs (b of the global W) of a mini-batch.

    Attributes:
        query, product: the rows to encode
        query_mask: cells of [b, W + W·H] where a product is no negative of a query, or None
        product_mask: cells of [b, W] where a query is no negative of a product, or None
        product_log_share: float32 [W + W·H], log of the chance with which each product is drawn, or
            None without popularity correction
        mined_row: int64 [b·H], the row of each mined product, or None without any
        waited: how long training waited for this batch [s]
    """

    query: Side
    product: Side
    query_mask: FalseNegatives | None
    product_mask: FalseNegatives | None
    product_log_share: torch.Tensor | None
    mined_row: torch.Tensor | None = None
    waited: float = 0.0

    def parts(self, micro_batch: int | None) -> list[Part]:
        """The rows cut into parts with at most `micro_batch` of either side (None: one part).

        Every part but the last may lack a side, where it has fewer rows than there are parts.
        """
        sides = self.query, self.product
        n = 1 if micro_batch is None else math.ceil(max(map(len, sides)) / micro_batch)

        def cut(side: Side, i: int) -> tuple[TextInputs, ImageInputs | None]:
            return side.rows(i * len(side) // n, (i + 1) * len(side) // n)

        return [Part(cut(self.query, i)[0], *cut(self.product, i)) for i in range(n)]

    def to(self, device: torch.device) -> "TrainBatch":
        return each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))


Inputs = TypeVar("Inputs", bound="DataclassInstance")


def each_tensor(inputs: Inputs, f: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """A dataclass of tensors, or of such dataclasses, with f(tensor) for each tensor in it."""

    def of(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return f(value)
        return each_tensor(value, f) if is_dataclass(value) else value  # type: ignore[type-var]

    return replace(
        inputs, **{field.name: of(getattr(inputs, field.name)) for field in fields(inputs)}
    )


def pinned(batch: Inputs, device: torch.device | None) -> Inputs:
    """In pinned memory for a GPU: `to` copies from there without the host waiting."""
    if device is None or device.type != "cuda":
        return batch
    return each_tensor(batch, lambda x: x if x.is_cuda else x.pin_memory())


class InputStore:
    """Model inputs of any product or query rows: tokens from `TextStore`, images from features."""

    def __init__(
        self, settings: Settings, paths: StagePaths, device: torch.device | None = None
    ) -> None:
        """`device`: where `image.feature_cache: device` keeps images (none: they are mapped)."""
        self.text = TextStore.open(paths.tokens, paths.ingest)
        self.features = open_features(settings.image, paths.features) if paths.features else None
        self.patches = settings.model.patches
        self.pixels = settings.model.pixels
        self._on_device = None
        if self.features and device and settings.image.feature_cache == "device":
            self._on_device = DeviceFeatures(self.features, device, self.patches, self.pixels)

    def queries(self, queries: NDArray[np.integer]) -> TextInputs:
        """Query rows [B] → tokens."""
        return as_inputs(self.text.query_batch(queries))

    def products(
        self, products: NDArray[np.integer], hot_lists: NDArray[np.integer] | None
    ) -> tuple[TextInputs, ImageInputs | None]:
        """Product rows [B] and the rows of their hot lists [B] → tokens and images."""
        text = as_inputs(self.text.product_batch(products, hot_lists))
        return text, self.images(products)

    def has_image(self, products: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Product rows [B] → whether they have image tokens [B], on the host."""
        if self.features is None:
            return np.zeros(len(products), np.bool_)
        return self.features.has_image(products)

    def images(self, products: NDArray[np.integer]) -> ImageInputs | None:
        """Product rows [B] → image tokens, or None for a text-only model. A photo's features are
        read, or decoded, once."""
        if self.features is None:
            return None
        if self._on_device is not None:
            return self._on_device.images(products)
        distinct, back = np.unique(products, return_inverse=True)
        image = ImageInputs(
            has_image=torch.from_numpy(self.features.has_image(distinct)),
            patches=torch.from_numpy(self.features.patches(distinct)) if self.patches else None,
            pixels=torch.from_numpy(self.features.pixels(distinct)) if self.pixels else None,
        )
        return image.rows(torch.from_numpy(back))


def as_inputs(text: TextArrays) -> TextInputs:
    return TextInputs(
        torch.from_numpy(text.input_ids),
        torch.from_numpy(text.attention_mask),
        torch.from_numpy(text.segment_ids),
    )


class PairBatches:
    """The plan's batches as one rank trains on them."""

    def __init__(
        self,
        settings: Settings,
        paths: StagePaths,
        rank: int,
        world_size: int,
        device: torch.device | None = None,
    ) -> None:
        """`device`: that of the training (none: the CPU)."""
        assert paths.plan is not None
        self.settings = settings
        self._device = device
        self.plan = Plan(paths.plan)
        self.inputs = InputStore(settings, paths, device)
        W = settings.train.batch_size
        self.rows = slice(rank * W // world_size, (rank + 1) * W // world_size)
        self._lookups = Lookups.open(paths.ingest)
        self._mined = HardNegatives.open(paths.hard_negatives) if paths.hard_negatives else None

    @property
    def steps_per_epoch(self) -> int:
        """Full batches an epoch; the remainder that is smaller than W is not trained on."""
        return self.plan.steps(0)

    def batch(self, step: int) -> TrainBatch:
        """The batch of global step `step`, counted from 0 over all epochs."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        record = self.plan.batch(epoch, in_epoch)
        query, product = record["query"].to_numpy(), record["product"].to_numpy()
        W, H, rows = len(query), self.settings.loss.hard_negatives, self.rows
        mined = product[:0]
        if H:
            assert self._mined is not None
            mined = self._mined.draw(query, H, (self.settings.seed, step))
        columns = np.concatenate([product, mined])
        hot = self._hot_lists(record["pair"].to_numpy(), columns, step)
        own = np.r_[rows, W + H * rows.start : W + H * rows.stop]
        side = self._products(columns[own], None if hot is None else hot[own])
        b = rows.stop - rows.start
        own_row, mined_row = side.pair_row.split([b, H * b])
        form, clicked = self.settings.loss.false_negatives, self._lookups.clicked
        return TrainBatch(
            self._queries(query[rows]),
            replace(side, pair_row=own_row),
            *false_negatives(query, product, form, clicked, rows, mined),
            self._log_share(columns) if self.settings.loss.popularity_correction else None,
            mined_row if H else None,
        )

    def _log_share(self, columns: NDArray[np.integer]) -> torch.Tensor:
        """log of how many of each product [W + W·H] a batch is expected to hold, over W: as a
        pair's own product, or as a mined one."""
        share = self._lookups.product_pairs[columns] / len(self._lookups.pair_hot_list)
        if self._mined is not None:
            share = share + self.settings.loss.hard_negatives * self._mined.share[columns]
        return torch.from_numpy(np.log(share).astype(np.float32))

    def _queries(self, query: NDArray[np.int32]) -> Side:
        distinct, pair_row = np.unique(query, return_inverse=True)
        text, tokens, order, rows = _by_length(self.inputs.text.query_batch(distinct), pair_row)
        return Side(text, None, tokens, np.zeros(len(order), np.bool_), rows)

    def _products(self, product: NDArray[np.int32], hot: NDArray[np.int32] | None) -> Side:
        both = product[:, None] if hot is None else np.stack([product, hot], axis=1)
        distinct, pair_row = np.unique(both, axis=0, return_inverse=True)
        products, lists = distinct[:, 0], None if hot is None else distinct[:, 1]
        text, tokens, order, rows = _by_length(
            self.inputs.text.product_batch(products, lists), pair_row
        )
        products = products[order]
        images, has_image = self.inputs.images(products), self.inputs.has_image(products)
        return Side(text, images, tokens, has_image, rows)

    def _hot_lists(
        self, pair: NDArray[np.int64], columns: NDArray[np.int32], step: int
    ) -> NDArray[np.int32] | None:
        """Of the pairs' products [W], then of the mined [W·H]. These have their lists of all
        training days: what was never clicked for a query has it in none of them."""
        model = self.settings.model
        if model.hot_queries == "off":
            return None
        lists = self._lookups.product_hot_lists[columns, 0]
        if model.hot_queries == "other_days":
            lists[: len(pair)] = self._lookups.pair_hot_list[pair]
        draw = np.random.default_rng((self.settings.seed, step)).random(len(columns))
        return np.where(draw < model.hot_query_dropout, EMPTY_LIST, lists)

    def stream(self, start: int, stop: int) -> Iterator[TrainBatch]:
        """Batches of steps start … stop − 1, each made in a thread while the last one trains."""
        return prefetched(lambda step: pinned(self.batch(step), self._device), start, stop)


def _by_length(
    text: TextArrays, pair_row: NDArray[np.int64]
) -> tuple[TextInputs, NDArray[np.int64], NDArray[np.int64], torch.Tensor]:
    """Rows [n] put in the order of their length: the texts, how long they are, which rows they
    were, and the pairs' rows [b]."""
    tokens = text.attention_mask.sum(axis=1)
    order = tokens.argsort(kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    rows = as_inputs(text).rows(torch.from_numpy(order))
    return rows, tokens[order], order, torch.from_numpy(place[pair_row])
