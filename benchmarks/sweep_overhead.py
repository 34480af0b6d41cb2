"""What a trial costs besides its training, by part; and two trials at once against one by one.

    python benchmarks/sweep_overhead.py [--trials 4] [--at-once 1 2] [settings]

Fine-tunes a tiny demo catalogue `--trials` times for each number of trials at once, all from
scratch, in a work directory that is removed. The parts are read off the clock where a trial passes:
the sweep's callbacks, the trial's process, its MLflow run and the validations logged in it.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from acebert.cluster import connect
from acebert.config import Settings, load_settings
from acebert.job import run_job
from acebert.sweep import training
from acebert.sweep.placement import place
from acebert.sweep.space import Space, Trial
from acebert.sweep.trials import Outcome, run_trials
from acebert.tracking import client

TINY = [
    *["--recipe", "twinbert_tiny", "--demo.products", "200", "--demo.searches_per_day", "500"],
    *["--train.batch_size", "32", "--train.max_steps", "20", "--train.validate_every", "10"],
]
PARTS = {
    "start": "Tune: start, next trial",
    "process": "trial's process: start (the first), imports",
    "stages": "stages looked up, MLflow run",
    "train": "Train: workers, imports, model; first validation and checkpoint",
    "steps": "training, later validations",
    "export": "Train's end, model directory, MLflow model",
    "end": "Tune: end noted",
}


def timed(settings: Settings) -> dict[str, Any]:
    """A trial that says when its process began and ended work."""
    entered = time.time()
    result = training.train(settings)
    return {**result, "entered": entered, "left": time.time()}


def measure(settings: Settings, trials: int, at_once: int) -> tuple[list[dict[str, float]], float]:
    """Seconds of each trial by part, and of all trials together."""
    space = Space(vary={"loss.gamma": list(range(10, 10 + trials))}, trials_at_once=at_once)
    at_once, base = place(settings, space.trials_at_once, "--at-once")
    ready = training.prepare(settings, space)
    started: dict[str, float] = {}
    ended: dict[str, tuple[float, Outcome]] = {}

    def on_start(trial: Trial) -> None:
        started[trial.digest] = time.time()

    def on_end(outcome: Outcome) -> None:
        ended[outcome.trial.digest] = time.time(), outcome

    begin = time.time()
    storage = settings.workdir / "tune"
    run_trials(
        space, base, ready.trials, [], timed, on_start, on_end, at_once=at_once, storage=storage
    )
    total = time.time() - begin
    # When the place of each trial came free, in the order in which they started.
    free = [begin] * at_once + sorted(end for end, _ in ended.values())
    rows = []
    for place_free, (digest, start) in zip(free, started.items(), strict=False):
        end, outcome = ended[digest]
        if outcome.status != "finished":
            raise SystemExit(f"{outcome.trial.name}: {outcome.reason}")
        rows.append(parts(settings, place_free, start, end, outcome))
    return rows, total


def parts(
    settings: Settings, free: float, started: float, end: float, outcome: Outcome
) -> dict[str, float]:
    result, mlflow = outcome.result, client(settings)
    run = mlflow.get_run(result["mlflow_run"]).info
    logged = mlflow.get_metric_history(run.run_id, "valid/seconds")
    logged.sort(key=lambda metric: metric.step)
    first_step = logged[0].timestamp / 1000 - logged[0].value
    stamps = [
        *(free, started, result["entered"], run.start_time / 1000),
        *(first_step, logged[-1].timestamp / 1000, result["left"], end),
    ]
    return dict(zip(PARTS, np.diff(stamps).tolist(), strict=True))


def work(arguments: argparse.Namespace) -> None:
    table = Table(title="seconds a trial: the first / median of the others", title_justify="left")
    table.add_column("part")
    columns = []
    for at_once in arguments.at_once:
        workdir = Path(tempfile.mkdtemp(prefix="sweep-"))
        own = load_settings([*TINY, *arguments.settings, "--workdir", str(workdir)])
        connect()
        try:
            columns.append(measure(own, arguments.trials, at_once))
        finally:
            shutil.rmtree(workdir, ignore_errors=True)
        table.add_column(f"{at_once} at once", justify="right")
    for name, words in PARTS.items():
        table.add_row(words, *(_cell([row[name] for row in rows]) for rows, _ in columns))
    overhead = [[sum(row.values()) - row["steps"] for row in rows] for rows, _ in columns]
    table.add_row("all but training", *map(_cell, overhead), style="bold")
    table.add_row(f"all {arguments.trials} trials", *(f"{total:.1f}" for _, total in columns))
    Console(width=100).print(table)


def _cell(values: list[float]) -> str:
    return f"{values[0]:.1f} / {np.median(values[1:] or values):.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2])
    run_job(work, __doc__, parser)
