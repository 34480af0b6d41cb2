"""Pre-training in plain torch: steps, validations, checkpoints. No Ray here.

A batch comes from (seed, epoch, step), a step's dropout from (seed, step, rank), as in fine-tuning
(`acebert.training.loop`). The budget is used up: the last weights are the result.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from acebert.config import Settings
from acebert.errors import UserError
from acebert.models.pretraining import CEBertForPreTraining
from acebert.training.checkpoint import Progress
from acebert.training.pairs import StagePaths
from acebert.training.pretrain_batches import PretrainBatches
from acebert.training.pretrain_validation import HeldOut
from acebert.training.pretrainer import Pretrainer
from acebert.training.ranks import rows_of_steps, same_on_all_ranks
from acebert.training.schedule import progress

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


def run(
    settings: Settings,
    paths: StagePaths,
    model: CEBertForPreTraining,
    *,
    device: torch.device,
    rank: int,
    world: int,
    save: Callable[[Mapping[str, Any], Progress], None],
    resume: tuple[Mapping[str, Any], Progress] | None = None,
) -> Progress:
    """Train this rank until the budget is used.

    `save(tensors, progress)` is called by every rank every `train.checkpoint_every` steps and after
    each validation. `resume` is what an earlier `save` was given. With `world` > 1 a process group
    is expected.

    Raises:
        UserError: too few texts, or the loss is not finite. All ranks raise it at the same step.
    """
    batches = PretrainBatches(settings, paths, rank, world)
    held_out = HeldOut(batches)
    trainer = Pretrainer(settings, model, device, rank, world)
    state = Progress()
    if resume is not None:
        trainer.load_state(resume[0])
        state = resume[1]
    own = settings.pretrain
    total = min(own.max_steps or 10**12, own.epochs * batches.steps_per_epoch)
    if rank == 0:
        log.info(
            "pretrain: %d steps of %d texts (%d an epoch), %d titles held out, %d to measure on",
            total,
            own.batch_size,
            batches.steps_per_epoch,
            len(batches.texts.held_out),
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
        waited = time.perf_counter() - clock
        metrics = trainer.step(batch.to(device), state.step, share)
        state.step += 1
        now = time.perf_counter()
        state.seconds += now - clock
        metrics["seconds"], metrics["seconds_data"] = torch.tensor(
            [now - clock, waited], device=device
        ).unbind()
        clock = now
        pending.append(metrics)
        if rank == 0 and now - spoken > SECONDS_BETWEEN_LINES:
            _say(pending, state, total, share, own.batch_size)
            spoken = now
        validates = state.step % own.validate_every == 0 or state.step == total
        if validates or state.step % settings.train.checkpoint_every == 0:
            _collect(pending, state, world)
            if validates:
                _validate(trainer, batches, held_out, state)
            save(trainer.state(), state)
            clock = spoken = time.perf_counter()
    if not state.validations or state.validations[-1]["step"] != state.step:
        _collect(pending, state, world)
        _validate(trainer, batches, held_out, state)
        save(trainer.state(), state)
    return state


def _collect(pending: list[dict[str, torch.Tensor]], state: Progress, world: int) -> None:
    rows = rows_of_steps(pending, state.step, world)
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"pretrain: the loss is not finite after step {row['step']:.0f}. Lower "
                "--pretrain.lr, raise --pretrain.warmup_steps, or set --train.precision fp32"
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
    names = ("mlm", "mpm", "tip", "mlm_accuracy", "tip_accuracy")
    means = {n: sum(float(row[n]) for row in rows) / len(rows) for n in names if n in rows[0]}
    log.info(
        "pretrain: step %d of %d, %s, %.0f texts/s, %.0f s left",
        state.step,
        total,
        ", ".join(f"{name} {value:.3f}" for name, value in means.items()),
        len(rows) * batch_size / seconds,
        state.seconds * (1 - share) / share if share else float("nan"),
    )


def _validate(
    trainer: Pretrainer, batches: PretrainBatches, held_out: HeldOut, state: Progress
) -> None:
    start = time.perf_counter()
    measured = held_out.measure(trainer, batches)
    state.validations.append({"step": state.step, "seconds": state.seconds, **measured})
    if trainer.rank == 0:
        log.info(
            "pretrain: step %d, held out: %s (%.1f s)",
            state.step,
            ", ".join(f"{name} {value:.3f}" for name, value in measured.items()),
            time.perf_counter() - start,
        )
