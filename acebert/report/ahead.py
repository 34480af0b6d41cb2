"""Trains rows of the report several at once, before they are measured in turn.

A training has a process of its own that drives it, as a trial of a sweep has: it needs no CPU, and
is on this node, where MLflow's sqlite is. What it leaves are ordinary stages, which
`acebert.report.run` finds.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from acebert.config import Settings, settings_from
from acebert.data.inputs import as_first_seen, seen
from acebert.errors import UserError, reason_of
from acebert.job import set_up_logging
from acebert.pipeline import finetune_stage, with_own_cnn
from acebert.sweep.placement import place
from acebert.sweep.run import NO_PART_OF_IT
from acebert.sweep.space import with_leaves
from acebert.tracking import server_environment, shared
from acebert.workdir import digest_of

log = logging.getLogger(__name__)

AT_ONCE = "--rows_at_once"
SHARE = ("cpus_per_worker", "threads_per_worker")
"""settings of `train` by which trainings side by side share the cluster"""
END_SECONDS = 20.0


@dataclass(frozen=True)
class Training:
    """One row with one seed.

    Attributes:
        row: its name
        settings: of the training
        miner: settings of the training whose model mines its negatives; None: its own
    """

    row: str
    settings: Settings
    miner: Settings | None = None

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.settings.seed}"

    @property
    def trains(self) -> str:
        """Digest of what is trained: rows of one model, cut or with BM25 or clicks, have one."""
        return digest_of(
            [
                settings and settings.model_dump(mode="json", exclude=NO_PART_OF_IT)
                for settings in (self.settings, self.miner)
            ]
        )


def each_once(trainings: Sequence[Training]) -> list[Training]:
    """Of those that train the same, the first."""
    found: dict[str, Training] = {}
    for training in trainings:
        found.setdefault(training.trains, training)
    return list(found.values())


def train_ahead(
    trainings: Sequence[Training], wanted: int | None, leave_out: Callable[[str, UserError], None]
) -> None:
    """Train, in this order and each once, as many at once as the cluster has room for; nothing
    where that is one, for they are then trained as they are measured.

    Args:
        wanted: trainings at once, as `acebert.sweep.placement.place` takes it
        leave_out: is called with each row that a training was for and the reason where it fails;
            those of such a row that have not begun are left out too

    Raises:
        UserError: `wanted` trainings do not fit the cluster.
    """
    if not trainings or wanted == 1:
        return
    at_once, placed = place(trainings[0].settings, wanted, AT_ONCE)
    if at_once == 1:
        return
    _train_cnns(trainings)
    share = {f"train.{leaf}": getattr(placed.train, leaf) for leaf in SHARE}
    to_do, running = each_once(trainings), dict[Any, Training]()
    total = len(to_do)
    began = time.perf_counter()
    try:
        while to_do or running:
            while to_do and len(running) < at_once:
                training = to_do.pop(0)
                log.info("report: %s starts", training.name)
                running[_start(training, share)] = training
            (done,), _ = ray.wait(list(running))
            ended = running.pop(done)
            if (reason := _reason(done)) is not None:
                failed = {one.row for one in trainings if one.trains == ended.trains}
                for row in sorted(failed):
                    leave_out(row, UserError(reason))
                to_do = [training for training in to_do if training.row not in failed]
            left = len(to_do) + len(running)
            minutes = (time.perf_counter() - began) / 60 * left / (total - left)
            log.info(
                "report: %s %s, %d left, about %.0f min at the pace so far",
                *(ended.name, "is trained" if reason is None else "failed", left, minutes),
            )
    finally:
        for driven in running:  # Ctrl-C: they end their runs in MLflow
            ray.cancel(driven)
        ray.wait(list(running), num_returns=len(running), timeout=END_SECONDS)


def _train_cnns(trainings: Sequence[Training]) -> None:
    """The patch CNN that rows share, with the whole cluster: with a share of it, what it learns in
    its minutes would be less, and the other rows would wait for it."""
    for row, settings in {training.row: training.settings for training in trainings}.items():
        try:
            with_own_cnn(shared(settings))
        except Exception as error:  # the training will meet it again, and its row be left out
            log.warning("report: the CNN of %s cannot be trained: %s", row, reason_of(error))


def _start(training: Training, share: dict[str, Any]) -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    own = with_leaves(training.settings, share).model_dump()
    miner = with_leaves(training.miner, share).model_dump() if training.miner else None
    driven = _drive.options(scheduling_strategy=here)
    return driven.remote(own, miner, os.getcwd(), server_environment(), seen())


@ray.remote(num_cpus=0, max_retries=0)
def _drive(
    tree: dict[str, Any],
    miner: dict[str, Any] | None,
    directory: str,
    environment: dict[str, str],
    inputs: dict[str, Any],
) -> str | None:
    """Train; why it failed, if it did."""
    set_up_logging()
    os.chdir(directory)  # relative paths in the settings start here
    # A cluster's workers have their own; and this one holds no GPU, if its node has some.
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    try:
        settings = settings_from(tree)
        torch.set_num_threads(settings.train.threads_per_worker or 1)  # for what it does itself
        with as_first_seen(inputs):
            if miner is not None:
                mined_by = finetune_stage(settings_from(miner)).path
                settings = with_leaves(settings, {"loss.hard_negatives_from": mined_by})
            finetune_stage(settings)
    except Exception as error:
        if not isinstance(error, UserError):
            log.exception("report: a training failed")
        return reason_of(error)
    return None


def _reason(done: Any) -> str | None:
    try:
        reason: str | None = ray.get(done)
    except (WorkerCrashedError, OutOfMemoryError):
        return "its process died (killed, or out of memory)"
    except RayError as error:
        return reason_of(error)
    return reason
