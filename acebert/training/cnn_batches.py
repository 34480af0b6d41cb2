"""Batches of photos and their labels for the patch CNN.

A batch is a function of (seed, epoch, step): the order of the photos, and how each is seen. A rank
takes its rows of it, so a run that is resumed, or has another number of workers, sees the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from acebert.config import CNNSettings
from acebert.data.augment import Views
from acebert.data.cnn_labels import PhotoLabels
from acebert.data.features import FeatureStore
from acebert.errors import UserError
from acebert.training.prefetch import prefetched


@dataclass
class PhotoBatch:
    """One rank's rows (B) of a batch.

    Attributes:
        photos: RGB uint8 [B, S, S, 3]
        views: how they are to be seen [B]
        category: int64 [B], -1 where there is none
        targets: float32 [B, T], 0 where nothing names the tag
        waited: how long training waited for this batch [s]
    """

    photos: torch.Tensor
    views: Views
    category: torch.Tensor
    targets: torch.Tensor
    waited: float = 0.0

    def to(self, device: torch.device) -> "PhotoBatch":
        return PhotoBatch(
            self.photos.to(device, non_blocking=True),
            self.views,
            self.category.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.waited,
        )


@dataclass(frozen=True)
class CNNPaths:
    """Where the stages lie that the CNN is trained on."""

    crops: Path
    labels: Path


class PhotoBatches:
    """The photos to train on, as one rank sees them."""

    def __init__(self, settings: CNNSettings, paths: CNNPaths, rank: int, world: int) -> None:
        """
        Raises:
            UserError: a batch cannot be shared by the ranks, or there are fewer photos than it has.
        """
        W = settings.batch_size
        self.settings = settings
        self.store = FeatureStore(paths.crops)
        self.labels = PhotoLabels(paths.labels)
        if W % world:
            raise UserError(f"--cnn.batch_size {W} is not divisible by {world} workers")
        if len(self.labels.train) < W:
            raise UserError(
                f"--cnn.batch_size {W}: there are {len(self.labels.train)} photos to train on"
            )
        self._rows = slice(rank * W // world, (rank + 1) * W // world)
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Full batches; the photos that are left over are others in each epoch."""
        return len(self.labels.train) // self.settings.batch_size

    def batch(self, step: int) -> PhotoBatch:
        """The batch of step `step`, counted from 0 over all epochs."""
        W, seed = self.settings.batch_size, self.settings.seed
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        products = self._epoch(epoch)[in_epoch * W : (in_epoch + 1) * W][self._rows]
        views = Views.draw(np.random.default_rng((seed, 1, step)), W)
        return PhotoBatch(
            torch.from_numpy(self.store.pixels(products)),
            views.rows(self._rows),
            torch.from_numpy(self.labels.category[products].astype(np.int64)),
            torch.from_numpy(self.labels.tag_targets(products)),
        )

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng((self.settings.seed, 0, epoch))
            self._order = epoch, rng.permutation(self.labels.train)
        return self._order[1]

    def stream(self, start: int, stop: int) -> Iterator[PhotoBatch]:
        """Batches of steps start … stop − 1, each made while the one before trains."""
        return prefetched(self.batch, start, stop)
