"""Fine-tuning's batches, steps, validation and early stop. No Ray here.

k encoder steps, then one step of the domain classifier (paper section 3.3.2).
"""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.errors import AgreedError
from acebert.models.dual import DualEncoder
from acebert.training.checkpoint import Progress
from acebert.training.finetuner import Finetuner
from acebert.training.pairs import InputStore, PairBatches, StagePaths, TrainBatch
from acebert.training.steps import Metrics, Rank, Training, of_rank_zero, train
from acebert.training.validation import K, ValidationSample

log = logging.getLogger(__name__)


def run(settings: Settings, paths: StagePaths, model: DualEncoder, rank: Rank) -> Progress:
    """Fine-tune `model` on this rank until the budget is used or the validation metric stops
    improving (`acebert.training.steps.train`).

    Raises:
        AgreedError: loss or embeddings are not finite, or the validation day measures nothing.
    """
    return train(FineTuning(settings, paths, model, rank), rank)


class FineTuning(Training[TrainBatch]):
    stage, section, unit = "finetune", "train", "pairs"
    said = (("loss", "loss"), ("in-batch accuracy", "accuracy"))

    def __init__(
        self, settings: Settings, paths: StagePaths, model: DualEncoder, rank: Rank
    ) -> None:
        if settings.tracking.parent_run is not None:  # a trial, others may run beside it
            self.stage = f"finetune {settings.tracking.run_name}"
        self.settings = settings
        self.own = settings.train
        self.batch_size = settings.train.batch_size
        self.validate_every = settings.train.validate_every
        self.checkpoint_every = settings.train.checkpoint_every
        self.batches = PairBatches(settings, paths, rank.rank, rank.world, rank.device)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.sample = ValidationSample.draw(settings, paths)
        sample = self.sample
        self.validates_on = f"{len(sample.queries)} queries, {len(sample.products)} products"
        self.metric: str = settings.train.valid_metric
        if self.metric == "recall_100" and len(sample.products) <= K and sample.has_gauc:
            self.metric = "gauc"
            if rank.rank == 0:
                log.info(
                    "finetune: Recall@%d of %d products is always 1, so the best weights are those "
                    "of the best GAUC",
                    *(K, len(sample.products)),
                )
        self.trainer: Finetuner = Finetuner(settings, model, rank.device, rank.rank, rank.world)

    def stream(self, start: int, stop: int) -> Iterator[TrainBatch]:
        return self.batches.stream(start, stop)

    def step(self, batch: TrainBatch, step: int, share: float) -> Metrics:
        metrics, v_q, v_p = self.trainer.encoder_step(batch, step, share)
        adversary = self.settings.adversary
        if adversary.form != "off" and (step + 1) % adversary.k == 0:
            metrics |= self.trainer.domain_step(v_q, v_p)
        return metrics

    def validate(self, state: Progress) -> dict[str, float]:
        """Measure the sample, and note whether it is the best so far."""
        self.trainer.timer.forget()
        queries, products = encode_sample(self.trainer, self.sample, self.batches.inputs)
        if not (np.isfinite(queries).all() and np.isfinite(products).all()):
            raise self.not_finite("embeddings", state.step)
        here = self.sample.measure(queries, products)
        values = of_rank_zero(list(here.values()), self.trainer.world)
        measured = dict(zip(here, values, strict=True))
        value = measured[self.metric]
        if np.isnan(value):
            raise AgreedError(
                f"--train.valid_metric {self.metric}: the validation day has no search to measure "
                "it on (no clicks, or no row that was not clicked)"
            )
        if value > state.best:
            state.best, state.best_step, state.since_best = value, state.step, 0
        else:
            state.since_best += 1
        return measured

    def is_over(self, state: Progress) -> bool:
        return state.since_best >= self.settings.train.patience


def encode_sample(
    tuner: Finetuner, sample: ValidationSample, inputs: InputStore
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of the sample's queries [Q, d] and products [C, d], each rank encoding its share."""
    tuner.model.eval()
    B = tuner.settings.eval.batch_size
    bf16 = tuner.settings.train.precision == "bf16"
    hot = tuner.settings.model.hot_queries != "off"

    def encode(n: int, of: Callable[[NDArray[np.int64]], torch.Tensor]) -> NDArray[np.float32]:
        mine = np.arange(n)[tuner.rank :: tuner.world]
        with (
            torch.inference_mode(),
            torch.autocast(tuner.device.type, torch.bfloat16, enabled=bf16),
        ):
            parts = [of(mine[i : i + B]).float().cpu() for i in range(0, len(mine), B)]
        own = torch.cat(parts).numpy() if parts else np.zeros((0, 0), np.float32)
        if tuner.world == 1:
            return own
        shares: list[NDArray[np.float32]] = [own] * tuner.world
        dist.all_gather_object(shares, own)
        full = np.empty((n, max(share.shape[1] for share in shares)), np.float32)
        for rank, share in enumerate(shares):
            if len(share):
                full[rank :: tuner.world] = share
        return full

    def queries(rows: NDArray[np.int64]) -> torch.Tensor:
        return tuner.model.encode_queries(inputs.queries(sample.queries[rows]).to(tuner.device))

    def products(rows: NDArray[np.int64]) -> torch.Tensor:
        lists = sample.hot_lists[rows] if hot else None
        text, image = inputs.products(sample.products[rows], lists)
        return tuner.model.encode_products(
            text.to(tuner.device), None if image is None else image.to(tuner.device)
        )

    return encode(len(sample.queries), queries), encode(len(sample.products), products)
