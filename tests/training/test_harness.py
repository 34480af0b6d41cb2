"""What becomes of a training whose ranks fail: toy workers in a real Ray Train."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch.distributed as dist
from ray.train import ControllerError, WorkerGroupError
from ray.util.state import list_actors

from acebert.config import Settings, load_settings
from acebert.errors import UserError
from acebert.tracking import Run
from acebert.training import harness
from acebert.training.checkpoint import Checkpoints, Progress
from acebert.training.harness import _mlflow_sender, _send_the_rest, trained_stage
from acebert.training.joining import JoiningBackend, JoiningConfig
from acebert.training.steps import Rank


def alone(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    if rank.rank == 1:
        raise UserError("the disk of this node is too small")
    dist.barrier()


def dies(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    os._exit(1)


def has_a_fault(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    raise ValueError("of our own making")


def has_no_room_for_its_message(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    (run,) = (settings.workdir / "train").iterdir()
    (run / "error.txt").touch()
    raise OSError("of a full disk")


def trains_nothing(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    return


def shows_a_line(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    record = logging.makeLogRecord({"msg": "trains"})
    lines = [handler.format(record) for handler in logging.getLogger().handlers]
    (settings.workdir / "lines.txt").write_text("\n".join(lines))


def nothing(*_: Any) -> None:
    raise AssertionError("there is nothing to export")


def exports(checkpoints: Checkpoints, run: Run, out: Path) -> None:
    (out / "model").touch()


def settings_with(workdir: Path, *more: str) -> Settings:
    return load_settings(["--workdir", str(workdir), "--train.cpus_per_worker", "0.4", *more])


@pytest.mark.slow
def test_what_one_rank_meets_alone_ends_the_training_with_its_message(
    tmp_path: Path, ray_cluster: None
) -> None:
    """The others wait for it in a collective, for hours by themselves."""
    settings = settings_with(tmp_path, "--train.num_workers", "2")
    start = time.monotonic()
    with pytest.raises(UserError, match="the disk of this node is too small"):
        trained_stage(settings, "toy", {"of": "alone"}, alone, {}, nothing, "data")
    assert time.monotonic() - start < 300


@pytest.mark.slow
def test_deaths_that_leave_no_checkpoint_end_it_with_their_number(
    tmp_path: Path, ray_cluster: None
) -> None:
    settings = settings_with(tmp_path, "--train.max_failures", "0")
    with pytest.raises(UserError, match=r"toy-\w+: workers died 1 times before the first check"):
        trained_stage(settings, "toy", {"of": "deaths"}, dies, {}, nothing, "data")


@pytest.mark.slow
def test_a_fault_of_the_code_ends_it_with_its_traceback(tmp_path: Path, ray_cluster: None) -> None:
    """And not as a death, which calls for another start."""
    settings = settings_with(tmp_path, "--train.max_failures", "0")
    with pytest.raises(WorkerGroupError, match=r"in has_a_fault[^$]*ValueError: of our own making"):
        trained_stage(settings, "toy", {"of": "fault"}, has_a_fault, {}, nothing, "data")


@pytest.mark.slow
def test_a_workers_line_has_the_time_of_day_and_comes_once(
    tmp_path: Path, ray_cluster: None
) -> None:
    settings = settings_with(tmp_path)
    trained_stage(settings, "toy", {"of": "line"}, shows_a_line, {}, exports, "data")
    (line,) = (tmp_path / "lines.txt").read_text().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d trains", line)


@pytest.mark.slow
def test_a_training_leaves_no_process_behind(tmp_path: Path, ray_cluster: None) -> None:
    """A report has a hundred of them."""
    before = {actor.actor_id for actor in list_actors(limit=1000)}
    settings = settings_with(tmp_path)
    trained_stage(settings, "toy", {"of": "processes"}, trains_nothing, {}, exports, "data")
    shared = {"_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker"}  # of the job
    deadline = time.monotonic() + 60
    while left := [
        actor.class_name
        for actor in list_actors(limit=1000)
        if actor.state != "DEAD" and actor.actor_id not in before
        if actor.class_name not in shared
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def without_network() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "none"


def dies_soon() -> None:
    """While it joins the others, or waits for them."""
    if ray.train.get_context().get_world_rank() == 1:
        threading.Timer(0.05, os._exit, (1,)).start()


class FailsAtFirst(JoiningBackend):
    def __init__(self) -> None:
        super().__init__()
        self.starts = 0

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        self.starts += 1
        if self.starts <= backend_config.failures:
            worker_group.execute(backend_config.fault)
        super().on_start(worker_group, backend_config)


@dataclass
class FailsAtFirstConfig(JoiningConfig):
    failures: int = 0
    fault: Callable[[], None] = without_network

    @property
    def backend_cls(self) -> type[FailsAtFirst]:
        return FailsAtFirst


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "failures", "told"),
    [(without_network, 1, None), (without_network, 2, "none$"), (dies_soon, 2, "")],
)
def test_workers_that_fail_while_they_join_are_started_again_and_hold_no_place(
    tmp_path: Path,
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
    failures: int,
    told: str | None,
) -> None:
    """All CPUs of the cluster, so that a place that stays taken would stop the next start."""
    config = partial(FailsAtFirstConfig, failures=failures, fault=fault)
    monkeypatch.setattr(harness, "JoiningConfig", config)
    cpus = ray.cluster_resources()["CPU"]
    settings = settings_with(tmp_path, "--train.max_failures", "1")
    share = settings.train.model_copy(update={"cpus_per_worker": cpus / 2, "num_workers": 2})
    settings = settings.model_copy(update={"train": share})
    job = partial(trained_stage, settings, "toy", {"of": "start"}, trains_nothing, {})
    if told is None:
        job(exports, "data")
    else:
        with pytest.raises(ControllerError, match=rf"each other, 2 times in a row: .*{told}"):
            job(nothing, "data")
    until = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < cpus:
        assert time.monotonic() < until, "a start that failed holds its place"
        time.sleep(0.5)


@pytest.mark.slow
def test_a_message_that_the_disk_had_no_room_for_ends_nothing_without_a_word(
    tmp_path: Path, ray_cluster: None
) -> None:
    settings = settings_with(tmp_path, "--train.max_failures", "1")
    worker = has_no_room_for_its_message
    with pytest.raises(WorkerGroupError, match="of a full disk"):
        trained_stage(settings, "toy", {"of": "room"}, worker, {}, nothing, "data")


@pytest.mark.slow
def test_a_node_with_other_code_than_the_jobs_does_not_train(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers are processes of their own, which this process's changes do not reach."""
    other = harness.code_identity() | {"acebert/models/dual.py": "of the job"}
    monkeypatch.setattr(harness, "code_identity", lambda: other)
    with pytest.raises(UserError, match=r"^node \S+ has another acebert/models/dual\.py than"):
        trained_stage(
            settings_with(tmp_path), "toy", {"of": "code"}, trains_nothing, {}, nothing, "data"
        )


def test_steps_that_are_made_while_mlflow_is_told_of_others_are_told_later(
    ray_cluster: None,
) -> None:
    import ray

    @ray.remote
    class Slow:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, run_id: str, table: pa.Table) -> None:
            time.sleep(1)
            self.steps += table["step"].to_pylist()

        def told(self) -> list[int]:
            return self.steps

    actor, progress = Slow.remote(), Progress()
    assert ray.get(actor.told.remote()) == []
    send = _mlflow_sender(actor, "run")
    progress.add_steps([{"step": 1, "loss": 2.0}])
    telling = threading.Thread(target=send, args=(progress,))
    telling.start()
    time.sleep(0.3)
    progress.add_steps([{"step": 2, "loss": 1.0}])  # as training does that goes on with it
    telling.join()
    send(progress)
    assert ray.get(actor.told.remote()) == [1, 2]


@pytest.mark.parametrize("refusals", [2, 4])
def test_a_training_whose_last_steps_mlflow_does_not_take_is_not_finished(
    ray_cluster: None, refusals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are sent four times."""
    import ray

    @ray.remote
    class Refuses:
        def __init__(self) -> None:
            self.asked, self.steps = 0, list[int]()

        def log(self, run_id: str, table: pa.Table) -> None:
            self.asked += 1
            if self.asked <= refusals:
                raise TimeoutError("the database is locked")
            self.steps += table["step"].to_pylist()

        def told(self) -> list[int]:
            return self.steps

    monkeypatch.setattr(harness, "MLFLOW_PAUSES", (0.0, 0.0, 0.0))
    actor, progress = Refuses.remote(), Progress()
    progress.add_steps([{"step": 1, "loss": 2.0}])
    send = _mlflow_sender(actor, "run")
    if refusals == 4:
        with pytest.raises(UserError, match=r"last metrics: .*the database is locked\. Give the"):
            _send_the_rest(send, progress)
    else:
        _send_the_rest(send, progress)
        assert ray.get(actor.told.remote()) == [1]
