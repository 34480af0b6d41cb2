"""Distillation's batches, step and validation. No Ray here.

The budget is used up: the last weights are the result.
"""

from collections.abc import Iterator

from acebert.training.checkpoint import Progress
from acebert.training.distiller import DistillBatch, Distiller
from acebert.training.steps import Metrics, Rank, Training, train


def run(trainer: Distiller, rank: Rank) -> Progress:
    """Train this rank's student (`acebert.training.steps.train`).

    Raises:
        AgreedError: the loss is not finite.
    """
    return train(Distillation(trainer), rank)


class Distillation(Training[DistillBatch]):
    stage, section, unit = "distill", "distill", "texts"
    said = (("loss", "loss"), ("KL", "kl"), ("cosine", "cosine"))

    def __init__(self, trainer: Distiller) -> None:
        self.own = trainer.own
        self.batch_size = trainer.own.batch_size
        self.validate_every = trainer.own.validate_every
        self.checkpoint_every = trainer.settings.train.checkpoint_every
        self.steps_per_epoch = trainer.steps_per_epoch
        self.validates_on = f"{len(trainer.valid.rows)} queries"
        self.trainer: Distiller = trainer

    def stream(self, start: int, stop: int) -> Iterator[DistillBatch]:
        return self.trainer.stream(start, stop)

    def step(self, batch: DistillBatch, step: int, share: float) -> Metrics:
        return self.trainer.step(batch, step, share)

    def validate(self, state: Progress) -> dict[str, float]:
        return self.trainer.validate()
