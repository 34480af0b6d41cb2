"""Settings of jobs that use a trained model; runs of what the jobs build."""

import argparse
import hashlib
import runpy
import shutil
from pathlib import Path

import pytest
import yaml

from acebert import pipeline
from acebert.config import COPIED_SOURCE, Settings, load_settings, weights_digest
from acebert.errors import UserError
from acebert.job import bundle_arguments, model_arguments
from acebert.model_settings import model_settings, settings_for, without_the_models
from acebert.pipeline import catalogue_stages, plan_figure_stage, tracked, with_own_cnn
from acebert.tracking import client, finished_run, shared
from acebert.training.train_cnn import WEIGHTS
from acebert.workdir import Stage, run_stage

JOBS = Path(__file__).parents[1] / "ray_jobs"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    trained = load_settings(
        [
            *["--recipe", "cebert_tiny", "--workdir", str(tmp_path / "w"), "--model.layers", "1"],
            *["--data.products", "p.csv", "--data.impressions", "i.csv"],
        ]
    )
    directory = tmp_path / "model"
    directory.mkdir()
    tree = trained.model_dump(mode="json")
    (directory / "settings.yaml").write_text(yaml.safe_dump(tree))
    return directory


def test_a_model_brings_its_settings_and_the_command_line_those_of_data_and_evaluation(
    model: Path, tmp_path: Path
) -> None:
    argv = ["--workdir", str(tmp_path / "other"), "--data.impressions", "new.csv"]
    settings = settings_for(model, [*argv, "--data.test_from", "2026-02-01", "--eval.ks", "7"])
    assert settings.model.layers == 1
    assert settings.recipe == "cebert_tiny"
    assert settings.workdir == tmp_path / "other"
    assert settings.data.impressions == str(Path.cwd() / "new.csv")
    assert settings.data.products == str(Path.cwd() / "p.csv")
    assert str(settings.data.test_from) == "2026-02-01"
    assert settings.eval.ks == (7,)


@pytest.mark.parametrize("job", ["embed", "evaluate", "distill", "publish", "refresh"])
def test_a_job_takes_one_of_data_and_the_models_for_the_others(
    job: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "queries.csv").write_text("query\nshoe\n")
    given: list[Settings] = []

    def take(settings: Settings, *_: object) -> None:
        given.append(settings)
        raise UserError("enough")

    for stage in ("embed_stage", "evaluate_stage", "distill_stages", "bundle_stage"):
        monkeypatch.setattr(pipeline, stage, take)
    argv = [f"{job}.py", "--model", str(model), "--data.impressions", "new.csv"]
    if job == "embed":
        argv += ["--queries", str(tmp_path / "queries.csv"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit):
        runpy.run_path(str(JOBS / f"{job}.py"), run_name="__main__")
    assert capsys.readouterr().err == "error: enough\n"
    assert given[0].data.impressions == str(Path.cwd() / "new.csv")
    assert given[0].data.products == str(Path.cwd() / "p.csv")


def test_a_registered_model_is_looked_for_in_the_mlflow_of_the_command_line() -> None:
    argv = ["--data.impressions", "new.csv", "--workdir=/w", "--eval.ks", "1", "2"]
    found = without_the_models([*argv, "--tracking.experiment", "shop", "--distill.layers", "1"])
    assert (found.workdir, found.tracking.experiment) == (Path("/w"), "shop")
    assert found == load_settings(["--workdir=/w", "--tracking.experiment", "shop"])


def test_a_relative_model_is_refused_in_a_submitted_job_and_absolute_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "m", "--query_encoder", "q"]
    here = bundle_arguments().parse_args(argv)
    assert (here.model, here.query_encoder) == (tmp_path / "m", tmp_path / "q")
    assert model_arguments().parse_args(argv[:2]).model == tmp_path / "m"
    assert bundle_arguments().parse_args(["--model", "models:/a@b"]).model == "models:/a@b"
    copied = tmp_path / COPIED_SOURCE / "x"
    copied.mkdir(parents=True)
    monkeypatch.chdir(copied)
    for parser in (bundle_arguments(), model_arguments()):
        with pytest.raises(SystemExit):
            parser.parse_args(argv)
        assert "--model: m is relative: in a submitted job" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("leaf", "value"),
    [("model.layers", "2"), ("text.title_tokens", "5"), ("seed", "9"), ("recipe", "acebert_tiny")],
)
def test_a_setting_that_belongs_to_the_model_is_refused_by_name(
    model: Path, leaf: str, value: str
) -> None:
    with pytest.raises(UserError, match=f"--{leaf}: .* was trained with"):
        settings_for(model, [f"--{leaf}", value])


def test_settings_that_repeat_the_models_own_are_taken(model: Path) -> None:
    argv = ["--recipe", "cebert_tiny", "--model.layers", "1"]
    assert settings_for(model, argv) == settings_for(model, [])


def test_where_nodes_read_features_is_the_jobs_and_not_the_models(model: Path) -> None:
    """They are another cluster's, and a copy of its training's is not wanted by every job."""
    tree = yaml.safe_load((model / "settings.yaml").read_text())
    tree["image"] |= {"feature_cache": "node_disk", "feature_cache_dir": "/nvme", "cnn_side": 128}
    (model / "settings.yaml").write_text(yaml.safe_dump(tree))
    given = settings_for(model, ["--image.feature_cache", "none"])
    assert given.image.feature_cache == "none"
    assert str(given.image.feature_cache_dir) == "/nvme"
    used = model_settings(load_settings(["--image.cnn_side", "256"]), model).image
    assert (used.feature_cache, used.feature_cache_dir, used.cnn_side) == ("none", None, 128)


def test_a_miner_reads_titles_by_its_own_tokenizer(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another day's data a vocabulary that is trained there would number words otherwise."""

    def take(settings: Settings, tokenizer: Path | None = None) -> None:
        assert tokenizer == model / "tokenizer"
        raise RuntimeError("enough")

    monkeypatch.setattr(pipeline, "catalogue_stages", take)
    settings = load_settings(["--loss.hard_negatives_from", str(model)])
    with pytest.raises(RuntimeError, match="enough"):
        pipeline.mine_stage(settings)


def test_no_job_waits_for_the_nodes_of_the_models_training(model: Path) -> None:
    tree = yaml.safe_load((model / "settings.yaml").read_text())
    tree["train"] |= {"wait_minutes": 20, "use_gpu": True, "num_workers": 8, "lr": 0.25}
    (model / "settings.yaml").write_text(yaml.safe_dump(tree))
    jobs = [settings_for(model, []), model_settings(load_settings([]), model)]
    for train in [job.train for job in jobs]:
        assert (train.wait_minutes, train.use_gpu, train.num_workers) == (0, None, 1)
        assert train.lr == 0.25
    asked = settings_for(model, ["--train.wait_minutes", "5", "--train.use_gpu", "true"])
    assert (asked.train.wait_minutes, asked.train.use_gpu) == (5, True)


@pytest.mark.parametrize("asked", ["trained", "a file"])
def test_features_are_those_of_the_cnns_weights_after_these_are_gone(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cnn" / "0123" / WEIGHTS
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    made = Stage("cnn", file.parent, "0123", 0.0, reused=False)
    monkeypatch.setattr(pipeline, "cnn_stage", lambda _: made)
    weights = asked if asked == "trained" else str(file)
    wanted = load_settings(["--workdir", str(tmp_path), "--image.cnn_weights", weights])
    model = tmp_path / "model"
    model.mkdir()
    trained = with_own_cnn(wanted)
    (model / "settings.yaml").write_text(yaml.safe_dump(trained.model_dump(mode="json")))
    assert settings_for(model, ["--image.cnn_weights", str(file)]).image == trained.image
    shutil.rmtree(file.parent)
    settings = with_own_cnn(model_settings(wanted, model))
    digest = weights_digest(settings.image.cnn_weights)
    assert digest == hashlib.sha256(b"weights").hexdigest()
    assert Path(settings.image.cnn_weights).read_bytes() == b"weights"


def test_distill_reads_the_models_own_data_and_takes_what_a_distillation_may_have(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Settings] = []

    def take(settings: Settings, teacher: Path) -> None:
        assert teacher == model
        given.append(settings)
        raise RuntimeError("enough")

    monkeypatch.setattr("acebert.pipeline.distill_stages", take)
    work = runpy.run_path(str(JOBS / "distill.py"))["work"]
    argv = ["--distill.layers", "1", "--train.num_workers", "2"]
    with pytest.raises(RuntimeError, match="enough"):
        work(argparse.Namespace(model=model, settings=argv))
    assert given[0].data.products == str(Path.cwd() / "p.csv")
    assert given[0].workdir == tmp_path / "w"
    assert given[0].model.layers == 1
    assert (given[0].distill.layers, given[0].train.num_workers) == ((1,), 2)
    argv = ["--train.precision", "bf16" if given[0].train.precision == "fp32" else "fp32"]
    with pytest.raises(UserError, match=r"--train\.precision: .* was trained with"):
        work(argparse.Namespace(model=model, settings=argv))


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: no model directory"):
        settings_for(tmp_path, [])


def test_a_stages_pictures_reports_suspicious_pairs_and_numbers_are_in_its_mlflow_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = load_settings(["--workdir", str(tmp_path)])

    def build(out: Path) -> None:
        (out / "grid.png").write_bytes(b"a picture")
        (out / "report.json").write_text('{"photos": {"broken": 3}, "roi": "edges"}')
        for data in ("part-0.arrow", "part-0.parquet", "suspicious.parquet"):
            (out / data).write_bytes(b"data")

    stage = tracked(settings, run_stage(tmp_path, "features", {"of": "photos"}, build))
    run = finished_run(settings, "features", stage.digest)
    assert run is not None
    artifacts = {file.path for file in client(settings).list_artifacts(run.run_id)}
    assert artifacts == {"grid.png", "report.json", "stage.json", "suspicious.parquet"}
    metrics = client(settings).get_run(run.run_id).data.metrics
    assert metrics["photos/broken"] == 3
    assert metrics["seconds"] >= 0
    again = tracked(settings, run_stage(tmp_path, "features", {"of": "photos"}, build))
    assert again.reused
    assert len(client(settings).search_runs(["1"])) == 1
    shutil.rmtree(again.path)
    tracked(settings, run_stage(tmp_path, "features", {"of": "photos"}, build))
    assert len(client(settings).search_runs(["1"])) == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data.hot_queries", "40"], "554 tokens; .* 512 .*--data.hot_queries 40"),
        (["--text.title_tokens", "500"], "632 tokens; .* 512 .*--text.title_tokens 500"),
        (["--text.query_tokens", "511", "--model.hot_queries", "off"], "513 tokens.* 511$"),
    ],
)
def test_texts_longer_than_the_encoder_are_refused_before_anything_is_read(
    argv: list[str], words: str, tmp_path: Path
) -> None:
    settings = load_settings(["--recipe", "acebert_tiny", "--workdir", str(tmp_path), *argv])
    with pytest.raises(UserError, match=words):
        catalogue_stages(settings)
    assert not list(tmp_path.iterdir())


def test_every_stage_that_is_built_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    demo = ["--demo.products", "80", "--demo.searches_per_day", "200", "--demo.days", "4"]
    argv = ["--recipe", "twinbert_tiny", "--workdir", str(tmp_path), "--demo.image_side", "32"]
    settings = load_settings([*argv, *demo, "--text.vocab_size", "300", "--tracking.tag", "mine"])
    catalogue_stages(shared(settings))
    plan_figure_stage(settings)
    built = sorted(path.parent for path in tmp_path.glob("*/[!.]*/stage.json"))
    names = ["demo", "ingest", "plan_figure", "tokens", "vocabulary"]
    assert [stage.parent.name for stage in built] == names
    for stage in built:
        run = finished_run(settings, stage.parent.name, stage.name)
        assert run is not None, stage
        tags = client(settings).get_run(run.run_id).data.tags
        assert tags.get("table") == ("mine" if stage.parent.name == "plan_figure" else None)
        ingested = built[names.index("ingest")].name
        assert tags.get("acebert.data") == (None if stage.parent.name == "demo" else ingested)
