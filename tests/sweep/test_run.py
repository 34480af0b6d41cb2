"""Sweeps of the toy through a real Ray Tune and a real MLflow."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from mlflow.entities import Run as MlflowRun
from optuna.study import Study

from acebert.config import Settings, load_settings
from acebert.data.inputs import as_first_seen, first_seen
from acebert.errors import UserError
from acebert.evaluation import evaluate as evaluate_module
from acebert.sweep import run as sweep_run
from acebert.sweep.children import Children
from acebert.sweep.placement import place
from acebert.sweep.records import Records
from acebert.sweep.run import sweep
from acebert.sweep.space import Space, Trial, drawn, trials_of, with_leaves
from acebert.sweep.training import Prepared
from acebert.sweep.trials import Outcome, _optuna, points_tried, run_trials
from acebert.tracking import client, start_run
from acebert.workdir import Stage

WIDE = {"loss.gamma": {"low": 1.5, "high": 90, "log": True}}


def runs(settings: Settings) -> list[MlflowRun]:
    mlflow = client(settings)
    experiment = mlflow.get_experiment_by_name(settings.tracking.experiment)
    return list(mlflow.search_runs([experiment.experiment_id], max_results=1000))


def statuses(settings: Settings) -> set[str]:
    return {run.info.status for run in runs(settings)}


@pytest.mark.parametrize(
    ("space", "within"),
    [
        (Space(vary={"loss.gamma": [5, 10, 20, 40, 80]}, seeds=(0, 1)), 1.0),
        (Space(vary=WIDE, search="random", points=30), 1.2),
        (Space(vary=WIDE, search="optuna", points=15, seeds=(0, 1)), 1.2),
    ],
    ids=["grid", "random", "optuna"],
)
def test_the_best_point_is_found_and_comes_out_as_a_recipe(
    space: Space, within: float, settings: Settings, toy, ray_cluster: None
):
    directory = sweep(settings, "toy", space, **toy.parts)
    recipe = load_settings(["--recipe", str(directory / "best.yaml")])
    assert toy.best / within <= recipe.loss.gamma <= toy.best * within
    table = pq.read_table(directory / "trials.parquet").to_pylist()
    assert len(table) == len(toy.calls(settings)) == (space.points or 5) * len(space.seeds)
    best = max(row["recall_100"] for row in table)
    assert recipe.loss.gamma in {row["loss.gamma"] for row in table if row["recall_100"] == best}
    assert statuses(settings) == {"FINISHED"}
    before = toy.calls(settings)
    assert sweep(settings, "toy", space, **toy.parts) == directory
    less = settings.data.model_copy(update={"memory_limit": "500MB"})
    other = settings.image.model_copy(update={"feature_cache": "node_memory"})
    elsewhere = settings.model_copy(update={"data": less, "image": other})
    assert sweep(elsewhere, "toy", space, **toy.parts) == directory
    assert toy.calls(settings) == before  # nothing is left to do


def test_failed_trials_are_reported_and_tried_again_and_the_others_go_on(
    settings: Settings, toy, ray_cluster: None, capsys: pytest.CaptureFixture[str]
):
    space = Space(vary={"loss.gamma": [1, 2, 3, 20]})
    directory = sweep(settings, "toy", space, **toy.parts)
    table = pq.read_table(directory / "trials.parquet").to_pylist()
    reasons = {row["loss.gamma"]: (row["status"], row["reason"]) for row in table}
    assert reasons == {
        1: ("failed", "its process died (killed, or out of memory)"),
        2: ("failed", "no such luck"),
        3: ("failed", "RuntimeError: line two"),
        20: ("finished", None),
    }
    assert "gamma=2 seed=0 failed: no such luck" in capsys.readouterr().out
    of = {run.info.run_name: run.info.status for run in runs(settings)}
    assert of == {
        "gamma=1 seed=0": "KILLED",  # died without a word: ended by the sweep
        "gamma=2 seed=0": "FAILED",
        "gamma=3 seed=0": "FAILED",
        "gamma=20 seed=0": "FINISHED",
        "sweep toy": "FAILED",
    }
    sweep(settings, "toy", space, **toy.parts)
    assert [gamma for gamma, _ in toy.calls(settings)] == [1, 2, 3, 20, 1, 2, 3]
    assert len(runs(settings)) == 5  # each goes on in its own run


def test_a_point_that_no_model_has_fails_and_the_search_goes_on(
    settings: Settings, toy, ray_cluster: None
):
    """Both ends of the range are divisible by four heads, most of what lies between is not."""
    space = Space(vary={"model.width": {"low": 32, "high": 64}}, search="optuna", points=6)
    directory = sweep(settings, "toy", space, **toy.parts)
    table = pq.read_table(directory / "trials.parquet").to_pylist()
    assert len(table) == 6
    failed = [row for row in table if row["model.width"] % 4]
    assert failed
    for row in table:
        assert row["status"] == ("failed" if row in failed else "finished")
        assert row not in failed or "is not divisible by heads 4" in row["reason"]


DRIVER = """
import sys
sys.path.insert(0, sys.argv[2])
from conftest import make_toy, prepare
from acebert.config import load_settings
from acebert.sweep.run import sweep
from acebert.sweep.space import Space
settings = load_settings(["--recipe", "acebert_tiny", "--workdir", sys.argv[1]])
space = Space.model_validate_json(sys.argv[3])
sweep(settings, "toy", space, prepare=prepare, train=make_toy())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda stop: stop.name
)
@pytest.mark.parametrize(
    "space",
    [
        Space(vary={"loss.gamma": [5, 10, 20, 40]}),
        Space(vary=WIDE, search="optuna", points=4),
    ],
    ids=["grid", "optuna"],
)
def test_a_stopped_sweep_goes_on_without_repeating_finished_trials(
    space: Space, stop: signal.Signals, settings: Settings, toy, ray_cluster: None
):
    if space.search == "optuna" and stop != signal.SIGKILL:
        pytest.skip("how it is stopped makes no difference to the search")
    workdir = settings.workdir
    argv = [sys.executable, "-c", DRIVER, str(workdir), str(Path(__file__).parent)]
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen([*argv, space.model_dump_json()], env=env, preexec_fn=hear_ctrl_c)
    try:
        wait_for(lambda: (workdir / "calls.txt").exists() and len(toy.calls(settings)) >= 2, driver)
        (workdir / "slow").touch()
        wait_for((workdir / "waits").exists, driver)
        driver.send_signal(stop)
        driver.wait(200)
    finally:
        driver.kill()
        driver.wait()
    if stop != signal.SIGKILL:  # it had the time to end its runs
        assert "RUNNING" not in statuses(settings)
    (workdir / "slow").unlink()
    cut_off = toy.calls(settings)[-1]
    sweep(settings, "toy", space, **toy.parts)
    assert statuses(settings) == {"FINISHED"}
    started = toy.calls(settings)
    assert len(set(started)) == 4  # the points that were asked for
    assert len(started) == 5
    assert started.count(cut_off) == 2
    assert len(runs(settings)) == 5  # one a trial, and the sweep's


def hear_ctrl_c() -> None:
    """Tests that run in the background of a shell start with SIGINT ignored, and so would this."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, driver: subprocess.Popen) -> None:
    for _ in range(1200):
        if condition():
            return
        assert driver.poll() is None, "the sweep ended by itself"
        time.sleep(0.1)
    pytest.fail("nothing happened for two minutes")


def test_asha_stops_trials_that_are_behind_and_ends_their_runs_and_removes_their_checkpoints(
    settings: Settings, toy, ray_cluster: None
):
    def train(settings: Settings) -> dict[str, object]:
        import time

        from ray import tune

        from acebert.tracking import start_run

        value = 1 / settings.loss.gamma
        gamma = str(settings.loss.gamma)
        (settings.workdir / "train" / f"finetune-{gamma}" / "checkpoints").mkdir(parents=True)
        with start_run(settings, "finetune", gamma) as run:
            for step in range(1, 5):
                tune.report({"recall_100": value, "step": step})
                time.sleep(0.2)
            return {"recall_100": value, "step": 4, "mlflow_run": run.run_id}

    space = Space(vary={"loss.gamma": [1, 2, 3]}, asha={"first_rung": 2, "reduction": 2})
    directory = sweep(settings, "toy", space, prepare=toy.prepare, train=train)
    table = pq.read_table(directory / "trials.parquet").to_pylist()
    assert [(r["loss.gamma"], r["status"], r["step"]) for r in table] == [
        (1, "finished", 4),
        (2, "stopped", 2),
        (3, "stopped", 2),
    ]
    of = {run.info.run_name: run.info.status for run in runs(settings)}
    kept = {path.name for path in (settings.workdir / "train").iterdir()}
    assert kept == {"finetune-1.0"}  # fine-tuning removes those of a trial that finished itself
    assert of["gamma=1 seed=0"] == "FINISHED"
    assert "RUNNING" not in of.values()


def test_trials_carry_one_tag_one_parent_and_the_numbers_to_compare(
    settings: Settings, toy, ray_cluster: None
):
    space = Space(vary={"loss.gamma": [10, 20]}, seeds=(0, 1))
    sweep(settings, "toy", space, **toy.parts)
    by_name = {run.info.run_name: run for run in runs(settings)}
    parent = by_name.pop("sweep toy")
    assert set(by_name) == {f"gamma={g} seed={s}" for g in (10, 20) for s in (0, 1)}
    for run in by_name.values():
        assert run.data.tags["table"] == "toy"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert {"best/gauc", "best/recall_100"} <= set(run.data.metrics)
        assert run.data.params["loss.gamma"] in {"10.0", "20.0"}
    assert "table" not in parent.data.tags  # the table is of trials alone
    assert parent.data.metrics["best/recall_100"] == pytest.approx(0.5005)  # mean of both seeds


def test_trials_track_where_the_sweep_does_though_the_cluster_knows_no_such_server(
    settings: Settings, toy, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'elsewhere.db'}")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pa55-w0rd")

    run_toy = toy.train

    def train(settings: Settings) -> dict[str, Any]:
        assert os.environ["MLFLOW_TRACKING_PASSWORD"].startswith("pa55")  # not all: it is pickled
        return run_toy(settings)

    space = Space(vary={"loss.gamma": [10, 20]})
    directory = sweep(settings, "toy", space, prepare=toy.prepare, train=train)
    assert "failed" not in pq.read_table(directory / "trials.parquet")["status"].to_pylist()
    assert {run.info.run_name for run in runs(settings)} == {
        *("sweep toy", "gamma=10 seed=0", "gamma=20 seed=0")
    }
    assert not (settings.workdir / "mlflow.db").exists()
    files = [path for path in settings.workdir.rglob("*") if path.is_file()]
    assert not [path for path in files if b"pa55-w0rd" in path.read_bytes()]


def test_a_model_that_another_sweep_trained_is_a_row_of_this_one_too(
    settings: Settings, toy, ray_cluster: None, caplog: pytest.LogCaptureFixture
):
    with start_run(settings, "finetune", "elsewhere") as other:
        pass
    elsewhere = other.run_id

    def train(settings: Settings) -> dict[str, object]:
        return {"recall_100": 0.4, "mlflow_run": elsewhere, "reused": True}

    caplog.set_level("INFO", logger="acebert")
    space = Space(vary={"loss.gamma": [10, 20]})
    sweep(settings, "toy", space, prepare=toy.prepare, train=train)
    assert "gamma=10 seed=0 was trained before, " in caplog.text
    assert "min left" not in caplog.text  # no trial has told how long one takes
    row = next(run for run in runs(settings) if run.info.run_name == "gamma=10 seed=0")
    assert row.data.tags["acebert.trained_by"] == elsewhere
    assert row.data.tags["table"] == "toy"
    assert row.data.metrics["best/recall_100"] == pytest.approx(0.4)
    assert "table" not in client(settings).get_run(elsewhere).data.tags


def test_a_model_that_was_trained_for_another_mlflow_is_a_row_of_this_one(
    settings: Settings, toy, ray_cluster: None
):
    def train(settings: Settings) -> dict[str, object]:
        return {"recall_100": 0.4, "mlflow_run": "0" * 32, "reused": True}

    space = Space(vary={"loss.gamma": [10]})
    directory = sweep(settings, "toy", space, prepare=toy.prepare, train=train)
    (trial,) = pq.read_table(directory / "trials.parquet").to_pylist()
    assert (trial["status"], trial["reason"]) == ("finished", None)
    row = next(run for run in runs(settings) if run.info.run_name == "gamma=10 seed=0")
    assert row.data.metrics["best/recall_100"] == pytest.approx(0.4)


def test_what_fails_where_the_sweep_runs_is_the_trials_reason(
    settings: Settings, toy, ray_cluster: None, tmp_path: Path
):
    settings.workdir.mkdir()
    reasons = []

    def on_end(outcome: Outcome) -> None:
        if outcome.status == "finished":
            raise OSError("no space left")
        reasons.append(outcome.reason)

    space = Space(vary={"loss.gamma": [10]})
    run_trials(
        *(space, settings, trials_of(space, settings), [], toy.train, lambda _: None, on_end),
        at_once=1,
        storage=tmp_path / "tune",
    )
    assert reasons == ["OSError: no space left"]


def test_a_trial_sees_the_inputs_as_the_sweep_saw_them(
    settings: Settings, ray_cluster: None, tmp_path: Path
):
    def train(settings: Settings) -> dict[str, object]:
        return {"recall_100": first_seen("log", lambda: 0.0)}

    settings.workdir.mkdir()
    space = Space(vary={"loss.gamma": [10]})
    ended: list[Outcome] = []
    with as_first_seen({"log": 0.4}):
        run_trials(
            *(space, settings, trials_of(space, settings), [], train, lambda _: None, ended.append),
            at_once=1,
            storage=tmp_path / "tune",
        )
    assert [outcome.result["recall_100"] for outcome in ended] == [0.4]


def test_a_run_that_was_deleted_does_not_stop_a_sweep(settings: Settings):
    with start_run(settings, "sweep", "of", name="sweep toy") as parent:
        children = Children(parent, "of", "toy")
        child = start_run(children.adopt(settings), "finetune", "a")
        parent.client.delete_run(child.run_id)
        assert children.end() == []
        trial = Trial({"loss.gamma": 10}, 0)
        result = {"gauc": 0.5, "mlflow_run": child.run_id, "model": "w/finetune/abc"}
        noted = children.note(Outcome(trial, "finished", result, 1.0), children.adopt(settings))
    assert noted.result["mlflow_run"] != child.run_id
    row = parent.client.get_run(noted.result["mlflow_run"])
    assert row.data.tags["acebert.trained_by"] == child.run_id
    assert row.data.tags["acebert.model"] == "w/finetune/abc"


def test_a_run_that_another_sweep_left_unfinished_becomes_this_ones_by_name_and_is_ended(
    settings: Settings,
):
    for name in ("first", "second"):
        with start_run(settings, "sweep", name) as parent:
            children = Children(parent, name, name)
            trial = with_leaves(children.adopt(settings), {"tracking.run_name": f"of {name}"})
            run = start_run(trial, "finetune", "of both")
            if name == "first":
                parent.client.set_terminated(run.run_id, "FAILED")
            else:
                assert children.end("of second") == ["of both"]
    (of_both,) = [run for run in runs(settings) if run.data.tags["acebert.stage"] == "finetune"]
    assert (of_both.info.run_name, of_both.info.status) == ("of second", "KILLED")
    assert of_both.data.tags["table"] == "second"


def test_more_trials_at_once_than_the_cluster_holds_are_refused(
    settings: Settings, toy, ray_cluster: None
):
    space = Space(vary={"loss.gamma": [10]}, trials_at_once=3)
    with pytest.raises(UserError, match="trials_at_once 3: the cluster has room for 2 at once"):
        sweep(settings, "toy", space, **toy.parts)
    assert not (settings.workdir / "sweep").exists()


def test_a_space_whose_name_cannot_be_the_trials_tag_is_refused_first(settings: Settings, toy):
    space = Space(vary={"loss.gamma": [10]})
    with pytest.raises(UserError, match=r"--tracking\.tag: men's has an apostrophe"):
        sweep(settings, "men's", space, **toy.parts)


def test_trials_at_once_share_the_cores_and_are_the_same_stage(
    settings: Settings, ray_cluster: None
):
    assert place(settings, None, "trials_at_once") == (1, settings)
    at_once, own = place(settings, 2, "trials_at_once")
    assert at_once == 2
    assert (own.train.cpus_per_worker, own.train.threads_per_worker) == (0.9, 1)


@pytest.mark.parametrize(
    ("node", "leaves", "wanted"),
    [
        ({"CPU": 16.0, "GPU": 4.0}, {"train.num_workers": 2}, (4, 3.6, 4)),
        ({"CPU": 16.0}, {"train.cpus_per_worker": 8.0}, (4, 8.0, 8)),
        ({"CPU": 16.0}, {}, (1, None, None)),
    ],
    ids=["gpus", "cpus of a given share", "cpus"],
)
def test_two_nodes_are_filled_by_gpus_and_by_shares_that_are_given(
    node: dict[str, float],
    leaves: dict[str, Any],
    wanted: tuple[int, float | None, int | None],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(ray, "nodes", lambda: 2 * [{"Alive": True, "Resources": node}])
    at_once, own = place(with_leaves(settings, leaves), None, "trials_at_once")
    assert (at_once, own.train.cpus_per_worker, own.train.threads_per_worker) == wanted


def test_what_trials_share_is_made_with_the_whole_cluster(
    settings: Settings, toy, ray_cluster: None
):
    run_toy, seen = toy.train, []

    def prepare(settings: Settings, space: Space) -> Prepared:
        seen.append(settings.train.cpus_per_worker)
        return toy.prepare(settings, space)

    def train(settings: Settings) -> dict[str, Any]:
        assert settings.train.cpus_per_worker == 0.9
        return run_toy(settings)

    space = Space(vary={"loss.gamma": [1, 10, 20]}, trials_at_once=2)
    directory = sweep(settings, "toy", space, prepare=prepare, train=train)
    assert seen == [None]
    table = pq.read_table(directory / "trials.parquet").to_pylist()
    assert sorted((row["loss.gamma"], row["status"]) for row in table) == [
        *((1, "failed"), (10, "finished"), (20, "finished"))
    ]
    assert "RUNNING" not in statuses(settings)


def test_trials_of_a_given_share_take_no_more_threads_than_it(
    settings: Settings, ray_cluster: None
):
    halves = with_leaves(settings, {"train.cpus_per_worker": 1.0})
    at_once, own = place(halves, None, "trials_at_once")
    assert at_once == 2
    assert (own.train.cpus_per_worker, own.train.threads_per_worker) == (1.0, 1)
    told = with_leaves(halves, {"train.threads_per_worker": 3})
    assert place(told, None, "trials_at_once")[1].train.threads_per_worker == 3


def test_a_figure_that_cannot_be_drawn_costs_nothing_else(
    settings: Settings, toy, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    def break_down(*_: object) -> None:
        raise ValueError("no such axis")

    monkeypatch.setattr(sweep_run, "sweep_figure", break_down)
    directory = sweep(settings, "toy", Space(vary={"loss.gamma": [10]}), **toy.parts)
    left = {path.name for path in directory.glob("*.*")}
    assert {"trials.parquet", "best.yaml", "report.txt"} <= left
    assert statuses(settings) == {"FINISHED"}


def test_a_search_for_more_points_than_there_are_values_ends(
    settings: Settings, toy, ray_cluster: None
):
    space = Space(vary={"loss.gamma": [10, 20]}, search="optuna", points=4)
    directory = sweep(settings, "toy", space, **toy.parts)
    assert len(toy.calls(settings)) == 4
    assert sweep(settings, "toy", space, **toy.parts) == directory
    (directory / "report.txt").unlink()  # it was killed after the last trial
    sweep(settings, "toy", space, **toy.parts)
    assert len(toy.calls(settings)) == 4


def test_a_sweep_that_was_killed_while_it_wrote_writes_everything_when_started_again(
    settings: Settings, toy, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    run_toy = toy.train

    def train(settings: Settings) -> dict[str, Any]:
        return {**run_toy(settings), "model": str(settings.workdir)}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    row = settings.workdir / "row"
    row.mkdir(parents=True)
    (row / "metrics.json").write_text('{"overall": {"gauc": 0.7, "recall_100": 0.2}}')
    evaluated = Stage("evaluate", row, "0", 0.0, reused=False)
    monkeypatch.setattr(sweep_run, "evaluate_stage", lambda *_: (None, evaluated))
    monkeypatch.setattr(sweep_run, "log_model", lambda *_: None)

    def start(evaluate: bool) -> Path:
        space = Space(vary={"loss.gamma": [10, 20]})
        parts = {"prepare": toy.prepare, "train": train, "evaluate": evaluate}
        return sweep(settings, "toy", space, **parts)

    for evaluate in (False, True):
        with monkeypatch.context() as killed:
            killed.setattr(sweep_run, "sweep_figure", interrupt)
            with pytest.raises(KeyboardInterrupt):
                start(evaluate)
        directory = start(evaluate)
        assert (directory / "sweep.png").exists()
        assert statuses(settings) == {"FINISHED"}
        parent = next(run for run in runs(settings) if run.info.run_name == "sweep toy")
        artifacts = client(settings).list_artifacts(parent.info.run_id)
        assert {artifact.path for artifact in artifacts} == {
            *("best.yaml", "report.txt", "space.yaml", "sweep.png", "trials.parquet")
        }
    tested = pq.read_table(directory / "trials.parquet")["test_recall_100"]
    assert tested.to_pylist() == [0.2, 0.2]
    assert len(toy.calls(settings)) == 2


def test_optuna_knows_what_ended_before_and_the_ends_of_a_range(settings: Settings):
    low, high = 1.00004, 9.99996  # of more digits than a point has
    space = Space(vary={"loss.gamma": {"low": low, "high": high}}, search="optuna", points=9)
    known = [
        Outcome(Trial(drawn(space, {"loss.gamma": gamma}), 0), status, result, 1.0)
        for gamma, status, result in (
            (low, "finished", {"recall_100": 0.1}),
            (high, "stopped", {"recall_100": 0.2}),
            (5.0, "stopped", {}),
            (6.0, "failed", {}),
        )
    ]
    study = _optuna(space, settings, known)._ot_study
    told = [(trial.params["point/loss.gamma"], trial.value) for trial in study.trials]
    assert told == [(low, 0.1), (high, 0.2)]


def test_optuna_is_told_each_points_mean_and_again_when_the_sweep_goes_on(
    settings: Settings, toy, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    told, tell = [], Study.tell

    def hear(self: Study, trial: Any, values: Any = None, **more: Any) -> Any:
        told.append((trial.params["point/loss.gamma"], values))
        return tell(self, trial, values, **more)

    monkeypatch.setattr(Study, "tell", hear)
    space = Space(vary=WIDE, search="optuna", points=3, seeds=(0, 1))
    directory = sweep(settings, "toy", space, **toy.parts)
    points = points_tried(known := Records(directory / "trials").ended())
    means = [
        (of[0].trial.point["loss.gamma"], np.mean([o.result["recall_100"] for o in of]))
        for of in points
    ]
    np.testing.assert_allclose(told, means, rtol=1e-3)  # points have four digits
    study = _optuna(space, settings, known).searcher._ot_study
    again = [(trial.params["point/loss.gamma"], trial.value) for trial in study.trials]
    np.testing.assert_allclose(again, means)


def test_a_trial_whose_model_was_removed_runs_again_and_the_others_do_not(
    settings: Settings, toy, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    run_toy = toy.train

    def train(settings: Settings) -> dict[str, Any]:
        result = run_toy(settings)
        model = settings.workdir / "finetune" / f"{settings.loss.gamma:.0f}"
        model.mkdir(parents=True, exist_ok=True)
        return {**result, "model": str(model)}

    monkeypatch.setattr(sweep_run, "log_model", lambda *_: None)
    space = Space(vary={"loss.gamma": [10, 40]})
    parts = {"prepare": toy.prepare, "train": train}
    sweep(settings, "toy", space, **parts)
    (settings.workdir / "finetune" / "40").rmdir()
    sweep(settings, "toy", space, **parts)
    assert toy.calls(settings) == [(10, 0), (40, 0), (40, 0)]


def test_an_evaluation_that_fails_leaves_the_table_and_the_best_recipe(
    settings: Settings, toy, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    run_toy = toy.train

    def train(settings: Settings) -> dict[str, Any]:
        return {**run_toy(settings), "model": str(settings.workdir)}

    def fail(*_: object) -> None:
        raise UserError("no test day")

    monkeypatch.setattr(sweep_run, "evaluate_stage", fail)
    space = Space(vary={"loss.gamma": [10]})
    with pytest.raises(UserError, match="no test day"):
        sweep(settings, "toy", space, evaluate=True, prepare=toy.prepare, train=train)
    (directory,) = (settings.workdir / "sweep").iterdir()
    assert {"trials.parquet", "best.yaml"} <= {path.name for path in directory.iterdir()}


def test_a_finished_sweep_that_is_evaluated_later_goes_on_in_its_run(
    settings: Settings, toy, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    run_toy, evaluated = toy.train, settings.workdir / "evaluated"

    def train(settings: Settings) -> dict[str, Any]:
        return {**run_toy(settings), "model": str(settings.workdir)}

    monkeypatch.setattr(sweep_run, "log_model", lambda *_: None)
    row = Stage("evaluate", evaluated, "0", 0.0, reused=False)
    monkeypatch.setattr(sweep_run, "evaluate_stage", lambda *_: (None, row))
    space = Space(vary={"loss.gamma": [10, 20]})
    parts = {"prepare": toy.prepare, "train": train}
    sweep(settings, "toy", space, **parts)
    before = {run.info.run_id for run in runs(settings)}
    evaluated.mkdir()
    (evaluated / "metrics.json").write_text('{"overall": {"gauc": 0.7, "recall_100": 0.0}}')
    sweep(settings, "toy", space, evaluate=True, **parts)
    assert {run.info.run_id for run in runs(settings)} == before
    assert statuses(settings) == {"FINISHED"}
    tested = [run.data.metrics.get("test/recall_100") for run in runs(settings)]
    assert sorted(tested, key=str) == [0.0, 0.0, None]


def test_an_evaluation_that_is_gone_or_was_made_otherwise_is_made_again(
    settings: Settings, toy, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    run_toy, rows = toy.train, settings.workdir / "rows"
    evaluated = []

    def train(settings: Settings) -> dict[str, Any]:
        return {**run_toy(settings), "model": str(settings.workdir)}

    def evaluate(settings: Settings, model: Path) -> tuple[None, Stage]:
        row = rows / str(len(evaluated))
        row.mkdir(parents=True)
        overall = {"gauc": None, "recall_100": 0.1 * len(evaluated)}
        (row / "metrics.json").write_text(json.dumps({"overall": overall}))
        evaluated.append(row)
        return None, Stage("evaluate", row, "0", 0.0, reused=False)

    monkeypatch.setattr(sweep_run, "log_model", lambda *_: None)
    monkeypatch.setattr(sweep_run, "evaluate_stage", evaluate)

    def again(settings: Settings) -> list[float]:
        """Recall@100 of the test day, by trial."""
        space = Space(vary={"loss.gamma": [10, 20]})
        own = {"evaluate": True, "prepare": toy.prepare, "train": train}
        directory = sweep(settings, "toy", space, **own)
        column = pq.read_table(directory / "trials.parquet")["test_recall_100"]
        return [round(value, 6) for value in column.to_pylist()]

    assert again(settings) == [0.0, 0.1]
    assert again(settings) == [0.0, 0.1]
    (evaluated[1] / "metrics.json").unlink()
    assert again(settings) == [0.0, 0.2]
    assert again(with_leaves(settings, {"eval.ks": (5,)})) == [0.3, 0.4]
    monkeypatch.setattr(evaluate_module, "VERSION", 999)
    assert again(with_leaves(settings, {"eval.ks": (5,)})) == [0.5, 0.6]
    assert len(toy.calls(settings)) == 2  # nothing is trained again
