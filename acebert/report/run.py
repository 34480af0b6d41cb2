"""Trains and measures the report's rows: what is done is reused, what fails is left out by name.

A row's trainings are ordinary 'finetune' stages, so a report that was stopped goes on, and a model
that was trained before is found.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from acebert.config import Settings, weights_digest
from acebert.errors import UserError, reason_of
from acebert.evaluation.evaluate import BASELINES, evaluate_embeddings
from acebert.evaluation.tables import Row
from acebert.pipeline import (
    baselines_stage,
    evaluate_stage,
    finetune_stage,
    ingest_stage,
    model_settings,
    tracked,
)
from acebert.report.ahead import Training, train_ahead
from acebert.report.parts import SWEPT
from acebert.report.rival import sentence_transformers_stage
from acebert.report.rows import RIVAL, TWINBERT, UNTRAINED, ZERO_SHOT, System
from acebert.sweep.run import sweep
from acebert.sweep.space import read_space, with_leaves
from acebert.tracking import shared, tagged, without_password
from acebert.training.train_cnn import WEIGHTS

log = logging.getLogger(__name__)

MakeSettings = Callable[[System, int], Settings]
"""(system, seed) → its settings"""
UNTRAINED_PART = "table1"
"""the part in which rows stand that are not ours"""


@dataclass(frozen=True)
class Measured:
    """A row with its results, each a directory a seed.

    Attributes:
        row: name and result directories
        seeds: which they were trained with (none: not trained)
        models: model directories (none: not one of ours)
        embedded: directories of vectors (none: a row without any)
        seconds: of training, the mean over the seeds, with all that `trainings` finds; None: none
            needed
        pairs: fine-tuned on
        valid: GAUC and Recall@100 of the model (whole and by itself) on the validation day, the
            mean over the seeds, as far as there are any
        settings: of the first seed
        others: what else is told of how it was made, where it has no settings
    """

    row: Row
    seeds: tuple[int, ...] = ()
    models: tuple[Path, ...] = ()
    embedded: tuple[Path, ...] = ()
    seconds: float | None = None
    pairs: int | None = None
    valid: dict[str, float] = field(default_factory=dict)
    settings: Settings | None = None
    others: dict[str, str] = field(default_factory=dict)

    @property
    def one_seed(self) -> bool:
        """Trained, and with a single seed: what it measures may be that seed's luck."""
        return self.seconds is not None and len(self.row.seeds) == 1

    @property
    def start(self) -> int:
        """What its encoder starts from: 0 random weights, 1 a model's, 2 its own pre-training."""
        if self.settings is None:
            return int("model" in self.others)
        if self.settings.model.start == "pretrain":
            return 2
        return int(self.settings.model.backbone is not None)


@dataclass
class Results:
    """What was measured, by name, and what was left out, with the reason.

    Attributes:
        failed: what was left out though it was wanted
    """

    rows: dict[str, Measured] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def leave_out(self, name: str, error: Exception) -> None:
        if isinstance(error, UserError):
            log.warning("report: %s is left out: %s", name, error)
        else:
            log.exception("report: %s is left out", name)
        self.left_out[name] = without_password(reason_of(error))
        self.failed.append(name)


def measure_untrained(settings: Settings, results: Results) -> None:
    baselines = baselines_stage(tagged(settings, UNTRAINED_PART))
    for name in BASELINES:
        results.rows[UNTRAINED[name]] = Measured(Row(UNTRAINED[name], (baselines.path / name,)))


def measure_systems(
    wanted: dict[str, list[System]],
    seeds: Mapping[str, Sequence[int]],
    make: MakeSettings,
    results: Results,
    at_once: int | None = 1,
) -> None:
    """Train and measure the systems of each part, once each, with the seeds of the first part with
    the most seeds, of those that they stand in.

    A system that cannot be trained or measured is left out with the reason; the others go on.
    `at_once` trainings run at a time (None: as many as GPUs have room for).

    Raises:
        UserError: none of them could, or the cluster has no room for so many at once.
    """
    order: dict[System, list[str]] = {}
    for part, systems in wanted.items():
        for system in systems:
            order.setdefault(system, []).append(part)
    seeds_of = {
        system: max((seeds[part] for part in parts), key=len) for system, parts in order.items()
    }
    train_ahead(_trainings(seeds_of, make, results), at_once, results.leave_out)
    began, spent = time.perf_counter(), 0
    for number, (system, parts) in enumerate(order.items()):
        if system.name in results.left_out:
            continue
        log.info(
            "report: row %d of %d, %s%s",
            number + 1,
            len(order),
            system.name,
            f", about {(time.perf_counter() - began) / spent * (len(order) - number) / 60:.0f} min "
            "left at the pace so far"
            if spent
            else "",
        )
        try:
            measured, trained = _measure(system, parts, seeds_of[system], make)
        except Exception as error:
            results.leave_out(system.name, error)
            continue
        results.rows[system.name] = measured
        spent += trained
    if results.left_out and not any(system.name in results.rows for system in order):
        raise UserError(next(iter(results.left_out.values())))


def _trainings(
    seeds_of: Mapping[System, Sequence[int]], make: MakeSettings, results: Results
) -> list[Training]:
    """All seeds of the first system, then of the second: side by side, seeds have pre-trainings of
    their own, where systems would wait for one. A system whose settings cannot be made is left out.
    """
    found = []
    for system, seeds in seeds_of.items():
        try:
            found += [
                Training(
                    *(system.name, make(system, seed)),
                    make(system.miner, seed) if system.miner else None,
                )
                for seed in seeds
            ]
        except UserError as error:
            results.leave_out(system.name, error)
    return found


def _measure(
    system: System, parts: Sequence[str], seeds: Sequence[int], make: MakeSettings
) -> tuple[Measured, bool]:
    """The row, with an MLflow run in each of its parts; and whether anything had to be trained."""
    all_settings = [_settings(system, seed, make) for seed in seeds]
    models, embedded, evaluated = [], [], []
    for settings in all_settings:
        models.append(finetune_stage(settings))
        vectors, result = evaluate_stage(settings, models[-1].path)
        embedded.append(vectors.path)
        if system.part:
            own_row = result.path / system.part
            result = replace(result, path=own_row, digest=f"{result.digest}/{system.part}")
        own = model_settings(settings, models[-1].path)
        for part in parts:
            tracked(tagged(own, part), result, row=True)
        evaluated.append(result.path)
    of_seed = list(zip(models, all_settings, strict=True))
    reports = [_read(model.path / "report.json") for model in models]
    measured = Measured(
        Row(system.name, tuple(evaluated)),
        tuple(seeds),
        tuple(model.path for model in models),
        tuple(embedded),
        float(np.mean([sum(trainings(m.path, s.workdir).values()) for m, s in of_seed])),
        int(np.mean([report["pairs"] for report in reports])),
        _on_validation_day(reports),
        all_settings[0],
    )
    return measured, not all(model.reused for model in models)


def _on_validation_day(reports: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means of what the best checkpoints had; a log without negatives has no GAUC."""
    means = {
        metric: float(np.mean([report["best"][metric] for report in reports]))
        for metric in ("gauc", "recall_100")
    }
    return {metric: mean for metric, mean in means.items() if np.isfinite(mean)}


def _settings(system: System, seed: int, make: MakeSettings) -> Settings:
    settings = make(system, seed)
    if system.miner is None:
        return settings
    miner = finetune_stage(_settings(system.miner, seed, make)).path
    return with_leaves(settings, {"loss.hard_negatives_from": miner})


def trainings(model: Path, workdir: Path) -> dict[Path, float]:
    """Seconds of each training behind a model directory, by its own directory: fine-tuning, the
    pre-training that it starts from, the CNN that was trained for its patches, and the same of the
    model that mined its negatives."""
    found = {model: float(_read(model / "report.json")["train_seconds"])}
    key = _read(model / "stage.json")["key"]
    if "pretrain" in key:
        pretrained = workdir / "pretrain" / key["pretrain"]
        found[pretrained] = float(_read(pretrained / "report.json")["train_seconds"])
    if "features" in key:
        shown = _read(workdir / "features" / key["features"] / "stage.json")["key"]
        cnn = _trained_cnn(workdir, shown.get("cnn_weights"))
        if cnn is not None:
            found[cnn] = float(_read(cnn / "report.json")["train_seconds"])
    if "hard_negatives" in key:
        mined = _read(workdir / "hard_negatives" / key["hard_negatives"] / "stage.json")
        miner = workdir / "finetune" / mined["key"]["model"][0]
        if miner.is_dir():  # not one that came from elsewhere
            found |= trainings(miner, workdir)
    return found


@cache
def _trained_cnn(workdir: Path, weights: str | None) -> Path | None:
    """The 'cnn' stage that made weights of this SHA-256; None: none did."""
    made = (workdir / "cnn").glob(f"[!.]*/{WEIGHTS}")
    return next((path.parent for path in made if weights_digest(str(path)) == weights), None)


def measure_rival(
    make: MakeSettings, start: Path | None, seeds: Sequence[int], lr: float, results: Results
) -> None:
    """sentence-transformers as it comes and fine-tuned on as many pairs as TwinBERT, by whose
    settings; left out with the reason where no model is given or anything fails."""
    if start is None:
        why = "no model is given (--sentence_transformer DIR)"
        results.left_out |= {ZERO_SHOT: why, RIVAL: why}
        return
    twin = results.rows.get(TWINBERT.name, Measured(Row(TWINBERT.name, ())))
    for name, pairs, own_seeds in ((ZERO_SHOT, 0, [0]), (RIVAL, twin.pairs, seeds)):
        if pairs is None:
            results.left_out[name] = f"it trains on as many pairs as {TWINBERT.name}, left out too"
            continue
        log.info("report: %s", name)
        try:
            settings = make(TWINBERT, seeds[0])
            ingested = ingest_stage(shared(settings))
            stages = [
                sentence_transformers_stage(
                    settings.model_copy(update={"seed": seed}), ingested, start, pairs, lr
                )
                for seed in own_seeds
            ]
            rows = [evaluate_embeddings(settings, ingested, s.path, name) for s in stages]
            for seed, row in zip(own_seeds, rows, strict=True):
                rate = settings.train.model_copy(update={"lr": lr})
                own = settings.model_copy(update={"seed": seed, "train": rate})
                of_row = tagged(own, UNTRAINED_PART)
                tracked(of_row, row, row=True, name=f"{name}, seed {seed}")
        except Exception as error:
            results.leave_out(name, error)
            continue
        training = {"lr": f"{lr:g}", "batch_size": str(settings.train.batch_size)}
        reports = [_read(stage.path / "report.json") for stage in stages]
        results.rows[name] = Measured(
            Row(name, tuple(row.path for row in rows)),
            seeds=tuple(own_seeds) if pairs else (),
            seconds=float(np.mean([r["train_seconds"] for r in reports])) if pairs else None,
            pairs=pairs or None,
            others={"model": start.name, **(training if pairs else {})},
        )


def measure_partitions(
    make: MakeSettings,
    space: Path,
    seeds: Sequence[int],
    results: Results,
    at_once: int | None = None,
) -> Path | None:
    """The sweep of Fig. 5, its directory; left out with the reason where it fails."""
    try:
        settings = tagged(make(SWEPT, seeds[0]), "fig5")
        own = {"seeds": tuple(seeds), "trials_at_once": at_once}
        wanted = read_space(space).model_copy(update=own)
        swept = sweep(settings, space.stem, wanted, evaluate=True)
        trials = pq.read_table(swept / "trials.parquet", columns=["status", "reason"]).to_pylist()
        if not any(trial["status"] == "finished" for trial in trials):
            raise UserError(f"no trial finished: {trials[0]['reason']}")
    except Exception as error:
        results.leave_out("Figure 5", error)
        return None
    return swept


def _read(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text())
    return tree
