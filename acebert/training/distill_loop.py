"""Distillation in plain torch: steps, validations, checkpoints. No Ray here.

The budget is used up: the last weights are the result.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from acebert.errors import UserError
from acebert.training.checkpoint import Progress
from acebert.training.distiller import Distiller
from acebert.training.ranks import rows_of_steps, same_on_all_ranks
from acebert.training.schedule import progress

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


def run(
    trainer: Distiller,
    *,
    save: Callable[[Mapping[str, Any], Progress], None],
    resume: tuple[Mapping[str, Any], Progress] | None = None,
) -> Progress:
    """Train this rank until the budget is used.

    `save(tensors, progress)` is called by every rank every `train.checkpoint_every` steps and after
    each validation. `resume` is what an earlier `save` was given. With several ranks a process
    group is expected.

    Raises:
        UserError: the loss is not finite. All ranks raise it at the same step.
    """
    own, world = trainer.own, trainer.world
    state = Progress()
    if resume is not None:
        trainer.load_state(resume[0])
        state = resume[1]
    total = min(own.max_steps or 10**12, own.epochs * trainer.steps_per_epoch)
    if trainer.rank == 0:
        log.info(
            "distill: %d steps of %d texts (%d an epoch)",
            total,
            own.batch_size,
            trainer.steps_per_epoch,
        )
    pending: list[dict[str, torch.Tensor]] = []
    spoken = clock = time.perf_counter()
    trainer.model.train()
    for batch in trainer.stream(state.step, total):
        share = same_on_all_ranks(
            progress(own, state.step, total, state.seconds), own.max_minutes, world
        )
        if share >= 1:
            break
        waited = time.perf_counter() - clock
        metrics = trainer.step(batch.to(trainer.device), state.step, share)
        state.step += 1
        now = time.perf_counter()
        state.seconds += now - clock
        metrics["seconds"], metrics["seconds_data"] = torch.tensor(
            [now - clock, waited], device=trainer.device
        ).unbind()
        clock = now
        pending.append(metrics)
        if trainer.rank == 0 and now - spoken > SECONDS_BETWEEN_LINES:
            _say(pending, state, total, share, own.batch_size)
            spoken = now
        validates = state.step % own.validate_every == 0 or state.step == total
        if validates or state.step % trainer.settings.train.checkpoint_every == 0:
            _collect(pending, state, world)
            if validates:
                _validate(trainer, state)
            save(trainer.state(), state)
            clock = spoken = time.perf_counter()
    if not state.validations or state.validations[-1]["step"] != state.step:
        _collect(pending, state, world)
        _validate(trainer, state)
        save(trainer.state(), state)
    return state


def _collect(pending: list[dict[str, torch.Tensor]], state: Progress, world: int) -> None:
    rows = rows_of_steps(pending, state.step, world)
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"distill: the loss is not finite after step {row['step']:.0f}. Lower "
                "--distill.lr, or raise --distill.warmup_steps"
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
    rows = pending[-50:]
    seconds = sum(float(row["seconds"]) for row in rows)
    means = {n: sum(float(row[n]) for row in rows) / len(rows) for n in ("loss", "kl", "cosine")}
    log.info(
        "distill: step %d of %d, %s, %.0f texts/s, %.0f s left",
        state.step,
        total,
        ", ".join(f"{name} {value:.4f}" for name, value in means.items()),
        len(rows) * batch_size / seconds,
        state.seconds * (1 - share) / share if share else float("nan"),
    )


def _validate(trainer: Distiller, state: Progress) -> None:
    start = time.perf_counter()
    measured = trainer.validate()
    state.validations.append({"step": state.step, "seconds": state.seconds, **measured})
    if trainer.rank == 0:
        log.info(
            "distill: step %d, validation day: %s (%.1f s)",
            state.step,
            ", ".join(f"{name} {value:.4f}" for name, value in measured.items()),
            time.perf_counter() - start,
        )
