"""Training of the patch CNN in plain torch: steps, validations, checkpoints. No Ray here.

A batch comes from (seed, epoch, step), a step's dropout from (seed, step, rank), as in fine-tuning
(`acebert.training.loop`). BatchNorm counts on each rank alone, and rank 0's statistics are kept: it
is what all trainers do on CPUs and most on GPUs, and here alone the number of ranks matters.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from acebert.config import Settings
from acebert.data.augment import random_views
from acebert.errors import UserError
from acebert.models.parameters import adamw_groups
from acebert.models.tagging import TaggingCNN, category_loss, tag_loss
from acebert.training.checkpoint import Progress
from acebert.training.cnn_batches import PhotoBatch, PhotoBatches
from acebert.training.cnn_validation import HeldOutPhotos
from acebert.training.ranks import rows_of_steps, same_on_all_ranks
from acebert.training.schedule import lr_factor, progress

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


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
        metrics["lr"] = norm.new_tensor(self.own.lr * factor)
        return {name: value.detach() for name, value in metrics.items()}

    def state(self) -> dict[str, Any]:
        """Weights and optimiser state, on the device."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def run(
    settings: Settings,
    batches: PhotoBatches,
    model: TaggingCNN,
    *,
    device: torch.device,
    rank: int,
    world: int,
    save: Callable[[Mapping[str, Any], Progress], None],
    resume: tuple[Mapping[str, Any], Progress] | None = None,
) -> Progress:
    """Train this rank until the budget is used; validation after each epoch.

    `save(tensors, progress)` is called by every rank every `train.checkpoint_every` steps and after
    each validation. `resume` is what an earlier `save` was given. With `world` > 1 a process group
    is expected.

    Raises:
        UserError: the loss is not finite. All ranks raise it at the same step.
    """
    held_out = HeldOutPhotos(batches.store, batches.labels)
    words = batches.labels.words_per_product()
    trainer = CNNTrainer(settings, model, words, device, rank, world)
    state = Progress()
    if resume is not None:
        trainer.load_state(resume[0])
        state = resume[1]
    own = settings.cnn
    total = min(own.max_steps or 10**12, own.epochs * batches.steps_per_epoch)
    if rank == 0:
        log.info(
            "cnn: %d steps of %d photos (%d an epoch), measured on %d",
            total,
            own.batch_size,
            batches.steps_per_epoch,
            len(held_out.products),
        )
    pending: list[dict[str, torch.Tensor]] = []
    spoken = clock = time.perf_counter()
    trainer.model.train()
    for batch in batches.stream(state.step, total):
        share = same_on_all_ranks(
            progress(own, state.step, total, state.seconds), own.max_minutes, world
        )
        if share >= 1:
            break
        metrics = trainer.step(batch.to(device), state.step, share)
        state.step += 1
        now = time.perf_counter()
        state.seconds += now - clock
        metrics["seconds"] = torch.tensor(now - clock, device=device)
        clock = now
        pending.append(metrics)
        if rank == 0 and now - spoken > SECONDS_BETWEEN_LINES:
            _say(pending, state, total, share, own.batch_size)
            spoken = now
        validates = state.step % batches.steps_per_epoch == 0 or state.step == total
        if validates or state.step % settings.train.checkpoint_every == 0:
            _collect(pending, state, world)
            if validates:
                _validate(trainer, held_out, state)
            save(trainer.state(), state)
            clock = spoken = time.perf_counter()
    if not state.validations or state.validations[-1]["step"] != state.step:
        _collect(pending, state, world)
        _validate(trainer, held_out, state)
        save(trainer.state(), state)
    return state


def _collect(pending: list[dict[str, torch.Tensor]], state: Progress, world: int) -> None:
    rows = rows_of_steps(pending, state.step, world)
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"cnn: the loss is not finite after step {row['step']:.0f}. Lower --cnn.lr, raise "
                "--cnn.warmup_steps, or set --train.precision fp32"
            )
    state.add_steps(rows)
    pending.clear()


def _say(
    pending: list[dict[str, torch.Tensor]],
    state: Progress,
    total: int,
    share: float,
    batch_size: int,
) -> None:
    """A line on the last steps, as rank 0 saw them."""
    rows = pending[-50:]
    seconds = sum(float(row["seconds"]) for row in rows)
    log.info(
        "cnn: step %d of %d, loss of categories %.3f, of words %.3f, %.0f photos/s, %.0f s left",
        state.step,
        total,
        sum(float(row["category"]) for row in rows) / len(rows),
        sum(float(row["tags"]) for row in rows) / len(rows),
        len(rows) * batch_size / seconds,
        state.seconds * (1 - share) / share if share else float("nan"),
    )


def _validate(trainer: CNNTrainer, held_out: HeldOutPhotos, state: Progress) -> None:
    """Measured by rank 0, whose BatchNorm statistics are kept; told to all."""
    measured: list[dict[str, float]] = [{}]
    if trainer.rank == 0:
        side = trainer.settings.image.cnn_side
        bf16 = trainer.settings.train.precision == "bf16"
        measured = [held_out.measure(held_out.predict(trainer.model, side, bf16=bf16))]
        values = ", ".join(f"{name} {value:.3f}" for name, value in measured[0].items())
        log.info("cnn: step %d, held out: %s", state.step, values)
    if trainer.world > 1:
        dist.broadcast_object_list(measured, 0)
    state.validations.append({"step": state.step, "seconds": state.seconds, **measured[0]})
