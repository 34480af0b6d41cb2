"""The 'finetune' stage: fine-tuning on Ray Train, from start weights to a model directory.

The run is named by the stage's digest, so a job that was stopped and is started again goes on from
its newest checkpoint, in the same MLflow run (`acebert.training.harness`).
"""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from acebert.config import HOW_IT_RUNS, Settings
from acebert.data.features import FeatureStore
from acebert.data.tokens import backbone_digest, load_tokenizer, special_ids
from acebert.errors import UserError
from acebert.models.dual import DualEncoder
from acebert.training.checkpoint import (
    Checkpoints,
    Progress,
    load_progress,
    load_tensors,
    why_broken,
)
from acebert.training.harness import trained_stage
from acebert.training.loop import run
from acebert.training.pairs import StagePaths
from acebert.training.record import write_record
from acebert.training.steps import Rank
from acebert.workdir import Stage

if TYPE_CHECKING:
    from acebert.tracking import Run

log = logging.getLogger(__name__)

VERSION = 5
SETTINGS_THAT_MATTER = ("model", "text", "loss", "adversary")
"""sections whose leaves can change the weights; the other sections act through their stage"""
BY_THEIR_STAGE = {"hard_negative_ranks", "hard_negatives_from"}
"""leaves of them that do so too"""


def finetune(
    settings: Settings,
    ingested: Stage,
    tokens: Stage,
    features: Stage | None,
    plan: Stage,
    pretrained: Stage | None = None,
    mined: Stage | None = None,
) -> Stage:
    """Train the dual encoder and write its model directory (docs/architecture.md, finetune).

    Args:
        pretrained: the CE-BERT that it starts from, where `model.start` says so
        mined: products near the queries (`acebert.evaluation.mine`), where `loss.hard_negatives`
            wants some

    Raises:
        UserError: the cluster lacks the CPUs or GPUs asked for, or the loss is not finite.
        ValueError: `model.start` and `pretrained`, or `loss.hard_negatives` and `mined`, do not
            fit.
    """
    if bool(settings.loss.hard_negatives) != (mined is not None):
        raise ValueError(f"loss.hard_negatives is {settings.loss.hard_negatives}, mined is {mined}")
    if (settings.model.start == "pretrain") != (pretrained is not None):
        raise ValueError(f"model.start is {settings.model.start!r}, pretrained is {pretrained}")
    stages = {"ingest": ingested, "tokens": tokens, "features": features, "plan": plan}
    key: dict[str, Any] = {
        "version": VERSION,
        "seed": settings.seed,
        **{name: stage.digest for name, stage in stages.items() if stage},
        **{
            name: getattr(settings, name).model_dump(exclude=BY_THEIR_STAGE)
            for name in SETTINGS_THAT_MATTER
        },
        "train": settings.train.model_dump(exclude=set(HOW_IT_RUNS)),
        "image": [settings.image.pixel_source] if features else None,
    }
    if settings.model.backbone is not None:
        key["backbone"] = backbone_digest(settings.model.backbone)
    if pretrained is not None:
        key["pretrain"] = pretrained.digest
    if mined is not None:
        key["hard_negatives"] = mined.digest
    config = {
        "paths": StagePaths(
            ingested.path,
            tokens.path,
            features.path if features else None,
            plan.path,
            mined.path if mined else None,
        ),
        "start": pretrained.path if pretrained else None,
    }

    export = partial(_export, settings, config)
    return trained_stage(settings, "finetune", key, _worker, config, export, ingested.digest)


def new_model(settings: Settings, paths: StagePaths, start: Path | None = None) -> DualEncoder:
    """The dual encoder at its start weights, sized to the vocabulary and the stored features.

    `start` is the directory of a pre-trained CE-BERT; none: the weights of `model.backbone`.
    """
    model = settings.model
    if start is not None:
        model = model.model_copy(update={"backbone": str(start)})
    features = FeatureStore(paths.features) if paths.features else None
    return DualEncoder.new(
        model,
        vocab_size=len(load_tokenizer(paths.tokens / "tokenizer")),
        sep_token_id=special_ids(paths.tokens / "tokenizer")["sep"],
        patch_dim=features.patch_dim if features and model.patches else 0,
        pixel_side=features.pixel_side if features and model.pixels else 0,
        gamma=settings.loss.gamma,
        gamma_learned=settings.loss.gamma_learned,
        seed=settings.seed,
    )


def _worker(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    run(settings, config["paths"], new_model(settings, config["paths"], config["start"]), rank)


def _export(
    settings: Settings, config: dict[str, Any], checkpoints: Checkpoints, mlrun: "Run", out: Path
) -> None:
    """The model directory: weights of the best validation whose checkpoint is whole, history of
    the whole run."""
    from acebert.tracking import log_model  # MLflow, which workers do not need

    paths: StagePaths = config["paths"]
    last = checkpoints.newest()
    assert last is not None
    progress = load_progress(last)
    chosen = best_whole(checkpoints, progress, settings.train.valid_metric)
    best = checkpoints.at(int(chosen["step"]))
    model = new_model(settings, paths, config["start"])
    model.load_state_dict(load_tensors(best, torch.device("cpu"))["model"])
    model.save(out)
    shutil.copytree(paths.tokens / "tokenizer", out / "tokenizer")
    report = {"pairs": progress.step * settings.train.batch_size, "best": chosen}
    write_record(out, settings, progress, mlrun, report)
    log_model(settings, mlrun, out)


def best_whole(checkpoints: Checkpoints, progress: Progress, metric: str) -> dict[str, float]:
    """The validation of the best checkpoint that is whole. Few are kept beside the best; that it
    is torn is said.

    Raises:
        UserError: there is none.
    """
    rows = sorted(
        progress.validations,
        key=lambda row: (row["step"] == progress.best_step, row[metric], row["gauc"]),
        reverse=True,
    )
    for row in rows:
        path = checkpoints.at(int(row["step"]))
        broken = why_broken(path)
        if broken is None:
            return row
        if row is rows[0]:
            log.warning("%s, the best checkpoint, is passed over for the next: %s", path, broken)
    raise UserError(
        f"{checkpoints.directory}: no checkpoint of a validation is whole. Remove it to train from "
        "the start"
    )
