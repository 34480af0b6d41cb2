"""Pre-training's batches, step and validation. No Ray here.

The budget is used up: the last weights are the result.
"""

import logging
from collections.abc import Iterator

import numpy as np

from acebert.config import Settings
from acebert.models.pretraining import CEBertForPreTraining
from acebert.training.checkpoint import Progress
from acebert.training.pairs import StagePaths
from acebert.training.pretrain_batches import PretrainBatch, PretrainBatches
from acebert.training.pretrain_validation import HeldOut
from acebert.training.pretrainer import Pretrainer
from acebert.training.steps import Metrics, Rank, Training, train

log = logging.getLogger(__name__)


def run(settings: Settings, paths: StagePaths, model: CEBertForPreTraining, rank: Rank) -> Progress:
    """Pre-train `model` on this rank (`acebert.training.steps.train`).

    Raises:
        UserError: too few texts, or (an AgreedError) the loss is not finite.
    """
    return train(PreTraining(settings, paths, model, rank), rank)


class PreTraining(Training[PretrainBatch]):
    stage, section, unit = "pretrain", "pretrain", "texts"
    said = tuple((name, name) for name in ("mlm", "mpm", "tip", "mlm_accuracy", "tip_accuracy"))

    def __init__(
        self, settings: Settings, paths: StagePaths, model: CEBertForPreTraining, rank: Rank
    ) -> None:
        if rank.rank == 0 and paths.features and settings.image.feature_cache == "device":
            log.warning(  # no error: fine-tuning, for which the setting is, may be what comes next
                "pretrain: --image.feature_cache device is for fine-tuning; here photos are read "
                "from the work directory (node_disk and node_memory are for both)"
            )
        self.own = settings.pretrain
        self.batch_size = settings.pretrain.batch_size
        self.validate_every = settings.pretrain.validate_every
        self.checkpoint_every = settings.train.checkpoint_every
        self.batches = PretrainBatches(settings, paths, rank.rank, rank.world, rank.device)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.held_out = HeldOut(self.batches)
        rows = self.held_out.products
        self.validates_on = f"{len(rows)} masked titles of {len(np.unique(rows))} products"
        self.trainer: Pretrainer = Pretrainer(settings, model, rank.device, rank.rank, rank.world)

    def stream(self, start: int, stop: int) -> Iterator[PretrainBatch]:
        return self.batches.stream(start, stop)

    def step(self, batch: PretrainBatch, step: int, share: float) -> Metrics:
        return self.trainer.step(batch, step, share)

    def validate(self, state: Progress) -> dict[str, float]:
        self.trainer.timer.forget()
        return self.held_out.measure(self.trainer, self.batches)
