"""Settings of jobs that use a trained model; runs of what the jobs build."""

from pathlib import Path

import pytest
import yaml

from acebert.config import load_settings
from acebert.errors import UserError
from acebert.pipeline import catalogue_stages, plan_figure_stage, settings_for, tracked
from acebert.tracking import client, finished_run, shared
from acebert.workdir import run_stage


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


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: no model directory"):
        settings_for(tmp_path, [])


def test_a_stages_pictures_reports_and_numbers_are_in_its_mlflow_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = load_settings(["--workdir", str(tmp_path)])

    def build(out: Path) -> None:
        (out / "grid.png").write_bytes(b"a picture")
        (out / "report.json").write_text('{"photos": {"broken": 3}, "roi": "edges"}')
        (out / "part-0.arrow").write_bytes(b"data")

    stage = tracked(settings, run_stage(tmp_path, "features", {"of": "photos"}, build))
    run = finished_run(settings, "features", stage.digest)
    assert run is not None
    artifacts = {file.path for file in client(settings).list_artifacts(run.run_id)}
    assert artifacts == {"grid.png", "report.json", "stage.json"}
    metrics = client(settings).get_run(run.run_id).data.metrics
    assert metrics["photos/broken"] == 3
    assert metrics["seconds"] >= 0
    again = tracked(settings, run_stage(tmp_path, "features", {"of": "photos"}, build))
    assert again.reused
    assert len(client(settings).search_runs(["1"])) == 1


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
