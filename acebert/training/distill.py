"""The 'distill' stage: a query-side student on Ray Train, from a teacher to a model directory."""

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from acebert.config import Settings
from acebert.models.dual import DualEncoder
from acebert.models.student import new_student
from acebert.training.checkpoint import Checkpoints, load_progress, load_tensors
from acebert.training.distill_loop import run
from acebert.training.distiller import Distiller
from acebert.training.harness import trained_stage
from acebert.training.record import write_record
from acebert.training.steps import Rank
from acebert.workdir import Stage

if TYPE_CHECKING:
    from acebert.tracking import Run

VERSION = 1


def student_layers(settings: Settings, teacher: Path) -> tuple[int, ...]:
    """How many layers each student has, whom the teacher can all have.

    Raises:
        UserError: it cannot.
    """
    model, own = DualEncoder.load(teacher), settings.distill
    has = (model.query_tower or model.tower).encoder.config.num_hidden_layers
    chosen = own.layers or tuple(range(1, min(3, has) + 1))
    for layers in chosen:
        new_student(model, layers, own.width)
    return chosen


def distill(settings: Settings, teacher: Path, layers: int, targets: Stage) -> Stage:
    """Train a student of `layers` layers and write its model directory: the teacher's product side
    and tokenizer, and a query side of its own (docs/architecture.md, distill).

    Args:
        settings: the teacher's own, with the `distill` section in use
        teacher: its model directory
        targets: what it says to texts

    Raises:
        UserError: the teacher has fewer layers, the cluster lacks the CPUs or GPUs asked for, or
            the loss is not finite.
    """
    own = settings.distill
    key: dict[str, Any] = {
        "version": VERSION,
        "targets": targets.digest,
        "student_layers": layers,
        "distill": own.model_dump(exclude={"layers", "titles", "texts"}),
        "train": settings.train.model_dump(include={"precision", "max_grad_norm"}),
    }
    new_student(DualEncoder.load(teacher), layers, own.width)  # refuses before Ray starts
    config = {"teacher": teacher, "layers": layers, "targets": targets.path}

    export, name = partial(_export, settings, config), f"distill {layers} layer{'s' * (layers > 1)}"
    return trained_stage(
        settings, "distill", key, _worker, config, export, targets.digest, name=name
    )


def _student(settings: Settings, config: dict[str, Any]) -> DualEncoder:
    own = settings.distill
    return new_student(DualEncoder.load(config["teacher"]), config["layers"], own.width, own.seed)


def _worker(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    trainer = Distiller(
        settings,
        config["targets"],
        config["teacher"] / "tokenizer",
        _student(settings, config),
        rank.device,
        rank.rank,
        rank.world,
    )
    run(trainer, rank)


def _export(
    settings: Settings, config: dict[str, Any], checkpoints: Checkpoints, mlrun: "Run", out: Path
) -> None:
    """The model directory of the last checkpoint: distillation uses its budget up."""
    last = checkpoints.newest()
    assert last is not None
    progress = load_progress(last)
    student = _student(settings, config)
    assert student.query_tower is not None
    student.query_tower.load_state_dict(load_tensors(last, torch.device("cpu"))["model"])
    student.save(out)
    shutil.copytree(config["teacher"] / "tokenizer", out / "tokenizer")
    report = {
        "teacher": str(config["teacher"]),
        "texts": progress.step * settings.distill.batch_size,
        "valid": progress.validations[-1],
    }
    write_record(out, settings, progress, mlrun, report)
