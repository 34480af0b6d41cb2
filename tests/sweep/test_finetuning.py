"""Trials that are real fine-tunings: Ray Tune above Ray Train, a tiny demo catalogue."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from ray import tune

from acebert.config import Settings, load_settings
from acebert.data.demo import build_demo
from acebert.errors import UserError
from acebert.pipeline import Inputs, finetune_stage
from acebert.sweep import training
from acebert.sweep.run import sweep
from acebert.sweep.space import Space, trials_of
from acebert.sweep.training import prepare
from acebert.tracking import client
from acebert.training.checkpoint import Progress
from acebert.training.harness import trained_stage
from acebert.training.steps import Rank

TINY = [
    *["--recipe", "twinbert_tiny", "--demo.products", "120", "--demo.searches_per_day", "300"],
    *["--demo.days", "4", "--model.width", "32", "--model.heads", "2", "--model.layers", "1"],
    *["--text.vocab_size", "400", "--train.batch_size", "32", "--train.validate_every", "4"],
    *["--train.precision", "fp32", "--train.valid_products", "110", "--train.max_steps", "8"],
    *["--train.threads_per_worker", "1", "--eval.bootstrap", "0"],
]


def tiny(workdir: Path, *more: str) -> Settings:
    return load_settings([*TINY, "--workdir", str(workdir), *more])


@pytest.fixture
def another_ray() -> Iterator[None]:
    """A Ray on this machine that has nothing to do with ours."""
    code = "import ray; ray.init('local', num_cpus=1); print('up', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert any("up" in line for line in other.stdout)
    yield
    other.communicate("\n", timeout=60)


@pytest.mark.slow
def test_a_trial_trains_as_the_job_alone_does_and_asha_stops_one_that_is_behind(
    tmp_path: Path, ray_cluster: None, another_ray: None
):
    """One sweep, for each fine-tuning costs seconds of start-up. It is long enough for Tune to get
    a word in before a trial is over."""
    long = [
        *["--train.max_steps", "500", "--train.epochs", "40"],
        *["--train.validate_every", "50", "--train.patience", "99"],
        *["--train.valid_metric", "gauc"],
    ]
    base = tiny(tmp_path / "sweep", *long)
    space = Space(
        vary={"train.lr": [1e-3, 1e-9]},
        seeds=(3,),
        metric="gauc",
        asha={"first_rung": 50, "reduction": 2},
    )
    directory = sweep(base, "rates", space, evaluate=True)
    learns, frozen = pq.read_table(directory / "trials.parquet").to_pylist()
    assert (learns["status"], learns["step"]) == ("finished", 500)
    assert frozen["status"] == "stopped"
    assert 50 <= frozen["step"] < 500
    assert 0 < learns["test_recall_100"] <= 1
    assert (directory / "sweep.png").exists()
    assert not list((tmp_path / "sweep" / "train").iterdir())  # no checkpoints of either

    alone = tiny(tmp_path / "alone", "--seed", "3", "--train.lr", "1e-3", *long)
    histories = [
        pq.read_table(Path(model) / "history.parquet")["loss"].to_pylist()
        for model in (learns["model"], finetune_stage(alone).path)
    ]
    assert len(histories[0]) == 500
    assert histories[0] == histories[1]

    recipe = ["--recipe", str(directory / "best.yaml"), "--workdir", str(tmp_path / "sweep")]
    again = finetune_stage(load_settings(recipe))
    assert again.reused
    assert str(again.path) == learns["model"]

    mlflow = client(base)
    experiment = mlflow.get_experiment_by_name(base.tracking.experiment).experiment_id
    table = mlflow.search_runs([experiment], "tags.table = 'rates'")
    assert {run.info.run_name: run.info.status for run in table} == {
        "lr=0.001 seed=3": "FINISHED",
        "lr=1e-09 seed=3": "KILLED",
    }
    assert not mlflow.search_runs([experiment], "attributes.status = 'RUNNING'")
    scored = next(run for run in table if run.info.status == "FINISHED")
    below = f"tags.`mlflow.parentRunId` = '{scored.info.run_id}'"
    (evaluated,) = mlflow.search_runs([experiment], below)
    assert evaluated.data.tags["acebert.stage"] == "evaluate"
    assert "table" not in evaluated.data.tags
    assert scored.data.metrics["test/recall_100"] == pytest.approx(learns["test_recall_100"])
    assert scored.data.metrics["plan/hard_share"] == pytest.approx(learns["hard_share"])


@pytest.mark.slow
def test_what_trials_start_from_is_pre_trained_before_the_first_and_is_no_row(
    tmp_path: Path, ray_cluster: None
):
    start = ["--recipe", "cebert_tiny", "--model.start", "pretrain", "--pretrain.max_steps", "4"]
    more = ["--pretrain.validate_every", "2", "--pretrain.held_out", "0.2"]
    small = ["--pretrain.batch_size", "16", "--image.pixel_side", "35"]
    base = tiny(tmp_path, *start, *more, *small)
    directory = sweep(base, "rates", Space(vary={"train.lr": [1e-3, 1e-4]}))
    rows = pq.read_table(directory / "trials.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["finished", "finished"]
    (stage,) = (tmp_path / "pretrain").glob("*/stage.json")
    for row in rows:
        key = json.loads((Path(row["model"]) / "stage.json").read_text())["key"]
        assert key["pretrain"] == stage.parent.name
    mlflow = client(base)
    experiment = mlflow.get_experiment_by_name(base.tracking.experiment).experiment_id
    (pretrained,) = mlflow.search_runs([experiment], "tags.`acebert.stage` = 'pretrain'")
    assert pretrained.info.run_name.startswith("pretrain cebert_tiny")
    table = mlflow.search_runs([experiment], "tags.table = 'rates'")
    assert {run.info.run_name for run in table} == {"lr=0.001 seed=0", "lr=0.0001 seed=0"}


def test_only_the_trials_own_fine_tuning_reports_to_tune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    heard = []

    def note(settings: Settings) -> None:
        heard.append(os.environ.get("RAY_TRAIN_CALLBACKS"))

    def stop(settings: Settings) -> None:
        note(settings)
        raise UserError("enough")

    monkeypatch.setattr(training, "before_finetuning", note)
    monkeypatch.setattr(training, "finetune_stage", stop)
    with pytest.raises(UserError, match="enough"):
        training.train(tiny(tmp_path))
    note(tiny(tmp_path))
    assert heard == [None, "acebert.sweep.training.ReportToTune", None]


def test_more_partitions_than_batches_are_refused_before_anything_is_built(tmp_path: Path):
    base = tiny(tmp_path)
    space = Space(vary={"plan.partitions": [1, 10_000]})
    with pytest.raises(UserError, match=r"partitions=10000.*a partition needs at least one: 1 to"):
        prepare(base, space)
    ends = {"low": 1, "high": 10_000}
    searched = Space(vary={"plan.partitions": ends}, search="optuna", points=2)
    with pytest.raises(UserError, match=r"partitions=10000.*a partition needs at least one"):
        prepare(base, searched)
    assert not (tmp_path / "tokens").exists()


def test_a_metric_that_tells_no_trials_apart_on_this_data_is_refused(tmp_path: Path):
    few = tiny(tmp_path, "--train.valid_products", "100")
    with pytest.raises(UserError, match="recall_100 of 100 products finds them all"):
        prepare(few, Space(vary={"train.lr": [1e-3]}))
    log = build_demo(few).path
    clicks = pq.read_table(log / "impressions").filter(pc.field("clicked"))
    pq.write_table(clicks, tmp_path / "clicks.parquet")
    own = ["--data.products", str(log / "products.parquet"), "--train.valid_metric", "gauc"]
    bare = tiny(tmp_path, *own, "--data.impressions", str(tmp_path / "clicks.parquet"))
    with pytest.raises(UserError, match="gauc needs products that were shown and not clicked"):
        prepare(bare, Space(vary={"train.lr": [1e-3]}, metric="gauc"))
    assert not (tmp_path / "tokens").exists()


def test_values_that_make_the_same_partitions_are_one_point(tmp_path: Path, ray_cluster: None):
    base = tiny(tmp_path)
    space = Space(vary={"plan.batches_per_partition": [1, 1000, 5000]}, seeds=(0, 1))
    trials = prepare(base, space).trials
    assert [(t.point["plan.batches_per_partition"], t.seed) for t in trials] == [
        *((1, 0), (1, 1)),
        *((1000, 0), (1000, 1)),
    ]
    plans = [path.name for path in (tmp_path / "plan").glob("[!.]*")]
    assert len(plans) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parent", "expected"), [("a-sweep", ["1 0.25", "1 0.25", "2 0.5"]), ("none", [])]
)
def test_a_trial_that_goes_on_tells_tune_of_its_earlier_validations_and_other_trainings_of_none(
    tmp_path: Path, ray_cluster: None, parent: str, expected: list[str]
):
    """ASHA compares at its rungs, of which a sweep that was started again knows nothing."""
    settings = tiny(tmp_path, "--train.cpus_per_worker", "0.4", "--tracking.parent_run", parent)
    told = tmp_path / "told.txt"
    told.touch()

    def step(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
        state = rank.resume()[1] if rank.resume else Progress()
        state.step += 1
        state.add_steps([{"step": state.step, "loss": 1.0}])
        state.validations.append({"step": state.step, "recall_100": 0.25 * state.step})
        rank.save({"weight": torch.zeros(1)}, state)
        if rank.resume is None:
            while not list(settings.workdir.glob("train/*/checkpoints/step-*1/*")):
                time.sleep(0.1)
            time.sleep(1)  # until the report has gone through
            os._exit(1)

    def trial(config: dict[str, Any]) -> None:
        os.environ["RAY_TRAIN_CALLBACKS"] = "acebert.sweep.training.ReportToTune"
        trained_stage(settings, "toy", {"of": "reports"}, step, {}, lambda *_: None, "data")

    class Hear(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any):
            if "step" in result:
                with told.open("a") as file:
                    file.write(f"{result['step']} {result['recall_100']}\n")

    run_config = tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0, callbacks=[Hear()])
    tune.Tuner(trial, run_config=run_config).fit()
    assert told.read_text().splitlines() == expected


def test_optuna_finds_the_stages_of_all_values_that_it_may_choose(
    tmp_path: Path, ray_cluster: None
):
    vary = {"text.title_tokens": [4, 8, 16], "plan.batches_per_partition": {"low": 1, "high": 9}}
    prepare(tiny(tmp_path), Space(vary=vary, search="optuna", points=2))
    assert len(list((tmp_path / "tokens").glob("[!.]*"))) == 3
    assert not (tmp_path / "plan").exists()  # of a point that it has still to choose


def test_a_point_whose_stages_fail_leaves_the_others_theirs(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    made = training.before_finetuning

    def fail_once(settings: Settings) -> Inputs:
        if settings.seed == 0:
            raise RuntimeError("a worker of pre-training failed")
        return made(settings)

    monkeypatch.setattr(training, "before_finetuning", fail_once)
    ready = prepare(tiny(tmp_path), Space(vary={"train.lr": [1e-3]}, seeds=(0, 1)))
    assert [trial.seed for trial in ready.trials] == [0, 1]
    assert len(list((tmp_path / "plan").glob("[!.]*"))) == 1


def test_start_weights_that_are_replaced_in_their_directory_make_another_sweep(tmp_path: Path):
    backbone = tmp_path / "bert"
    backbone.mkdir()
    weights = backbone / "model.safetensors"
    weights.write_bytes(b"first")
    base = load_settings(["--recipe", "twinbert_tiny", "--model.backbone", str(backbone)])
    trials = trials_of(Space(vary={"train.lr": [1e-3]}), base)
    before = training._identity([], trials, base)
    assert training._identity([], trials, base) == before
    weights.write_bytes(b"second")
    assert training._identity([], trials, base) != before
