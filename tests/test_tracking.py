import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlflow
import pyarrow as pa
import pytest
import ray
from click.testing import CliRunner
from mlflow.cli import cli as mlflow_command

from acebert import tracking
from acebert.config import Settings, load_settings
from acebert.errors import UserError
from acebert.pipeline import tracked
from acebert.tracking import (
    client,
    code_digest,
    default_server,
    finished_run,
    metrics_actor,
    shared,
    start_run,
    tagged,
    tracking_uri,
)
from acebert.workdir import Stage


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return load_settings(["--workdir", str(tmp_path), "--tracking.tag", "t1"])


def test_a_run_carries_flat_params_tags_and_metrics(settings: Settings):
    with start_run(settings, "finetune", "d1") as run:
        run.log_metrics({"gauc": 0.5}, step=3)
    seen = client(settings).get_run(run.run_id)
    assert seen.info.status == "FINISHED"
    assert seen.data.params["train.batch_size"] == str(settings.train.batch_size)
    assert seen.data.tags["table"] == "t1"
    assert seen.data.tags["acebert.digest"] == "d1"
    (metric,) = client(settings).get_metric_history(run.run_id, "gauc")
    assert (metric.value, metric.step) == (0.5, 3)


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_run_is_ended_whatever_stops_it_and_a_second_try_goes_on_in_it(
    settings: Settings, error: type[BaseException], status: str
):
    with pytest.raises(error), start_run(settings, "finetune", "d1") as first:
        raise error
    assert client(settings).get_run(first.run_id).info.status == status
    with start_run(settings, "finetune", "d1") as again:
        assert client(settings).get_run(again.run_id).info.status == "RUNNING"
    assert again.run_id == first.run_id
    with start_run(settings, "finetune", "d2") as other:
        pass
    assert other.run_id != first.run_id


def test_a_run_that_somebody_else_ended_keeps_that_end_when_its_process_dies_of_it(
    settings: Settings,
):
    run = start_run(settings, "finetune", "d1")
    client(settings).set_terminated(run.run_id, "KILLED")
    with pytest.raises(ValueError), run:
        raise ValueError
    assert client(settings).get_run(run.run_id).info.status == "KILLED"


def test_another_training_of_the_same_digest_is_another_run(settings: Settings):
    with start_run(settings, "finetune", "d1") as first:
        first.log_metrics({"train/loss": 5.0}, step=20)
    client(settings).set_terminated(first.run_id, "FAILED")
    with start_run(settings, "finetune", "d1", first_step=20) as resumed:
        pass
    assert resumed.run_id == first.run_id
    client(settings).set_terminated(first.run_id, "FAILED")
    with start_run(settings, "finetune", "d1") as from_the_start:  # its checkpoints were removed
        pass
    assert from_the_start.run_id != first.run_id
    assert client(settings).get_run(first.run_id).info.status == "KILLED"


def test_a_finished_run_whose_stage_was_never_named_is_gone_on_with(settings: Settings):
    """Killed between the two, the job starts again from its last checkpoint."""
    with start_run(settings, "finetune", "d1") as first:
        first.log_metrics({"train/loss": 5.0}, step=20)
    with start_run(settings, "finetune", "d1", first_step=20) as again:
        pass
    with start_run(settings, "finetune", "d1") as from_the_start:
        pass
    assert first.run_id == again.run_id != from_the_start.run_id


def test_a_deleted_experiment_is_said_with_the_way_to_restore_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start_run(settings, "finetune", "d1") as run:
        pass
    server = client(settings)
    experiment = server.get_run(run.run_id).info.experiment_id
    server.delete_experiment(experiment)
    for ask in (start_run, finished_run):
        with pytest.raises(
            UserError, match=r"--tracking\.experiment acebert: it was deleted"
        ) as said:
            ask(settings, "finetune", "d2")
    command = str(said.value).partition("restore it: ")[2].split()
    monkeypatch.setenv(*command[0].split("=", 1))
    restored = CliRunner().invoke(mlflow_command, command[2:])
    assert restored.exit_code == 0, restored.output
    with start_run(settings, "finetune", "d2") as after:
        pass
    assert server.get_run(after.run_id).info.experiment_id == experiment


def _make_run(settings: Settings) -> str:
    with start_run(settings, "s", str(multiprocessing.current_process().pid)) as run:
        return client(settings).get_run(run.run_id).info.experiment_id


def test_the_run_of_another_work_directory_is_left_alone(settings: Settings, tmp_path: Path):
    server = tracking_uri(settings)
    theirs = settings.model_copy(update={"workdir": tmp_path / "theirs"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server)
        with start_run(settings, "finetune", "d1") as ours:
            with start_run(theirs, "finetune", "d1") as other:
                pass
            assert client(settings).get_run(ours.run_id).info.status == "RUNNING"
    assert other.run_id != ours.run_id


def test_processes_that_start_at_once_share_one_new_experiment(settings: Settings):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(_make_run, [settings] * 3))) == 1


def test_workers_log_through_the_actor_and_no_step_twice(settings: Settings, ray_cluster: None):
    steps = list(range(2500))  # MLflow takes 1,000 metrics at a time
    table = pa.table({"step": steps, "train/loss": [float(i) for i in steps]})
    rare = [float(i) if i % 5 == 0 else None for i in steps]
    table = table.append_column("train/domain_loss", pa.array(rare))
    with start_run(settings, "finetune", "d1") as run:
        with metrics_actor(settings) as actor:
            assert ray.get(actor.log.remote(run.run_id, table[:1500])) == 1500 + 300
            assert ray.get(actor.log.remote(run.run_id, table[:2000])) == 500 + 100
        with metrics_actor(settings) as restarted:  # it asks MLflow what the run has
            assert ray.get(restarted.log.remote(run.run_id, table)) == 500 + 100
    for name, expected in (("loss", steps), ("domain_loss", steps[::5])):
        history = client(settings).get_metric_history(run.run_id, f"train/{name}")
        assert sorted((m.step, m.value) for m in history) == [(i, float(i)) for i in expected]


def test_the_environment_names_another_server(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert tracking_uri(settings) == "http://127.0.0.1:9"


def test_a_finished_run_is_found_by_its_stage_and_digest(settings: Settings):
    assert finished_run(settings, "finetune", "d1") is None
    with start_run(settings, "finetune", "d1") as run:
        assert finished_run(settings, "finetune", "d1") is None  # it is still running
    found = finished_run(settings, "finetune", "d1")
    assert found is not None
    assert found.run_id == run.run_id
    assert finished_run(settings, "evaluate", "d1") is None


def test_a_stage_that_several_waited_for_has_one_run(settings: Settings, tmp_path: Path):
    (tmp_path / "stage.json").write_text('{"key": {"ingest": "i1"}}')
    found = Stage("tokens", tmp_path, "d1", 1.0, reused=True)
    client(settings)  # the database is there
    with ThreadPoolExecutor(4) as waiters:
        list(waiters.map(lambda _: tracked(settings, found), range(4)))
    mlflow = client(settings)
    experiment = mlflow.get_experiment_by_name(settings.tracking.experiment).experiment_id
    assert len(mlflow.search_runs([experiment])) == 1


def test_a_row_of_two_tables_has_a_run_in_each_and_what_is_no_row_has_no_tag(
    settings: Settings, tmp_path: Path
):
    (tmp_path / "row").mkdir()
    (tmp_path / "row" / "metrics.json").write_text('{"overall": {"gauc": 0.5}}')
    (tmp_path / "stage.json").write_text('{"key": {"ingest": "i1"}}')
    built = Stage("evaluate", tmp_path / "row", "d1", 1.0, reused=False)
    found = replace(built, reused=True)
    for one, table in ((built, "t1"), (found, "t2"), (found, "t1")):
        tracked(tagged(settings, table), one, row=True, tags={"acebert.model": "/models/m1"})
    tracked(shared(settings), replace(built, name="ingest"))
    mlflow = client(settings)
    experiment = mlflow.get_experiment_by_name(settings.tracking.experiment).experiment_id
    runs = mlflow.search_runs([experiment])
    tables = sorted((r.data.tags["acebert.stage"], r.data.tags.get("table")) for r in runs)
    assert tables == [("evaluate", "t1"), ("evaluate", "t2"), ("ingest", None)]
    data = {(r.data.tags["acebert.stage"], r.data.tags["acebert.data"]) for r in runs}
    assert data == {("evaluate", "i1"), ("ingest", "d1")}
    models = [run.data.tags.get("acebert.model") for run in runs]
    assert sorted(map(str, models)) == ["/models/m1", "/models/m1", "None"]


def test_a_server_that_does_not_answer_is_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"^MLflow at http://127\.0\.0\.1:1 does not answer$"):
        start_run(settings, "finetune", "d1")


def test_the_default_server_of_one_work_directory_is_not_that_of_the_next(
    settings: Settings, tmp_path: Path
):
    other = load_settings(["--workdir", str(tmp_path / "other")])
    before = tracking_uri(other)
    with default_server(settings):
        assert mlflow.get_tracking_uri() == tracking_uri(settings)
    assert tracking_uri(other) == before != tracking_uri(settings)


@pytest.mark.parametrize("name", ["job.py", "recipes/new.yaml", "templates/page.html.j2"])
def test_the_codes_digest_is_of_source_recipes_and_templates(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "tracking.py"))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("one")
    before = code_digest()
    (tmp_path / "notes.txt").write_text("nothing to do with it")
    assert code_digest() == before
    path.write_text("two")
    assert code_digest() != before
