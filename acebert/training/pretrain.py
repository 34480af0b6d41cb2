"""The 'pretrain' stage: CE-BERT on Ray Train, from a BERT to a checkpoint for fine-tuning.

What it writes is a Hugging Face directory (config, weights with heads, tokenizer), so it is also a
`model.backbone` for another catalogue.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from acebert.config import Settings
from acebert.data.features import FeatureStore
from acebert.data.tokens import backbone_digest, load_tokenizer, special_ids
from acebert.models.encoder import HOT_QUERY, TITLE, load_backbone
from acebert.models.pretraining import CEBertForPreTraining, start_pretraining
from acebert.tracking import Run
from acebert.training.checkpoint import Checkpoints, load_progress, load_tensors
from acebert.training.harness import trained_stage
from acebert.training.pairs import StagePaths
from acebert.training.pretrain_loop import run
from acebert.training.record import write_record
from acebert.training.steps import Rank
from acebert.workdir import Stage

VERSION = 6
MODEL_SETTINGS = {
    *("backbone", "layers", "width", "heads", "dropout"),
    *("patches", "pixels", "pooling"),
}
"""leaves of `model` that pre-training reads; the others are fine-tuning's alone. Among these is
image_attention_bias: photos that hardly enter teach nothing"""


def pretrain(settings: Settings, ingested: Stage, tokens: Stage, features: Stage | None) -> Stage:
    """Pre-train and write the checkpoint directory (docs/architecture.md, pretrain).

    Raises:
        UserError: the cluster lacks the CPUs or GPUs asked for, the catalogue is smaller than a
            batch, or the loss is not finite.
    """
    stages = {"ingest": ingested, "tokens": tokens, "features": features}
    key: dict[str, Any] = {
        "version": VERSION,
        **{name: stage.digest for name, stage in stages.items() if stage},
        "model": settings.model.model_dump(include=MODEL_SETTINGS),
        "pretrain": settings.pretrain.model_dump(),
        "train": settings.train.model_dump(include={"precision", "max_grad_norm"}),
    }
    if settings.model.backbone is not None:
        key["backbone"] = backbone_digest(settings.model.backbone)
    paths = StagePaths(ingested.path, tokens.path, features.path if features else None)

    config, export = {"paths": paths}, partial(_export, settings, paths)
    return trained_stage(settings, "pretrain", key, _worker, config, export, ingested.digest)


def new_model(settings: Settings, paths: StagePaths) -> CEBertForPreTraining:
    """CE-BERT with its heads at the start weights, sized to the vocabulary and the features."""
    model = settings.model
    features = FeatureStore(paths.features) if paths.features else None
    encoder = load_backbone(
        model.backbone,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        dropout=model.dropout,
        vocab_size=len(load_tokenizer(paths.tokens / "tokenizer")),
        sep_token_id=special_ids(paths.tokens / "tokenizer")["sep"],
        patch_dim=features.patch_dim if features and model.patches else 0,
        pixel_side=features.pixel_side if features and model.pixels else 0,
        pooling=model.pooling,
        seed=settings.pretrain.seed,
    )
    return start_pretraining(encoder, model.backbone, settings.pretrain.seed)


def _worker(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    run(settings, config["paths"], new_model(settings, config["paths"]), rank)


def _export(
    settings: Settings, paths: StagePaths, checkpoints: Checkpoints, mlrun: Run, out: Path
) -> None:
    """The directory of the last checkpoint: pre-training uses its budget up."""
    last = checkpoints.newest()
    assert last is not None
    progress = load_progress(last)
    model = new_model(settings, paths)
    segments = model.ce_bert.embeddings.token_type_embeddings.weight
    from_backbone = settings.model.backbone is not None
    learned = from_backbone and not torch.equal(segments[HOT_QUERY], segments[TITLE])
    model.load_state_dict(load_tensors(last, torch.device("cpu"))["model"])
    if not (settings.pretrain.queries or learned):  # never seen, so it starts as the title's
        with torch.no_grad():
            segments[HOT_QUERY] = segments[TITLE]
    transformers_logging.disable_progress_bar()  # one file
    model.save_pretrained(out)
    shutil.copytree(paths.tokens / "tokenizer", out, dirs_exist_ok=True)
    report = {
        "texts": progress.step * settings.pretrain.batch_size,
        "held_out": progress.validations[-1],
    }
    write_record(out, settings, progress, mlrun, report)
