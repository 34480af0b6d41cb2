"""The 'finetune' stage: fine-tuning on Ray Train, from start weights to a model directory.

The run's name is the stage's digest, so a job that was stopped and is started again goes on from
its last checkpoint, in the same MLflow run. Workers write checkpoints after each validation; the
metrics of the steps before it go to MLflow together with it, so none is ever logged twice.
"""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.train
import torch
import yaml
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from acebert.config import Settings, settings_from
from acebert.data.features import FeatureStore
from acebert.data.tokens import backbone_digest, load_tokenizer, special_ids
from acebert.errors import UserError
from acebert.job import set_up_logging
from acebert.models.dual import DualEncoder
from acebert.tracking import Run, log_model, metrics_actor, start_run
from acebert.training.finetuner import Finetuner
from acebert.training.loop import Progress, run
from acebert.training.pairs import StagePaths
from acebert.workdir import Stage, digest_of, run_stage

log = logging.getLogger(__name__)

VERSION = 1
SETTINGS_THAT_MATTER = ("model", "text", "loss", "adversary", "train")
"""sections whose every leaf can change the weights; the other sections act through their stage"""


def finetune(
    settings: Settings, ingested: Stage, tokens: Stage, features: Stage | None, plan: Stage
) -> Stage:
    """Train the dual encoder and write its model directory (docs/architecture.md, finetune).

    Raises:
        UserError: the cluster lacks the CPUs or GPUs asked for, or the loss is not finite.
    """
    stages = {"ingest": ingested, "tokens": tokens, "features": features, "plan": plan}
    key: dict[str, Any] = {
        "version": VERSION,
        "seed": settings.seed,
        **{name: stage.digest for name, stage in stages.items() if stage},
        **{name: getattr(settings, name).model_dump() for name in SETTINGS_THAT_MATTER},
        "image": [settings.image.pixel_source] if features else None,
    }
    if settings.model.backbone is not None:
        key["backbone"] = backbone_digest(settings.model.backbone)
    paths = StagePaths(ingested.path, tokens.path, features.path if features else None, plan.path)

    def build(out: Path) -> None:
        name = digest_of(key)
        with start_run(settings, "finetune", name, tags={"acebert.data": ingested.digest}) as mlrun:
            best, final = _fit(settings, paths, name, mlrun)
            _export(settings, paths, best, final, mlrun.run_id, out)
            for artifact in ("settings.yaml", "report.json", "history.parquet", "valid.parquet"):
                mlrun.log_artifact(out / artifact)
            log_model(settings, mlrun, out)
        shutil.rmtree(_storage(settings) / name, ignore_errors=True)

    return run_stage(settings.workdir, "finetune", key, build)


def new_model(settings: Settings, paths: StagePaths) -> DualEncoder:
    """The dual encoder at its start weights, sized to the vocabulary and the stored features."""
    features = FeatureStore(paths.features) if paths.features else None
    return DualEncoder.new(
        settings.model,
        vocab_size=len(load_tokenizer(paths.tokens / "tokenizer")),
        sep_token_id=special_ids(paths.tokens / "tokenizer")["sep"],
        patch_dim=features.patch_dim if features and settings.model.patches else 0,
        pixel_side=features.pixel_side if features and settings.model.pixels else 0,
        gamma=settings.loss.gamma,
        gamma_learned=settings.loss.gamma_learned,
        seed=settings.seed,
    )


def _storage(settings: Settings) -> Path:
    return settings.workdir / "train"


def _fit(settings: Settings, paths: StagePaths, name: str, mlrun: Run) -> tuple[Path, Path]:
    """Run the trainer; directories of the best and of the last checkpoint."""
    train = settings.train
    cpus, use_gpu = _resources(settings)
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type]
        train_loop_config={
            "settings": settings.model_dump(mode="json"),
            "paths": paths,
            "actor": metrics_actor(settings),
            "mlflow_run": mlrun.run_id,
        },
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(_storage(settings)),
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=train.valid_metric
            ),
        ),
    )
    result: Any = trainer.fit()  # Train V2's Result; the annotation names V1's
    if result.return_value is not None:
        raise UserError(result.return_value)
    best = result.get_best_checkpoint(train.valid_metric, "max")
    return Path(best.path), Path(result.checkpoint.path)


def _resources(settings: Settings) -> tuple[float, bool]:
    """CPUs a worker, and whether each takes a GPU; refuses what the cluster can never give."""
    total = ray.cluster_resources()
    workers = settings.train.num_workers
    gpus, cpus = total.get("GPU", 0), total.get("CPU", 0)
    use_gpu = gpus > 0 if settings.train.use_gpu is None else settings.train.use_gpu
    if use_gpu and gpus < workers:
        raise UserError(
            f"--train.num_workers {workers}: the cluster has {gpus:.0f} GPUs. Ask for fewer "
            "workers, or train on CPUs with --train.use_gpu false"
        )
    share = settings.train.cpus_per_worker or round(0.9 * cpus / workers, 2)
    if share * workers > cpus:
        raise UserError(
            f"--train.cpus_per_worker {share}: {workers} workers of these do not fit the cluster's "
            f"{cpus:.0f} CPUs"
        )
    return share, use_gpu


def _worker(config: dict[str, Any]) -> str | None:
    """One rank, inside Ray Train. Returns the message of a UserError: to raise it here would have
    Ray restart what cannot succeed."""
    set_up_logging()
    settings = settings_from(config["settings"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) // context.get_local_world_size()
        torch.set_num_threads(settings.train.threads_per_worker or max(1, cores))
    model = new_model(settings, config["paths"])
    actor, mlflow_run = config["actor"], config["mlflow_run"]

    def save(tuner: Finetuner, progress: Progress, is_best: bool) -> None:
        metrics = progress.validations[-1]
        if rank > 0:
            ray.train.report(metrics)
            return
        actor.log.remote(mlflow_run, _rows_since_last_validation(progress))
        with tempfile.TemporaryDirectory() as directory:
            write_state(Path(directory), tuner, progress)
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))

    try:
        run(
            settings,
            config["paths"],
            model,
            device=device,
            rank=rank,
            world=world,
            save=save,
            resume=_last_state(device),
        )
    except UserError as error:
        return str(error)
    return None


def _last_state(device: torch.device) -> tuple[dict[str, Any], Progress] | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as directory:
        state, progress = read_state(Path(directory), device)
    log.info("finetune: resumes after step %d", progress.step)
    return state, progress


def write_state(directory: Path, tuner: Finetuner, progress: Progress) -> None:
    """Everything that resuming needs: state.pt, model.safetensors beside its config, histories."""
    torch.save(tuner.state(), directory / "state.pt")
    tuner.model.save(directory)
    counters = {name: getattr(progress, name) for name in ("step", "seconds", "best", "since_best")}
    (directory / "progress.json").write_text(json.dumps(counters))
    pq.write_table(pa.Table.from_pylist(progress.history), directory / "history.parquet")
    pq.write_table(pa.Table.from_pylist(progress.validations), directory / "valid.parquet")


def read_state(directory: Path, device: torch.device) -> tuple[dict[str, Any], Progress]:
    state = torch.load(directory / "state.pt", map_location=device, weights_only=True)
    counters = json.loads((directory / "progress.json").read_text())
    histories = {
        name: pq.read_table(directory / f"{file}.parquet").to_pylist()
        for name, file in (("history", "history"), ("validations", "valid"))
    }
    return state, Progress(**counters, **histories)


def _rows_since_last_validation(progress: Progress) -> list[tuple[str, float, int]]:
    since = int(progress.validations[-2]["step"]) if len(progress.validations) > 1 else 0
    rows = [
        (f"train/{name}", value, int(row["step"]))
        for row in progress.history[since:]
        for name, value in row.items()
        if name != "step" and value is not None
    ]
    last = progress.validations[-1]
    step = int(last["step"])
    return rows + [(f"valid/{name}", v, step) for name, v in last.items() if name != "step"]


def _export(
    settings: Settings, paths: StagePaths, best: Path, final: Path, run_id: str, out: Path
) -> None:
    """The model directory: weights of the best validation, history of the whole run."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy2(best / name, out / name)
    shutil.copytree(paths.tokens / "tokenizer", out / "tokenizer")
    for name in ("history.parquet", "valid.parquet"):
        shutil.copy2(final / name, out / name)
    tree = settings.model_dump(mode="json")
    (out / "settings.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    history = pq.read_table(out / "history.parquet")
    validations = pq.read_table(out / "valid.parquet").to_pylist()
    chosen = max(validations, key=lambda row: row[settings.train.valid_metric])
    report = {
        "mlflow_run": run_id,
        "steps": history.num_rows,
        "pairs": history.num_rows * settings.train.batch_size,
        "train_seconds": validations[-1]["seconds"],
        "best": chosen,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
