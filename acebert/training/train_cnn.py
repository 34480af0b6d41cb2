"""The 'cnn' stage: the patch CNN trained on the catalogue itself, on Ray Train.

    stage = train_cnn(settings, ingested, crops, labels)  # stage.path / "cnn.safetensors"

For photos that are far from ImageNet's, and for machines that reach no hub. What it writes is a
file for `image.cnn_weights`; `trained` there has the pipeline make it first.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from acebert.config import Settings, weights_digest
from acebert.data.cnn_labels import PhotoLabels
from acebert.data.features import FeatureStore
from acebert.data.patches import PatchCNN, best_device
from acebert.models.tagging import TaggingCNN
from acebert.tracking import Run
from acebert.training.checkpoint import Checkpoints, load_progress, load_tensors
from acebert.training.cnn_batches import CNNPaths, PhotoBatches
from acebert.training.cnn_figure import draw_held_out
from acebert.training.cnn_loop import run
from acebert.training.cnn_validation import HeldOutPhotos, word_precision
from acebert.training.harness import trained_stage
from acebert.training.record import write_record
from acebert.training.steps import Rank
from acebert.workdir import Stage

VERSION = 2
WEIGHTS = "cnn.safetensors"


def crop_settings(settings: Settings) -> Settings:
    """Settings with which preprocessing stores what the CNN trains on: the RoIs as JPEGs, a little
    larger than it reads them, for crops of crops."""
    stored = {
        "pixel_source": "roi",
        "pixel_side": settings.cnn.side * 5 // 4,
        "pixel_format": "jpeg",
    }
    crops_alone = {"patches": False, "pixels": True}
    return settings.model_copy(
        update={
            "image": settings.image.model_copy(update=stored),
            "model": settings.model.model_copy(update=crops_alone),
        }
    )


def train_cnn(settings: Settings, ingested: Stage, crops: Stage, labels: Stage) -> Stage:
    """Train the CNN and write its directory (docs/architecture.md, cnn).

    Args:
        settings: `image.cnn` is the CNN, `cnn` says how
        ingested: for titles in the picture
        crops: 'features' by `crop_settings`
        labels: 'cnn_labels'

    Raises:
        UserError: no such CNN or start weights, the cluster lacks the CPUs or GPUs asked for, there
            are fewer photos than a batch has, or the loss is not finite.
    """
    image, own = settings.image, settings.cnn
    key: dict[str, Any] = {
        "version": VERSION,
        "crops": crops.digest,
        "labels": labels.digest,
        "cnn": own.model_dump() | {"start": weights_digest(own.start)},
        "image": image.model_dump(include={"cnn", "cnn_side"}),
        "train": settings.train.model_dump(include={"precision", "max_grad_norm"}),
    }
    paths = CNNPaths(crops.path, labels.path)

    config, export = {"paths": paths}, partial(_export, settings, ingested, paths)
    return trained_stage(settings, "cnn", key, _worker, config, export, ingested.digest)


def new_model(settings: Settings, labels: PhotoLabels) -> TaggingCNN:
    """The CNN at its start weights, with heads for these labels."""
    share = labels.tag_products / len(labels.category)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.cnn.seed)
        return TaggingCNN(_start(settings), len(labels.categories), share)


def _start(settings: Settings) -> PatchCNN:
    image = settings.image
    return PatchCNN(image.cnn, settings.cnn.start, image.cnn_side, setting="cnn.start")


def _worker(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    batches = PhotoBatches(settings.cnn, config["paths"], rank.rank, rank.world)
    run(settings, batches, new_model(settings, batches.labels), rank)


def _export(
    settings: Settings,
    ingested: Stage,
    paths: CNNPaths,
    checkpoints: Checkpoints,
    mlrun: Run,
    out: Path,
) -> None:
    """What the last checkpoint holds: its backbone, and what it says of the held-out photos."""
    last = checkpoints.newest()
    assert last is not None
    progress = load_progress(last)
    labels = PhotoLabels(paths.labels)
    model = new_model(settings, labels)
    model.load_state_dict(load_tensors(last, torch.device("cpu"))["model"])
    backbone = {name: t.contiguous() for name, t in model.backbone.state_dict().items()}
    save_file(backbone, out / WEIGHTS)
    report = {
        "cnn": settings.image.cnn,
        "start": settings.cnn.start,
        "photos": progress.step * settings.cnn.batch_size,
        "held_out": progress.validations[-1],
    }
    write_record(out, settings, progress, mlrun, report)

    held_out = HeldOutPhotos(FeatureStore(paths.crops), labels)
    bf16 = settings.train.precision == "bf16"
    said = held_out.predict(model.to(best_device()), settings.image.cnn_side, bf16=bf16)
    precision = word_precision(said.tags, held_out.named)
    words = {
        "word": labels.tags,
        "products": labels.tag_products,
        "held_out": held_out.named.sum(0),
        "average_precision": [precision.get(tag) for tag in range(len(labels.tags))],
    }
    pq.write_table(pa.table(words), out / "words.parquet")
    draw_held_out(
        held_out, said, labels, _titles(ingested, held_out.products), out / "held_out.png"
    )


def _titles(ingested: Stage, products: np.ndarray) -> list[str]:
    """Titles of product rows, ascending."""
    import pyarrow.dataset as ds

    parts = sorted((ingested.path / "products").glob("part-*.parquet"))
    rows = ds.dataset(parts).to_table(
        columns=["product", "title"], filter=ds.field("product").isin(pa.array(products))
    )
    return rows.sort_by("product")["title"].to_pylist()
