"""The steps of any training on one rank, in plain torch: batches, budget, validation, checkpoints.

    state = train(FineTuning(...), rank)

No Ray here: `Rank` says who this process is and where its state goes.

* A batch comes from (seed, epoch, step), a step's dropout from (seed, step, rank): a run that is
  resumed from a checkpoint repeats what the undisturbed one does, bit for bit with the same number
  of ranks and threads. Another number of ranks sees the same global batches, other dropout.
* Metrics stay tensors on the device until somebody looks at them.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from acebert.config import ScheduleSettings
from acebert.errors import AgreedError
from acebert.training.checkpoint import Progress
from acebert.training.schedule import progress

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
STEPS_OF_A_LINE = 50

Metrics = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rank:
    """One process of the group, as a training sees it.

    Attributes:
        rank, world: this process and how many there are; with more than one, a process group is
            expected
        device: where to train
        save: `save(tensors, progress)` for a checkpoint; returns when the tensors are copied.
            Every rank calls it at the same steps
        resume: loads what an earlier `save` was given, to go on from; None at the start
    """

    rank: int
    world: int
    device: torch.device
    save: Callable[[Mapping[str, Any], Progress], None]
    resume: Callable[[], tuple[Mapping[str, Any], Progress]] | None = None


class Batch(Protocol):
    """What a step trains on."""

    def to(self, device: torch.device) -> Self:
        """The same, on the device."""
        ...


class Trainer(Protocol):
    """A rank's model and optimisers."""

    @property
    def model(self) -> nn.Module: ...

    def state(self) -> dict[str, Any]:
        """Weights and optimiser states, on the device; equal on all ranks."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


B = TypeVar("B", bound=Batch)


class Training(ABC, Generic[B]):
    """What is trained, on one rank.

    Attributes:
        stage: its name in messages
        section: the section of the settings that holds its learning rate
        unit: what a batch has `batch_size` of
        said: what the line on progress calls a metric of the step, and its name, of each
        own: its budget and schedule
        batch_size: global batch
        steps_per_epoch: of the data
        validate_every, checkpoint_every: steps between two
        validates_on: what, in words
        trainer: model and optimisers
    """

    stage: str
    section: ClassVar[str]
    unit: ClassVar[str]
    said: ClassVar[tuple[tuple[str, str], ...]]
    own: ScheduleSettings
    batch_size: int
    steps_per_epoch: int
    validate_every: int
    checkpoint_every: int
    validates_on: str
    trainer: Trainer

    @abstractmethod
    def stream(self, start: int, stop: int) -> Iterator[B]:
        """This rank's batches of steps start … stop − 1."""

    @abstractmethod
    def step(self, batch: B, step: int, share: float) -> Metrics:
        """Step number `step` (from 0), `share` of the budget used: its metrics, scalars whose mean
        over the ranks is the whole batch's; `loss` and `seconds_data` among them."""

    @abstractmethod
    def validate(self, state: Progress) -> dict[str, float]:
        """Measure after step `state.step`; the same on all ranks."""

    def is_over(self, state: Progress) -> bool:
        """Whether to stop before the budget is used."""
        return False

    def not_finite(self, what: str, step: int) -> AgreedError:
        """The error for a training that has diverged."""
        return AgreedError(
            f"{self.stage}: the {what} is not finite after step {step}. Lower --{self.section}.lr, "
            f"raise --{self.section}.warmup_steps, or set --train.precision fp32"
        )


def train(training: Training[B], rank: Rank) -> Progress:
    """Train until the budget is used or `is_over`; a checkpoint every `checkpoint_every` steps and
    after each validation, the last of them after the last step.

    Raises:
        AgreedError: the loss is not finite.
        UserError: what a batch or a validation raises.
    """
    state = Progress()
    own, world = training.own, rank.world
    total = min(own.max_steps or 10**12, own.epochs * training.steps_per_epoch)
    training.trainer.model.train()
    if rank.resume is not None:
        tensors, state = rank.resume()
        training.trainer.load_state(tensors)
        if world > 2:
            # DDP deals the gradients to its buckets anew after its first step. Where three or more
            # are summed, the place in a bucket decides in which order: one step to be forgotten.
            for batch in training.stream(state.step, min(state.step + 1, total)):
                training.step(batch.to(rank.device), state.step, 0.0)
            tensors, state = rank.resume()
            training.trainer.load_state(tensors)
        del tensors
    if rank.rank == 0:
        log.info(
            "%s: %d steps of %d %s (%d an epoch), validation on %s",
            training.stage,
            total,
            training.batch_size,
            training.unit,
            training.steps_per_epoch,
            training.validates_on,
        )
        if own.warmup_steps >= total:
            log.warning(
                "%s: the learning rate never reaches --%s.lr: its warm-up is %d steps long",
                training.stage,
                training.section,
                own.warmup_steps,
            )
    pending: list[Metrics] = []
    spoken = clock = time.perf_counter()
    for batch in training.stream(state.step, 0 if training.is_over(state) else total):
        share = progress(own, state.step, total, state.seconds)
        if own.max_minutes is not None:  # the learning rate must not differ between ranks
            (share,) = of_rank_zero([share], world)
        if share >= 1:
            break
        metrics = training.step(batch.to(rank.device), state.step, share)
        state.step += 1
        now = time.perf_counter()
        state.seconds += now - clock
        metrics["seconds"] = torch.tensor(now - clock).to(rank.device, non_blocking=True)
        clock = now
        pending.append(metrics)
        if rank.rank == 0 and now - spoken > SECONDS_BETWEEN_LINES:
            _say(training, pending, state, total, share)
            spoken = now
        if state.step % training.validate_every == 0 or state.step == total:
            _validate_and_save(training, pending, state, rank)
            clock = spoken = time.perf_counter()
            if training.is_over(state):
                if rank.rank == 0:
                    log.info("%s: stops before its budget is used", training.stage)
                break
        elif state.step % training.checkpoint_every == 0:
            _collect(training, pending, state, world)
            rank.save(training.trainer.state(), state)
    if not state.validations or state.validations[-1]["step"] != state.step:
        _validate_and_save(training, pending, state, rank)
    return state


def of_rank_zero(values: Sequence[float], world: int) -> list[float]:
    """Rank 0's `values` on all ranks, for what they decide by: clocks differ, and so do the last
    bits of a sum on another CPU. All ranks call it at the same places."""
    if world == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.broadcast(tensor, 0)
    return tensor.tolist()


def _validate_and_save(
    training: Training[B], pending: list[Metrics], state: Progress, rank: Rank
) -> None:
    _collect(training, pending, state, rank.world)
    start = time.perf_counter()
    measured = training.validate(state)
    training.trainer.model.train()
    state.validations.append({"step": state.step, "seconds": state.seconds, **measured})
    if rank.rank == 0:
        log.info(
            "%s: step %d, validation: %s%s (%.1f s)",
            training.stage,
            state.step,
            ", ".join(f"{name} {value:.4f}" for name, value in measured.items()),
            ", best so far" if state.best_step == state.step else "",
            time.perf_counter() - start,
        )
    rank.save(training.trainer.state(), state)


def _collect(training: Training[B], pending: list[Metrics], state: Progress, world: int) -> None:
    """Bring the pending steps' metrics, averaged over the ranks, into the history."""
    if not pending:
        return
    values = torch.stack([v.float() for metrics in pending for v in metrics.values()])
    if world > 1:
        dist.all_reduce(values)
        values /= world
    of = iter(values.tolist())
    rows = [
        {"step": step, **{name: next(of) for name in metrics}}
        for step, metrics in enumerate(pending, state.step - len(pending) + 1)
    ]
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise training.not_finite("loss", int(row["step"]))
    state.add_steps(rows)
    pending.clear()


def _say(
    training: Training[B], pending: list[Metrics], state: Progress, total: int, share: float
) -> None:
    """A line on the last steps, as rank 0 saw them."""
    rows = pending[-STEPS_OF_A_LINE:]

    def mean(name: str) -> float:
        return float(torch.stack([row[name] for row in rows]).nanmean())

    seconds = mean("seconds")
    means = [f"{called} {mean(name):.3f}" for called, name in training.said if name in rows[0]]
    share_of_peak = "peak_share" in rows[0] and rows[0]["peak_share"].is_cuda  # CPUs are shared
    peak = f"{mean('peak_share'):.0%} of the matrix peak, " if share_of_peak else ""
    log.info(
        "%s: step %d of %d, %s, %.0f %s/s (%s%.1f %% waiting for data)%s",
        training.stage,
        state.step,
        total,
        ", ".join(means),
        training.batch_size / seconds,
        training.unit,
        peak,
        100 * mean("seconds_data") / seconds,
        f", {state.seconds * (1 - share) / share:.0f} s left" if share else "",
    )
