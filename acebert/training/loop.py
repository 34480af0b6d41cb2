"""Fine-tuning in plain torch: encoder steps, domain-classifier steps, validation, early stop.

No Ray here: `run` trains one rank of a process group (or alone) and hands its state to `save`.

* A batch comes from (seed, epoch, step), a step's dropout from (seed, step, rank): a run that is
  resumed from a checkpoint repeats what the undisturbed one does, bit for bit with the same number
  of ranks and threads. Another number of ranks sees the same global batches, other dropout.
* k encoder steps, then one step of the domain classifier (paper section 3.3.2).
* Metrics stay tensors on the device until somebody looks at them.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from acebert.config import Settings, TrainSettings
from acebert.errors import UserError
from acebert.models.dual import DualEncoder
from acebert.training.checkpoint import Progress
from acebert.training.finetuner import Finetuner
from acebert.training.pairs import InputStore, PairBatches, StagePaths
from acebert.training.schedule import progress
from acebert.training.validation import ValidationSample

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


def run(
    settings: Settings,
    paths: StagePaths,
    model: DualEncoder,
    *,
    device: torch.device,
    rank: int,
    world: int,
    save: Callable[[Mapping[str, Any], Progress], None],
    resume: tuple[Mapping[str, Any], Progress] | None = None,
) -> Progress:
    """Train this rank until the budget is used or the validation metric stops improving.

    `save(tensors, progress)` is called by every rank every `train.checkpoint_every` steps and after
    each validation; the tensors are those that train, for it to copy. `resume` is what an earlier
    `save` was given. With `world` > 1 a process group is expected.

    Raises:
        UserError: loss or weights are not finite, or the validation day measures nothing. All
            ranks raise it at the same step.
    """
    batches = PairBatches(settings, paths, rank, world, device)
    sample = ValidationSample.draw(settings, paths)
    tuner = Finetuner(settings, model, device, rank, world)
    state = Progress()
    if resume is not None:
        tuner.load_state(resume[0])
        state = resume[1]
    train = settings.train
    total = min(train.max_steps or 10**12, train.epochs * batches.steps_per_epoch)
    if rank == 0:
        log.info(
            "finetune: %d steps of %d pairs (%d an epoch), validation on %d queries, %d products",
            total,
            train.batch_size,
            batches.steps_per_epoch,
            len(sample.queries),
            len(sample.products),
        )
    pending: list[dict[str, torch.Tensor]] = []
    spoken = time.perf_counter()
    share = 0.0
    tuner.model.train()
    clock = time.perf_counter()
    for batch in batches.stream(state.step, 0 if _waited_enough(state, train) else total):
        share = _same_on_all_ranks(
            progress(train, state.step, total, state.seconds), train.max_minutes, world
        )
        if share >= 1:
            break
        metrics, v_q, v_p = tuner.encoder_step(batch.to(device), state.step, share)
        state.step += 1
        if settings.adversary.form != "off" and state.step % settings.adversary.k == 0:
            metrics |= tuner.domain_step(v_q, v_p)
        now = time.perf_counter()
        state.seconds += now - clock
        metrics["seconds"] = torch.tensor(now - clock, device=device)
        clock = now
        pending.append(metrics)
        if rank == 0 and now - spoken > SECONDS_BETWEEN_LINES:
            _say(pending, state, total, share, train.batch_size)
            spoken = now
        if state.step % train.validate_every == 0 or state.step == total:
            _collect(pending, state, world)
            _validate(tuner, sample, batches.inputs, state)
            save(tuner.state(), state)
            clock = spoken = time.perf_counter()
            if _waited_enough(state, train):
                if rank == 0:
                    log.info("finetune: no better for %d validations, stops", state.since_best)
                return state
        elif state.step % train.checkpoint_every == 0:
            _collect(pending, state, world)
            save(tuner.state(), state)
    if not state.validations or state.validations[-1]["step"] != state.step:
        _collect(pending, state, world)
        _validate(tuner, sample, batches.inputs, state)
        save(tuner.state(), state)
    return state


def _waited_enough(state: Progress, train: TrainSettings) -> bool:
    return state.since_best >= train.patience


def _same_on_all_ranks(share: float, max_minutes: float | None, world: int) -> float:
    """Rank 0's view where the clock counts: the learning rate must not differ between ranks."""
    if max_minutes is None or world == 1:
        return share
    value = torch.tensor([share])
    if dist.get_backend() == "nccl":
        value = value.cuda()
    dist.broadcast(value, 0)
    return float(value)


def _collect(pending: list[dict[str, torch.Tensor]], state: Progress, world: int) -> None:
    """Bring the pending steps' metrics, averaged over the ranks, into the history."""
    if not pending:
        return
    values = torch.stack([v.float() for metrics in pending for v in metrics.values()])
    if world > 1:
        dist.all_reduce(values)
        values /= world
    of = iter(values.tolist())
    first = state.step - len(pending) + 1
    rows = [
        {"step": step, **{name: next(of) for name in metrics}}
        for step, metrics in enumerate(pending, first)
    ]
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise _not_finite("loss", int(row["step"]))
    state.add_steps(rows)
    pending.clear()


def _not_finite(what: str, step: int) -> UserError:
    return UserError(
        f"finetune: the {what} is not finite after step {step}. Lower --train.lr, raise "
        "--train.warmup_steps, or set --train.precision fp32"
    )


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
        "finetune: step %d of %d, loss %.3f, in-batch accuracy %.3f, %.0f pairs/s (%.0f %% of the "
        "matrix peak, %.1f %% waiting for data), %.0f s left",
        state.step,
        total,
        np.mean([float(row["loss"]) for row in rows]),
        np.mean([float(row["accuracy"]) for row in rows]),
        len(rows) * batch_size / seconds,
        100 * np.nanmean([float(row["peak_share"]) for row in rows]),
        100 * sum(float(row["seconds_data"]) for row in rows) / seconds,
        state.seconds * (1 - share) / share if share else float("nan"),
    )


def _validate(
    tuner: Finetuner, sample: ValidationSample, inputs: InputStore, state: Progress
) -> None:
    """Measure and note."""
    start = time.perf_counter()
    queries, products = encode_sample(tuner, sample, inputs)
    if not (np.isfinite(queries).all() and np.isfinite(products).all()):  # equal on all ranks
        raise _not_finite("embeddings", state.step)
    measured = sample.measure(queries, products)
    value = measured[tuner.settings.train.valid_metric]
    if np.isnan(value):
        raise UserError(
            f"--train.valid_metric {tuner.settings.train.valid_metric}: the validation day has "
            "no search to measure it on (no clicks, or no row that was not clicked)"
        )
    if value > state.best:
        state.best, state.best_step, state.since_best = value, state.step, 0
    else:
        state.since_best += 1
    state.validations.append({"step": state.step, "seconds": state.seconds, **measured})
    if tuner.rank == 0:
        log.info(
            "finetune: step %d, validation GAUC %.4f, Recall@100 of the sample %.4f%s (%.1f s)",
            state.step,
            measured["gauc"],
            measured["recall_100"],
            ", best so far" if state.best_step == state.step else "",
            time.perf_counter() - start,
        )
    tuner.model.train()


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
