"""Rows trained and measured for real, at the smallest size: mined, shortened, left out, reused."""

import hashlib
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_world import make_world

from acebert.config import Settings, load_settings
from acebert.data.hard_negatives import HardNegatives
from acebert.data.inputs import as_first_seen
from acebert.data.lookups import Lookups
from acebert.errors import UserError
from acebert.evaluation.evaluate import read_vectors
from acebert.evaluation.tables import Row
from acebert.machine import machine
from acebert.pipeline import demo_stage, ingest_stage
from acebert.report import rival, run
from acebert.report.ahead import Training, each_once, train_ahead
from acebert.report.rows import (
    ACEBERT,
    FUSED,
    MATRYOSHKA,
    MATRYOSHKA_64,
    MINED,
    MINED_MASKED,
    RIVAL,
    ZERO_SHOT,
    System,
)
from acebert.report.run import (
    Measured,
    Results,
    measure_partitions,
    measure_rival,
    measure_systems,
    trainings,
)
from acebert.tracking import client, code_digest
from acebert.workdir import Stage, digest_of

FIG_5 = Path(__file__).parents[2] / "tune_spaces" / "fig5_partitions.yaml"
SMALL = [
    *["--demo.products", "120", "--demo.searches_per_day", "300", "--demo.days", "4"],
    *["--model.width", "32", "--model.heads", "2", "--model.layers", "1"],
    *["--image.pixel_side", "35", "--text.vocab_size", "400", "--eval.bootstrap", "50"],
    *["--train.batch_size", "32", "--train.max_steps", "4", "--train.valid_products", "100"],
]
TOO_DEEP = System(
    "too deep",
    "acebert",
    ("--loss.hard_negatives", "1"),
)
BEYOND = [ACEBERT, FUSED, MINED, MINED_MASKED, MATRYOSHKA, MATRYOSHKA_64]
WANTED = {"table4": [ACEBERT], "beyond": [*BEYOND, TOO_DEEP]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Results, ...]:
    """The results, and those of the same call once more."""
    workdir = str(tmp_path_factory.mktemp("work"))

    def make(system: System, seed: int) -> Settings:
        own = ["--recipe", f"{system.recipe}_tiny", "--workdir", workdir, "--seed", str(seed)]
        own += ["--tracking.run_name", system.name]
        ranks = ["--loss.hard_negative_ranks", "500,900" if system is TOO_DEEP else "3,20"]
        return load_settings([*SMALL, *own, *ranks, *system.changed])

    both = Results(), Results()
    for results, at_once in zip(both, (2, 1), strict=True):
        measure_systems(WANTED, {"table4": (0,), "beyond": (0,)}, make, results, at_once)
    return both


@pytest.mark.slow
def test_every_row_has_its_metrics_cost_and_pairs(trained: tuple[Results, ...]) -> None:
    results, _ = trained
    assert list(results.rows) == [system.name for system in BEYOND]
    for measured in results.rows.values():
        assert (measured.row.measured("gauc") is None) == (measured.row.name == FUSED.name)
        assert measured.row.measured("recall_100") is not None
        assert measured.seconds is not None
        assert measured.seconds > 0
        assert measured.pairs == 4 * 32
        assert set(measured.valid) == {"gauc", "recall_100"}
        assert all(0 < value <= 1 for value in measured.valid.values())
        made = json.loads((measured.models[0] / "report.json").read_text())
        assert measured.valid["gauc"] == pytest.approx(made["best"]["gauc"])
        assert (made["machine"], made["code"]) == (machine(), code_digest())


@pytest.mark.slow
def test_a_row_that_cannot_be_trained_is_left_out_with_the_reason(
    trained: tuple[Results, ...],
) -> None:
    for results in trained:  # whoever trained it
        assert list(results.left_out) == ["too deep"]
        assert "--loss.hard_negative_ranks 500 900: of 120 products" in results.left_out["too deep"]


@pytest.mark.slow
def test_rows_at_once_are_trained_side_by_side_each_once(trained: tuple[Results, ...]) -> None:
    settings = trained[0].rows["ACE-BERT"].settings
    assert settings is not None
    mlflow = client(settings)
    experiment = mlflow.get_experiment_by_name(settings.tracking.experiment).experiment_id
    runs = mlflow.search_runs(
        [experiment], "tags.`acebert.stage` = 'finetune'", order_by=["attributes.start_time ASC"]
    )
    models = {model for measured in trained[0].rows.values() for model in measured.models}
    assert len(runs) == len(models)
    assert any(b.info.start_time < a.info.end_time for a, b in pairwise(runs))


@pytest.mark.slow
def test_rows_are_trained_on_the_log_that_the_job_first_saw(
    tmp_path: Path, ray_cluster: None
) -> None:
    demo = demo_stage(load_settings([*SMALL, "--workdir", str(tmp_path / "demo")])).path
    log = tmp_path / "log"
    shutil.copytree(demo / "impressions", log)
    files = ["--data.products", str(demo / "products.parquet"), "--data.impressions", str(log)]
    own = ["--recipe", "twinbert_tiny", "--workdir", str(tmp_path / "work")]
    rows = [
        Training("TwinBERT", load_settings([*SMALL, *own, *files, "--seed", str(seed)]))
        for seed in range(2)
    ]
    failed: list[str] = []
    with as_first_seen():
        first = ingest_stage(rows[0].settings)
        some = next(path for path in log.rglob("*.parquet"))
        shutil.copy(some, some.with_stem("again"))
        train_ahead(rows, 2, lambda row, why: failed.append(f"{row}: {why}"))
    assert failed == []
    assert len(list((tmp_path / "work" / "finetune").glob("[!.]*"))) == 2
    assert list((tmp_path / "work" / "ingest").glob("[!.]*")) == [first.path]


@pytest.mark.slow
def test_when_a_row_fails_with_one_seed_its_others_are_not_begun_nor_rows_of_the_same_model(
    tmp_path: Path, ray_cluster: None
) -> None:
    def training(seed: int) -> Training:
        files = ["--data.products", str(tmp_path / "none"), "--data.impressions", str(tmp_path)]
        own = ["--recipe", "twinbert_tiny", "--workdir", str(tmp_path / "work")]
        return Training("TwinBERT", load_settings([*own, *files, "--seed", str(seed)]))

    def with_clicks(seed: int) -> Training:
        return replace(training(seed), row="TwinBERT + past clicks")

    reasons: list[str] = []

    def leave_out(name: str, error: UserError) -> None:
        reasons.append(f"{name}: {error}")

    train_ahead([of(seed) for of in (training, with_clicks) for seed in range(6)], 2, leave_out)
    assert 2 <= len(reasons) <= 6  # those that ran beside the first to fail
    why = f"--data.products {tmp_path}/none: there is no such file or directory"
    assert set(reasons) == {f"TwinBERT: {why}", f"TwinBERT + past clicks: {why}"}


@pytest.mark.slow
def test_filtering_by_a_parts_tag_gives_its_rows_and_nothing_else(
    trained: tuple[Results, ...],
) -> None:
    settings = trained[0].rows["ACE-BERT"].settings
    assert settings is not None
    mlflow = client(settings)
    experiment = mlflow.get_experiment_by_name(settings.tracking.experiment).experiment_id
    for part, systems in WANTED.items():
        runs = mlflow.search_runs([experiment], f"tags.table = '{part}'")
        names = [system.name for system in systems if system is not TOO_DEEP]
        assert sorted(run.info.run_name for run in runs) == sorted(names)
        assert all("overall/recall_100" in run.data.metrics for run in runs)
    fused = mlflow.search_runs([experiment], f"attributes.run_name = '{FUSED.name}'")
    (row,) = (run for run in fused if run.data.tags.get("table"))
    measured = trained[0].rows[FUSED.name].row.measured("recall_100")
    assert measured is not None
    assert row.data.metrics["overall/recall_100"] == pytest.approx(measured.value)


@pytest.mark.slow
def test_the_same_call_again_reuses_every_row(trained: tuple[Results, ...]) -> None:
    first, again = trained
    assert {n: m.models for n, m in first.rows.items()} == {
        n: m.models for n, m in again.rows.items()
    }
    stage = first.rows["ACE-BERT"].models[0] / "stage.json"
    assert stage.stat().st_mtime < (first.rows[MINED.name].models[0] / "stage.json").stat().st_mtime


@pytest.mark.slow
def test_a_shortened_row_has_the_first_dimensions_of_the_same_model(
    trained: tuple[Results, ...],
) -> None:
    whole, short = (trained[0].rows[system.name] for system in (MATRYOSHKA, MATRYOSHKA_64))
    assert whole.models == short.models
    ids = pq.read_table(whole.embedded[0] / "products.parquet")["product_id"].to_pylist()
    v, v_64 = (
        read_vectors(one.embedded[0] / "products.parquet", "product_id", ids)
        for one in (whole, short)
    )
    expected = v[:, :64] / np.linalg.norm(v[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(v_64, expected, atol=1e-5)


@pytest.mark.slow
def test_mined_products_were_never_clicked_for_their_query_in_training(
    trained: tuple[Results, ...],
) -> None:
    measured = trained[0].rows[MINED.name]
    assert measured.settings is not None
    workdir = measured.settings.workdir
    (stage,) = (workdir / "hard_negatives").glob("[!.]*")
    (ingested,) = (workdir / "ingest").glob("[!.]*")
    negatives, clicked = HardNegatives.open(stage), Lookups.open(ingested).clicked
    asked = np.flatnonzero(np.diff(clicked.offsets))
    assert len(asked) > 20
    for query in asked:
        row = negatives.mined[query].tolist()
        assert len(set(row)) == 18
        assert not set(row) & set(clicked[query].tolist())


def small_settings(system: System, seed: int) -> Settings:
    return load_settings(["--recipe", f"{system.recipe}_tiny"])


def test_a_row_that_fails_in_any_way_is_left_out_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(system: System, *_: object) -> tuple[Measured, bool]:
        if system is ACEBERT:
            raise RuntimeError("the workers died\nrank 0 was killed")
        return Measured(Row(system.name, ())), False

    monkeypatch.setattr(run, "_measure", measure)
    results = Results()
    measure_systems({"beyond": [ACEBERT, MINED]}, {"beyond": (0,)}, small_settings, results)
    assert results.left_out == {"ACE-BERT": "RuntimeError: rank 0 was killed"}
    assert results.failed == ["ACE-BERT"]
    assert list(results.rows) == [MINED.name]


def test_a_sweep_that_fails_or_finishes_no_trial_costs_figure_5_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Path:
        raise RuntimeError("no CPUs")

    def all_failed(*_: object, **__: object) -> Path:
        table = pa.table({"status": ["failed"], "reason": ["its process died"]})
        pq.write_table(table, tmp_path / "trials.parquet")
        return tmp_path

    settings = load_settings(["--workdir", str(tmp_path)])
    reasons = {broken: "RuntimeError: no CPUs", all_failed: "no trial finished: its process died"}
    for sweep, reason in reasons.items():
        results = Results()
        monkeypatch.setattr(run, "sweep", sweep)
        assert measure_partitions(lambda *_: settings, FIG_5, (0,), results) is None
        assert results.left_out == {"Figure 5": reason}


def test_settings_that_cannot_be_made_cost_the_row_or_figure_that_they_are_of(
    tmp_path: Path,
) -> None:
    def make(system: System, seed: int) -> Settings:
        raise UserError(f"{system.name} has no such recipe")

    results = Results({"TwinBERT": Measured(Row("TwinBERT", ()), pairs=100)})
    measure_rival(make, tmp_path, (0,), 5e-5, results)
    assert measure_partitions(make, FIG_5, (0,), results) is None
    assert results.left_out == {
        ZERO_SHOT: "TwinBERT has no such recipe",
        RIVAL: "TwinBERT has no such recipe",
        "Figure 5": "ACE-BERT has no such recipe",
    }


def test_seeds_of_a_row_are_trained_side_by_side_and_a_row_without_settings_has_none() -> None:
    def make(system: System, seed: int) -> Settings:
        if system is MATRYOSHKA:
            raise UserError("no such recipe")
        return load_settings(["--recipe", f"{system.recipe}_tiny", "--seed", str(seed)])

    results = Results()
    seeds_of = {ACEBERT: (3, 4), MATRYOSHKA: (3,), MINED_MASKED: (7, 8, 9)}
    trainings = run._trainings(seeds_of, make, results)
    masked, own = MINED_MASKED.name, ACEBERT.name
    assert [training.name for training in trainings] == [
        *(f"{own}, seed {seed}" for seed in (3, 4)),
        *(f"{masked}, seed {seed}" for seed in (7, 8, 9)),
    ]
    miners = [training.miner.seed for training in trainings if training.miner]
    assert miners == [7, 8, 9]
    assert results.left_out == {MATRYOSHKA.name: "no such recipe"}


def test_rows_that_are_one_model_cut_or_fused_are_one_training_and_others_are_not() -> None:
    def make(system: System, seed: int) -> Settings:
        own = ["--recipe", f"{system.recipe}_tiny", "--seed", str(seed)]
        return load_settings([*own, "--tracking.run_name", system.name, *system.changed])

    systems = [ACEBERT, MATRYOSHKA, FUSED, MATRYOSHKA_64, MINED, MINED_MASKED]
    seeds_of = {**dict.fromkeys(systems, (0,)), ACEBERT: (0, 1)}
    trained = each_once(run._trainings(seeds_of, make, Results()))
    assert [(training.row, training.settings.seed) for training in trained] == [
        *((ACEBERT.name, 0), (ACEBERT.name, 1)),
        *((system.name, 0) for system in (MATRYOSHKA, MINED, MINED_MASKED)),
    ]


def test_a_row_has_the_seeds_of_the_first_of_its_parts_with_the_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {}

    def measure(system: System, parts: object, seeds: object, _: object) -> tuple[Measured, bool]:
        asked[system] = seeds
        return Measured(Row(system.name, ())), False

    monkeypatch.setattr(run, "_measure", measure)
    wanted = {"table1": [ACEBERT], "table3": [ACEBERT, MINED], "fig6": [ACEBERT]}
    seeds = {"table1": (7,), "table3": (1, 2), "fig6": (3, 4)}
    measure_systems(wanted, seeds, small_settings, Results())
    assert asked == {ACEBERT: (1, 2), MINED: (1, 2)}


def test_the_miners_training_is_behind_a_mined_row_and_a_shared_pre_training_counts_once(
    tmp_path: Path,
) -> None:
    def write(stage: str, seconds: float, key: dict[str, object]) -> Path:
        directory = tmp_path / stage
        directory.mkdir(parents=True)
        (directory / "stage.json").write_text(json.dumps({"key": key}))
        (directory / "report.json").write_text(json.dumps({"train_seconds": seconds}))
        return directory

    pretrained = write("pretrain/p", 1000, {})
    miner = write("finetune/m", 30, {"pretrain": "p"})
    write("hard_negatives/h", 0, {"model": ["m", {}]})
    model = write("finetune/f", 40, {"pretrain": "p", "hard_negatives": "h"})
    assert trainings(model, tmp_path) == {pretrained: 1000, miner: 30, model: 40}


def test_the_cnn_that_was_trained_for_the_patches_is_behind_a_row_and_another_is_not(
    tmp_path: Path,
) -> None:
    def write(stage: str, key: dict[str, object]) -> Path:
        directory = tmp_path / stage
        directory.mkdir(parents=True)
        (directory / "stage.json").write_text(json.dumps({"key": key}))
        (directory / "report.json").write_text('{"train_seconds": 50}')
        return directory

    for name in ("own", "other"):
        (write(f"cnn/{name}", {}) / "cnn.safetensors").write_text(name)
    write("features/of_it", {"cnn_weights": hashlib.sha256(b"own").hexdigest()})
    write("features/of_none", {"cnn_weights": "random"})
    model, at_random = (
        write(f"finetune/{name}", {"features": name}) for name in ("of_it", "of_none")
    )
    assert trainings(model, tmp_path) == {model: 50, tmp_path / "cnn" / "own": 50}
    assert trainings(at_random, tmp_path) == {at_random: 50}


@pytest.mark.slow
def test_the_masked_row_trains_on_the_very_negatives_of_the_row_that_it_is_set_beside(
    trained: tuple[Results, ...],
) -> None:
    rows = trained[0].rows
    keys = [
        json.loads((rows[system.name].models[0] / "stage.json").read_text())["key"]
        for system in (MINED, MINED_MASKED)
    ]
    assert keys[0]["hard_negatives"] == keys[1]["hard_negatives"]
    assert [key["loss"].pop("false_negatives") for key in keys] == ["keep", "log"]
    assert keys[0] == keys[1]


def test_the_rival_trains_on_as_many_pairs_as_twinbert_in_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def train(settings: Settings, _: Stage, start: Path, pairs: int, lr: float) -> Stage:
        asked.append((pairs, settings.train.batch_size, settings.seed))
        raise UserError("enough")

    monkeypatch.setattr(run, "ingest_stage", lambda settings: None)
    monkeypatch.setattr(run, "sentence_transformers_stage", train)
    rows = {
        name: Measured(Row(name, ()), pairs=pairs)
        for name, pairs in (("TwinBERT", 24_960), ("acebert_plus", 99_000))
    }
    paper = load_settings(["--recipe", "twinbert", "--workdir", str(tmp_path)])
    measure_rival(lambda *_: paper, tmp_path, (3,), 5e-5, Results(rows))
    assert asked == [(0, 384, 0), (24_960, 384, 3)]
    results = Results()
    measure_rival(lambda *_: paper, tmp_path, (3,), 5e-5, results)
    assert "as many pairs as TwinBERT, left out too" in results.left_out[RIVAL]


def test_another_model_of_the_rival_precision_or_judged_query_is_another_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    monkeypatch.setattr(rival, "run_stage", lambda *of: keys.append(digest_of(of[2])))
    start = tmp_path / "model"
    (start / "1_Pooling").mkdir(parents=True)
    ingested = make_world(tmp_path).ingested
    judged = tmp_path / "judged.qrels"
    judged.write_text("a+query+that+nobody+asked 0 sku-024 1\n")
    bf16 = ["--train.precision", "bf16"]
    for content, own in (
        *(("a", []), ("b b", []), ("b b", bf16)),
        ("b b", [*bf16, "--eval.qrels", str(judged)]),
    ):
        (start / "1_Pooling" / "config.json").write_text(content)
        argv = ["--workdir", str(tmp_path), "--train.precision", "fp32"]
        for pairs in (0, 9):
            settings = load_settings([*argv, *own])
            rival.sentence_transformers_stage(settings, ingested, start, pairs, 5e-5)
    assert len(set(keys)) == len(keys) == 8


def test_without_a_model_of_its_own_the_rival_is_left_out_with_a_line() -> None:
    results = Results()
    measure_rival(small_settings, None, (0,), 5e-5, results)
    assert set(results.left_out.values()) == {"no model is given (--sentence_transformer DIR)"}
    assert results.failed == []  # nobody asked for it


def test_the_rivals_rows_say_which_model_was_trained_and_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage("sentence_transformers", tmp_path, "d", 0.0, reused=True)
    (tmp_path / "report.json").write_text('{"train_seconds": 60, "pairs": 100}')
    for name in ("sentence_transformers_stage", "evaluate_embeddings", "tracked"):
        monkeypatch.setattr(run, name, lambda *_, **__: stage)
    monkeypatch.setattr(run, "ingest_stage", lambda settings: None)
    results = Results({"TwinBERT": Measured(Row("TwinBERT", ()), pairs=100)})
    start = tmp_path / "mini-lm"
    measure_rival(lambda *_: load_settings(SMALL), start, (3, 4), 5e-5, results)
    assert not results.left_out
    assert results.rows[ZERO_SHOT].others == {"model": "mini-lm"}
    assert (results.rows[ZERO_SHOT].seeds, results.rows[ZERO_SHOT].seconds) == ((), None)
    told = {"model": "mini-lm", "lr": "5e-05", "batch_size": "32"}
    assert results.rows[RIVAL].others == told
    assert results.rows[RIVAL].seeds == (3, 4)
