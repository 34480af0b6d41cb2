"""Training goes on after any death as if nothing had happened: real processes, really killed.

Every disturbed run is compared with one that nobody disturbed, of two workers: weights and losses
bit for bit, and the metric history of its one MLflow run, step by step.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from acebert.config import Settings
from acebert.data.partitions import plan
from acebert.tracking import client
from acebert.training.checkpoint import Progress, load_progress
from acebert.training.finetune import finetune
from acebert.workdir import Stage

ROOT = Path(__file__).parents[2]
TRAIN = {
    **{"epochs": 12, "num_workers": 2, "cpus_per_worker": 0.4, "threads_per_worker": 1},
    **{"checkpoint_every": 4, "validate_every": 40, "valid_searches": 50},
}


@pytest.fixture(scope="module")
def long(settings: Settings) -> Settings:
    return with_train(settings, **TRAIN)


@pytest.fixture(scope="module")
def data(long: Settings, stages: dict[str, Stage]) -> dict[str, Stage]:
    return {**stages, "plan": plan(long, stages["ingested"])}


def with_train(settings: Settings, **values: object) -> Settings:
    return settings.model_copy(update={"train": settings.train.model_copy(update=values)})


def of_its_own(settings: Settings, run: int) -> Settings:
    """Settings whose stage has another digest and the same result: nobody stops early here."""
    return with_train(settings, patience=1000 + run)


@pytest.fixture(scope="module")
def undisturbed(long: Settings, data: dict[str, Stage]) -> Stage:
    return finetune(of_its_own(long, 0), **data)


def assert_same(settings: Settings, stage: Stage, undisturbed: Stage) -> None:
    """Weights, losses, validations and MLflow's metric history are those of the undisturbed."""
    ours, theirs = (load_file(s.path / "model.safetensors") for s in (stage, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for file, columns in (
        ("history.parquet", ["step", "loss", "adversary", "domain_loss", "grad_norm", "lr"]),
        ("valid.parquet", ["step", "gauc", "recall_100"]),
    ):
        ours, theirs = (pq.read_table(s.path / file, columns=columns) for s in (stage, undisturbed))
        assert ours.equals(theirs), file
    assert_in_mlflow_once(settings, stage)


def assert_in_mlflow_once(settings: Settings, stage: Stage) -> None:
    """One run, and in it every step, and each number of the stage's tables once."""
    steps = pq.read_table(stage.path / "history.parquet")["step"].to_pylist()
    assert steps == list(range(1, len(steps) + 1))
    mlflow = client(settings)
    (run,) = mlflow.search_runs(
        [mlflow.get_experiment_by_name(settings.tracking.experiment).experiment_id],
        f"tags.`acebert.digest` = '{stage.digest}'",
    )
    assert run.info.status == "FINISHED"
    for prefix, file in (("train", "history.parquet"), ("valid", "valid.parquet")):
        table = pq.read_table(stage.path / file)
        for name in table.column_names[1:]:
            column = zip(table["step"].to_pylist(), table[name].to_pylist(), strict=True)
            logged = mlflow.get_metric_history(run.info.run_id, f"{prefix}/{name}")
            assert sorted((m.step, m.value) for m in logged) == [
                (step, value) for step, value in column if value is not None
            ], name


def wait_for(what: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def checkpoint_after(settings: Settings, known: set[Path], step: int) -> Progress:
    """Wait for a checkpoint of `step` or later in a run that is not one of `known`."""
    found: list[Progress] = []

    def look() -> bool:
        for path in runs(settings) - known:
            for checkpoint in sorted((path / "checkpoints").glob("step-*")):
                if int(checkpoint.name[5:13]) >= step:
                    try:
                        found.append(load_progress(checkpoint))
                    except FileNotFoundError:  # it was removed for newer ones
                        continue
                    return True
        return False

    wait_for(look)
    return found[0]


def runs(settings: Settings) -> set[Path]:
    return set((settings.workdir / "train").glob("finetune-*"))


def assert_went_on(stage: Stage, before: Progress) -> None:
    """The steps before the death were not done again: their seconds are those of then."""
    seconds = pq.read_table(stage.path / "history.parquet")["seconds"]
    known = before.history["seconds"]
    assert 0 < len(known) < len(seconds)
    assert seconds[: len(known)].to_pylist() == known.to_pylist()


def workers_below(process: psutil.Process) -> list[psutil.Process]:
    """Ray Train's workers that descend from a driver."""
    found = []
    for child in process.children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
def test_a_killed_worker_costs_nothing(long: Settings, data: dict[str, Stage], undisturbed: Stage):
    settings, known = of_its_own(long, 1), runs(long)
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(finetune, settings, **data)
        before = checkpoint_after(settings, known, 12)
        victims = workers_below(psutil.Process())
        assert len(victims) == 2
        victims[-1].kill()
        stage = done.result()
    assert_went_on(stage, before)
    assert_same(settings, stage, undisturbed)


@contextmanager
def job(settings: Settings, *extra: str, address: str | None = None) -> Iterator[subprocess.Popen]:
    """`ray_jobs/finetune.py` in a process of its own, with a Ray of its own or in a cluster."""
    recipe = settings.workdir / f"patience-{settings.train.patience}.yaml"
    recipe.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude={"recipe"})))
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if address is not None:
        env["RAY_ADDRESS"] = address
    process = subprocess.Popen(
        [sys.executable, "ray_jobs/finetune.py", "--recipe", str(recipe), *extra],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        end(process, signal.SIGKILL)


def end(process: subprocess.Popen, how: signal.Signals) -> None:
    """Send a signal and wait until the process and all that it started are gone."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    process.send_signal(how)
    psutil.wait_procs(below, timeout=60)
    process.wait(60)


def finished(process: subprocess.Popen, settings: Settings) -> Stage:
    """The stage that a job leaves, whose path is the last line that it prints."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    path = Path(out.splitlines()[-1])
    assert path.parent == settings.workdir / "finetune"
    return Stage("finetune", path, path.name, seconds=0.0, reused=False)


@pytest.mark.slow
def test_a_job_that_is_killed_then_stopped_goes_on_when_it_is_started_again(
    long: Settings, data: dict[str, Stage], undisturbed: Stage
):
    settings, known = of_its_own(long, 2), runs(long)
    with job(settings) as first:
        killed = checkpoint_after(settings, known, 12)
        end(first, signal.SIGKILL)
    with job(settings) as second:
        stopped = checkpoint_after(settings, known, killed.step + 30)
        end(second, signal.SIGTERM)
    assert second.returncode != 0
    with job(settings) as third:
        stage = finished(third, settings)
    assert_went_on(stage, killed)
    assert_went_on(stage, stopped)
    assert_same(settings, stage, undisturbed)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that only drives."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.mark.slow
def test_a_killed_node_costs_nothing_once_there_is_another(
    long: Settings, data: dict[str, Stage], undisturbed: Stage, cluster: Cluster
):
    settings, known = of_its_own(long, 3), runs(long)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    with job(settings, "--train.cpus_per_worker=1", address=cluster.address) as driver:
        before = checkpoint_after(settings, known, 12)
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        nodes.append(cluster.add_node(num_cpus=1))
        stage = finished(driver, settings)
    for node in nodes:
        cluster.remove_node(node)
    assert_went_on(stage, before)
    assert_same(settings, stage, undisturbed)


@pytest.mark.slow
def test_training_goes_on_with_the_workers_that_are_left(
    long: Settings, data: dict[str, Stage], undisturbed: Stage, cluster: Cluster
):
    settings, known = of_its_own(long, 4), runs(long)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    least = ("--train.cpus_per_worker=1", "--train.min_workers=1")
    with job(settings, *least, address=cluster.address) as driver:
        before = checkpoint_after(settings, known, 12)
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        stage = finished(driver, settings)
    cluster.remove_node(nodes.pop())
    assert_went_on(stage, before)
    ours, theirs = (pq.read_table(s.path / "history.parquet") for s in (stage, undisturbed))
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=2e-3)
    assert_in_mlflow_once(settings, stage)
