"""A trial of a sweep: the fine-tuning job as it stands, and the stages that trials share.

A trial calls what ray_jobs/finetune.py calls, in a process of its own, and Ray Train's workers hang
below it. So its result is an ordinary 'finetune' stage: the same settings run alone train the same
model, or find it there, and a trial that was stopped goes on from its last checkpoint.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import ReportCallback
from ray.tune.integration.ray_train import TuneReportCallback

from acebert.config import Settings
from acebert.data.partitions import count_pairs
from acebert.data.plan_arithmetic import Layout, layout_of
from acebert.data.tokens import backbone_digest
from acebert.errors import UserError, reason_of
from acebert.pipeline import (
    before_finetuning,
    catalogue_stages,
    finetune_stage,
    ingest_stage,
    pretrain_stage,
)
from acebert.sweep.space import Space, Trial, corner_trials, trials_of
from acebert.tracking import shared
from acebert.training import finetune
from acebert.training.validation import K
from acebert.workdir import Stage, digest_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What a sweep needs to know before its first trial."""

    identity: str
    """of what the trials share and the settings do not tell: the data, the version of the stage"""
    trials: list[Trial]
    """to run; none where the search finds them itself"""


def prepare(base: Settings, space: Space) -> Prepared:
    """Check every point against the data, then build the stages that trials share, each once.

    Points that make the same mini-batches (values of n/(P·W) that round to one P) are one point.

    Raises:
        UserError: a metric that tells no trial from another on this data, a point with more
            partitions than batches (paper section 4.3: P ≤ n/W), or what the stages of every trial
            raise.
    """
    ingested = ingest_stage(shared(base))
    _check_metric(space, base, ingested)
    pairs = count_pairs(ingested.path / "pairs.parquet")
    if space.search == "optuna":  # it chooses between these, whose stages are all that it needs
        before, trials = _before_any_plan, corner_trials(space)
        for trial in trials:
            _layout(pairs, trial, base)
    else:
        before, trials = _before, _distinct(trials_of(space, base), pairs, base)
    failed: list[Exception] = []
    stages: list[Stage | None] = [ingested]
    for trial in trials:
        try:
            stages += before(trial.settings(base))
        except Exception as error:  # the trial will meet it again, and be noted as failed
            reason = reason_of(error)
            log.warning("sweep: what comes before %s cannot be made: %s", trial.name, reason)
            failed.append(error)
    if len(failed) == len(trials):
        raise failed[0]
    return Prepared(_identity(stages, trials, base), [] if space.search == "optuna" else trials)


def _before(settings: Settings) -> list[Stage | None]:
    made = before_finetuning(settings)
    data = made.data
    return [data.tokens, data.features, made.planned, made.pretrained, made.mined]


def _before_any_plan(settings: Settings) -> list[Stage | None]:
    settings = shared(settings)
    data = catalogue_stages(settings)
    pretrained = pretrain_stage(settings) if settings.model.start == "pretrain" else None
    return [data.tokens, data.features, pretrained]


def _distinct(trials: Sequence[Trial], pairs: int, base: Settings) -> list[Trial]:
    """Of trials that make the same batches, the first."""
    seen: dict[str, Trial] = {}
    for trial in trials:
        layout = _layout(pairs, trial, base)
        others = {k: v for k, v in trial.point.items() if not k.startswith("plan.")}
        first = seen.setdefault(repr((others, layout)), trial)
        if first is not trial:
            log.info("sweep: %s makes the batches of %s: left out", trial.name, first.name)
    return list(seen.values())


def _check_metric(space: Space, base: Settings, ingested: Stage) -> None:
    """
    Raises:
        UserError: the validation day of this data cannot measure it.
    """
    report = _read(ingested.path / "report.json")
    day = report["splits"]["valid"]
    if space.metric == "gauc" and day["rows"] == day["clicks"]:
        raise UserError(
            "metric: gauc needs products that were shown and not clicked, and the validation day "
            "has none; take recall_100 (and --train.valid_metric recall_100)"
        )
    samples = [trial.settings(base).train.valid_products for trial in corner_trials(space)]
    products = min(report["products"]["rows_kept"], *samples)
    if space.metric == "recall_100" and products <= K:
        raise UserError(
            f"metric: recall_100 of {products} products finds them all, whatever the trial; take "
            "gauc (and --train.valid_metric gauc), or more --train.valid_products"
        )


def _identity(stages: Iterable[Stage | None], trials: Sequence[Trial], base: Settings) -> str:
    """Of what is in the files that the settings only name."""
    backbones = {name for trial in trials if (name := trial.settings(base).model.backbone)}
    return digest_of(
        {
            "finetune": finetune.VERSION,
            "stages": sorted({stage.digest for stage in stages if stage}),
            "backbones": [backbone_digest(name) for name in sorted(backbones)],
        }
    )


def _layout(pairs: int, trial: Trial, base: Settings) -> Layout:
    settings = trial.settings(base)
    plan = settings.plan
    try:
        return layout_of(
            pairs,
            settings.train.batch_size,
            plan.partitions,
            settings.seed,
            plan.batches_per_partition,
        )
    except UserError as error:
        raise UserError(f"{trial.name}: {error}") from error


def train(settings: Settings) -> dict[str, Any]:
    """The objective of a trial: fine-tune, and say what came out.

    Returns:
        gauc, recall_100: of the validation sample, at the best step
        step, best_step: encoder steps; train_seconds
        partitions, batches_per_partition (n/(P·W)), hard_share: of the plan
        model: the model directory; mlflow_run; reused: whether it was there already
    """
    # Trainings among them have validations of their own, which are nothing to Tune.
    before_finetuning(settings)
    os.environ["RAY_TRAIN_CALLBACKS"] = f"{__name__}.{ReportToTune.__name__}"
    try:
        model = finetune_stage(settings)
    finally:
        del os.environ["RAY_TRAIN_CALLBACKS"]
    report = _read(model.path / "report.json")
    plan_digest = _read(model.path / "stage.json")["key"]["plan"]
    plan = _read(settings.workdir / "plan" / plan_digest / "report.json")
    best = report["best"]
    return {
        "gauc": best["gauc"],
        "recall_100": best["recall_100"],
        "step": report["steps"],
        "best_step": best["step"],
        "train_seconds": report["train_seconds"],
        "partitions": plan["partitions"],
        "batches_per_partition": plan["pairs"] / (plan["partitions"] * plan["batch_size"]),
        "hard_share": plan["hard_share"],
        "model": str(model.path),
        "mlflow_run": report["mlflow_run"],
        "reused": model.reused,
    }


def _read(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text())
    return tree


class ReportToTune(ReportCallback):
    """Hands each validation of Ray Train's workers to Ray Tune.

    Ray makes it by its name, in RAY_TRAIN_CALLBACKS: fine-tuning knows nothing of sweeps. That
    takes one of Train's own callbacks; Tune's is the public one, so it is called from here.
    """

    def __init__(self) -> None:
        self.tune = TuneReportCallback()

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        self.tune.after_report(None, metrics, None)  # type: ignore[arg-type]
