"""Training goes on after any death as if nothing had happened: real processes, really killed.

Every disturbed run is compared with one that nobody disturbed, of two workers: weights and losses
bit for bit, and the metric history of its one MLflow run, step by step. Where the number of workers
is another, dropout is too: there is none then, and losses agree within rounding.
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


@pytest.fixture(scope="module", autouse=True)
def impatience() -> Iterator[None]:
    """Ray Train looks at its workers four times a second, and asks for others soon where a dead
    node was still counted on; by default two seconds and a minute pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
        yield


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
def dropping(long: Settings) -> Settings:
    """With dropout, of which the same number of workers alone draws the same, and with each
    worker's 16 pairs in two parts, whose random numbers start anew in each (gradient caching)."""
    model = long.model.model_copy(update={"dropout": 0.1})
    return with_train(long.model_copy(update={"model": model}), micro_batch=8)


@pytest.fixture(scope="module")
def undisturbed(long: Settings, data: dict[str, Stage]) -> Stage:
    return finetune(of_its_own(long, 0), **data)


@pytest.fixture(scope="module")
def undisturbed_dropping(dropping: Settings, data: dict[str, Stage]) -> Stage:
    return finetune(of_its_own(dropping, 0), **data)


def differences(stage: Stage, undisturbed: Stage) -> list[str]:
    """Which weights, losses and validations are not, bit for bit, those of the undisturbed."""
    ours, theirs = (load_file(s.path / "model.safetensors") for s in (stage, undisturbed))
    found = sorted(ours.keys() ^ theirs.keys())
    found += [n for n in ours.keys() & theirs.keys() if not torch.equal(ours[n], theirs[n])]
    for file, columns in (
        ("history.parquet", ["step", "loss", "adversary", "domain_loss", "grad_norm", "lr"]),
        ("valid.parquet", ["step", "gauc", "recall_100"]),
    ):
        ours, theirs = (pq.read_table(s.path / file, columns=columns) for s in (stage, undisturbed))
        found += [f"{file}: {name}" for name in columns if not ours[name].equals(theirs[name])]
    return found


def faults_in_mlflow(settings: Settings, stage: Stage) -> list[str]:
    """What keeps it from being one finished run with every step, and each number of the stage's
    tables once."""
    steps = pq.read_table(stage.path / "history.parquet")["step"].to_pylist()
    mlflow = client(settings)
    found = mlflow.search_runs(
        [mlflow.get_experiment_by_name(settings.tracking.experiment).experiment_id],
        f"tags.`acebert.digest` = '{stage.digest}'",
    )
    if [run.info.status for run in found] != ["FINISHED"]:
        return [f"the runs are {[run.info.status for run in found]}"]
    faults = [] if steps == list(range(1, len(steps) + 1)) else [f"the steps are {steps}"]
    for prefix, file in (("train", "history.parquet"), ("valid", "valid.parquet")):
        table = pq.read_table(stage.path / file)
        for name in table.column_names[1:]:
            column = zip(table["step"].to_pylist(), table[name].to_pylist(), strict=True)
            logged = mlflow.get_metric_history(found[0].info.run_id, f"{prefix}/{name}")
            if sorted((m.step, m.value) for m in logged) != [
                (step, value) for step, value in column if value is not None
            ]:
                faults.append(f"{prefix}/{name}")
    return faults


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


def done_again(stage: Stage, before: Progress) -> list[int]:
    """Steps before the death that were done once more: their seconds are not those of then."""
    then = before.history.select(["step", "seconds"]).to_pylist()
    now = pq.read_table(stage.path / "history.parquet", columns=["step", "seconds"]).to_pylist()
    return [row["step"] for row in then if row not in now]


def steps_of(stage: Stage) -> int:
    return pq.read_metadata(stage.path / "history.parquet").num_rows


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


def test_a_killed_worker_costs_nothing(
    dropping: Settings, data: dict[str, Stage], undisturbed_dropping: Stage
):
    """Not even one of the failures allowed, for there is a checkpoint."""
    settings, known = with_train(of_its_own(dropping, 1), max_failures=0), runs(dropping)
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(finetune, settings, **data)
        before = checkpoint_after(settings, known, 12)
        victims = workers_below(psutil.Process())
        assert len(victims) == 2
        victims[-1].kill()
        stage = done.result()
    assert 0 < before.step < steps_of(stage)
    assert done_again(stage, before) == []
    assert differences(stage, undisturbed_dropping) == []
    assert faults_in_mlflow(settings, stage) == []


@contextmanager
def job(settings: Settings, *extra: str, address: str | None = None) -> Iterator[subprocess.Popen]:
    """`ray_jobs/finetune.py` in a process of its own, with a Ray of its own or in a cluster."""
    recipe = settings.workdir / f"patience-{settings.train.patience}.yaml"
    recipe.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude={"recipe"})))
    env = os.environ | ({"RAY_ADDRESS": address} if address else {})
    process = subprocess.Popen(
        [sys.executable, "ray_jobs/finetune.py", "--recipe", str(recipe), *extra],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_ctrl_c,
    )
    try:
        yield process
    finally:
        end(process, signal.SIGKILL)


def hear_ctrl_c() -> None:
    """Tests that run in the background of a shell start with SIGINT ignored, and so would a job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen, how: signal.Signals) -> None:
    """Send a signal and wait until the process and all that it started are gone."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    process.send_signal(how)
    process.wait(60)
    _, left = psutil.wait_procs(below, timeout=10)
    for agent in left:  # some of Ray's outlive a killed driver by a minute
        agent.kill()
    psutil.wait_procs(left, timeout=10)


def finished(process: subprocess.Popen, settings: Settings) -> tuple[Stage, str]:
    """The stage that a job leaves, whose path is the last line that it prints, and all of those."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    path = Path(out.splitlines()[-1])
    assert path.parent == settings.workdir / "finetune"
    return Stage("finetune", path, path.name, seconds=0.0, reused=False), out


def test_a_job_that_is_killed_then_stopped_goes_on_when_it_is_started_again(
    dropping: Settings, data: dict[str, Stage], undisturbed_dropping: Stage
):
    settings, known = of_its_own(dropping, 2), runs(dropping)
    with job(settings) as first:
        killed = checkpoint_after(settings, known, 12)
        end(first, signal.SIGKILL)
    (run,) = runs(settings) - known
    for how in (signal.SIGINT, signal.SIGTERM):
        written = max(int(path.name[5:13]) for path in (run / "checkpoints").glob("step-*"))
        with job(settings) as second:
            stopped = checkpoint_after(settings, known, written + 1)
            end(second, how)
            assert second.stdout is not None
            said = second.stdout.read()
        assert second.returncode == 130, said  # 128 + SIGINT, as shells have it
        assert "stopped; give the same command again, what is done is reused" in said
    with job(settings) as third:
        stage, _ = finished(third, settings)
    assert 0 < killed.step < stopped.step < steps_of(stage)
    assert done_again(stage, killed) == []
    assert done_again(stage, stopped) == []
    assert differences(stage, undisturbed_dropping) == []
    assert faults_in_mlflow(settings, stage) == []


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """A cluster's head that only drives, and asks twice a second whether the nodes live."""
    often = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 500}
    arguments = {"num_cpus": 0, "include_dashboard": False, "_system_config": often}
    made = Cluster(initialize_head=True, head_node_args=arguments)
    yield made
    made.shutdown()


@pytest.fixture
def cluster(head: Cluster) -> Cluster:
    """The head with two nodes of one CPU, those that a test before has left among them."""
    while len(head.worker_nodes) < 2:
        head.add_node(num_cpus=1)
    return head


def kill_a_node(cluster: Cluster) -> None:
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


@pytest.mark.slow
def test_a_killed_node_costs_nothing_once_there_is_another(
    dropping: Settings, data: dict[str, Stage], undisturbed_dropping: Stage, cluster: Cluster
):
    settings, known = of_its_own(dropping, 3), runs(dropping)
    with job(settings, "--train.cpus_per_worker=1", address=cluster.address) as driver:
        before = checkpoint_after(settings, known, 12)
        kill_a_node(cluster)
        cluster.add_node(num_cpus=1)
        stage, _ = finished(driver, settings)
    assert 0 < before.step < steps_of(stage)
    assert done_again(stage, before) == []
    assert differences(stage, undisturbed_dropping) == []
    assert faults_in_mlflow(settings, stage) == []


def largest_difference(stage: Stage, undisturbed: Stage) -> float:
    """Of the losses, as a share: another number of workers rounds otherwise."""
    ours, theirs = (
        pq.read_table(s.path / "history.parquet")["loss"].to_numpy() for s in (stage, undisturbed)
    )
    return float(np.abs(ours / theirs - 1).max()) if len(ours) == len(theirs) else np.inf


@pytest.mark.slow
def test_training_goes_on_with_the_workers_that_are_left(
    long: Settings, data: dict[str, Stage], undisturbed: Stage, cluster: Cluster
):
    settings, known = of_its_own(long, 4), runs(long)
    least = ("--train.cpus_per_worker=1", "--train.min_workers=1")
    with job(settings, *least, address=cluster.address) as driver:
        before = checkpoint_after(settings, known, 12)
        kill_a_node(cluster)
        stage, said = finished(driver, settings)
    assert "the nodes have room for 1 of 2 workers: goes on with fewer" in said
    assert 0 < before.step < steps_of(stage)
    assert done_again(stage, before) == []
    assert largest_difference(stage, undisturbed) < 2e-3
    assert faults_in_mlflow(settings, stage) == []


@pytest.mark.slow
def test_four_workers_go_on_for_two_whose_driver_was_killed_in_a_living_cluster(
    long: Settings, data: dict[str, Stage], undisturbed: Stage, cluster: Cluster
):
    settings, known = of_its_own(long, 5), runs(long)
    with job(settings, "--train.cpus_per_worker=1", address=cluster.address) as driver:
        before = checkpoint_after(settings, known, 12)
        end(driver, signal.SIGKILL)
    four = ("--train.num_workers=4", "--train.cpus_per_worker=0.5")
    with job(settings, *four, address=cluster.address) as driver:
        stage, _ = finished(driver, settings)
    assert 0 < before.step < steps_of(stage)
    assert done_again(stage, before) == []
    assert largest_difference(stage, undisturbed) < 2e-3
    assert faults_in_mlflow(settings, stage) == []
