"""The patch CNN's model and optimiser, batches, step and validation. No Ray here.

BatchNorm counts on each rank alone, and rank 0's statistics are kept: it is what all trainers do on
CPUs and most on GPUs, and here alone the number of ranks matters.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from acebert.config import Settings
from acebert.data.augment import random_views
from acebert.models.parameters import adamw_groups
from acebert.models.tagging import TaggingCNN, category_loss, tag_loss
from acebert.training.checkpoint import Progress
from acebert.training.cnn_batches import PhotoBatch, PhotoBatches
from acebert.training.cnn_validation import HeldOutPhotos
from acebert.training.schedule import lr_factor
from acebert.training.steps import Metrics, Rank, Training, train


def run(settings: Settings, batches: PhotoBatches, model: TaggingCNN, rank: Rank) -> Progress:
    """Train `model` on this rank until the budget is used, with a validation after each epoch
    (`acebert.training.steps.train`).

    Raises:
        AgreedError: the loss is not finite.
    """
    return train(CNNTraining(settings, batches, model, rank), rank)


class CNNTraining(Training[PhotoBatch]):
    stage, section, unit = "cnn", "cnn", "photos"
    said = (("loss of categories", "category"), ("of words", "tags"))

    def __init__(
        self, settings: Settings, batches: PhotoBatches, model: TaggingCNN, rank: Rank
    ) -> None:
        self.settings, self.rank = settings, rank
        self.own = settings.cnn
        self.batch_size = settings.cnn.batch_size
        self.steps_per_epoch = self.validate_every = batches.steps_per_epoch
        self.checkpoint_every = settings.train.checkpoint_every
        self.batches = batches
        self.held_out = HeldOutPhotos(batches.store, batches.labels)
        self.validates_on = f"{len(self.held_out.products)} photos"
        words = batches.labels.words_per_product()
        self.trainer: CNNTrainer = CNNTrainer(
            settings, model, words, rank.device, rank.rank, rank.world
        )

    def stream(self, start: int, stop: int) -> Iterator[PhotoBatch]:
        return self.batches.stream(start, stop)

    def step(self, batch: PhotoBatch, step: int, share: float) -> Metrics:
        return self.trainer.step(batch, step, share)

    def validate(self, state: Progress) -> dict[str, float]:
        """By rank 0, whose BatchNorm statistics are kept; told to all."""
        measured: list[dict[str, float]] = [{}]
        if self.rank.rank == 0:
            side = self.settings.image.cnn_side
            bf16 = self.settings.train.precision == "bf16"
            said = self.held_out.predict(self.trainer.model, side, bf16=bf16)
            measured = [self.held_out.measure(said)]
        if self.rank.world > 1:
            dist.broadcast_object_list(measured, 0)
        return measured[0]


class CNNTrainer:
    """Model and optimiser on one rank."""

    def __init__(
        self,
        settings: Settings,
        model: TaggingCNN,
        words_per_product: float,
        device: torch.device,
        rank: int,
        world: int,
    ) -> None:
        self.settings, self.own = settings, settings.cnn
        self.device, self.rank, self.world = device, rank, world
        self.words_per_product = words_per_product
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward: nn.Module = self.model
        if world > 1:
            ids = [device] if device.type == "cuda" else None
            # A static graph may have parameters that are never used: some of timm's CNNs have
            # layers between the feature map and the head.
            self.forward = DistributedDataParallel(self.model, device_ids=ids, static_graph=True)
        groups = adamw_groups(
            model,
            model.head_parameters(),
            self.own.lr,
            self.own.new_layer_lr_factor,
            self.own.weight_decay,
        )
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self._peak = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, batch: PhotoBatch, step: int, share: float) -> dict[str, torch.Tensor]:
        """One update on this rank's photos; the step's metrics, whose mean over the ranks is the
        whole batch's."""
        torch.manual_seed(hash((self.own.seed, step, self.rank)))
        photos = random_views(batch.photos, batch.views, self.own.side)
        bf16 = self.settings.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            category, tags = self.forward(photos)
        of_category = category_loss(category, batch.category, self.own.label_smoothing)
        of_tags = tag_loss(tags, batch.targets, self.own.unnamed_weight, self.words_per_product)
        loss = of_category + self.own.tag_weight * of_tags
        factor = lr_factor(self.own, step, share)
        for group, peak in zip(self.optimizer.param_groups, self._peak, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.train.max_grad_norm)
        self.optimizer.step()
        metrics = {"loss": loss, "category": of_category, "tags": of_tags, "grad_norm": norm}
        host = norm.new_tensor([self.own.lr * factor, batch.waited])
        metrics["lr"], metrics["seconds_data"] = host.unbind()
        return {name: value.detach() for name, value in metrics.items()}

    def state(self) -> dict[str, Any]:
        """Weights and optimiser state, on the device."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
