"""A comparison as its user runs it, and a model measured again, on a small demo."""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from acebert import pipeline
from acebert.config import Settings, load_settings
from acebert.errors import UserError
from acebert.evaluation.evaluate import BASELINES
from acebert.tracking import client
from acebert.workdir import Stage

ROOT = Path(__file__).parents[2]
SMALL = [
    *["--demo.products", "80", "--demo.searches_per_day", "200", "--demo.days", "4"],
    *["--model.width", "32", "--model.heads", "2", "--model.layers", "1", "--eval.bootstrap", "50"],
    *["--text.vocab_size", "300", "--train.batch_size", "32", "--train.max_steps", "4"],
    *["--train.valid_products", "50", "--train.threads_per_worker", "1"],
]


def job(script: str, *argv: str) -> list[str]:
    """Lines that a job prints."""
    done = subprocess.run(
        [sys.executable, f"ray_jobs/{script}", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


def settings_yaml(directory: Path, *argv: str) -> str:
    """The settings.yaml of a model that was trained with these settings."""
    directory.mkdir()
    tree = load_settings(argv).model_dump(mode="json", exclude={"tracking"})
    (directory / "settings.yaml").write_text(yaml.safe_dump(tree))
    return str(directory / "settings.yaml")


@pytest.mark.usefixtures("ray_cluster")
def test_rows_without_training_are_measured_on_the_data_of_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Settings] = []

    def measure(settings: Settings) -> None:
        asked.append(settings)
        raise UserError("enough")

    monkeypatch.setattr(pipeline, "baselines_stage", measure)
    recipe = settings_yaml(
        tmp_path / "m",
        *["--workdir", str(tmp_path / "w"), "--data.products", "shop.csv"],
        *["--data.impressions", "log.csv", "--eval.ks", "5"],
    )
    arguments = argparse.Namespace(recipes=[recipe], seeds=[0], settings=[])
    work = runpy.run_path(str(ROOT / "ray_jobs" / "compare.py"))["work"]
    with pytest.raises(UserError, match="enough"):
        work(arguments)
    of_recipe = load_settings(["--recipe", recipe])
    assert [(s.workdir, s.data, s.eval) for s in asked] == [
        (of_recipe.workdir, of_recipe.data, of_recipe.eval)
    ]


@pytest.mark.parametrize(
    ("leaf", "values"),
    [
        ("workdir", ("/a", "/b")),
        ("data.max_bad_share", ("0.1", "0.2")),
        ("demo.products", ("80", "90")),
        ("eval.head_share", ("0.5", "0.6")),
    ],
)
def test_recipes_that_read_other_data_or_measure_otherwise_are_refused_by_the_setting(
    leaf: str, values: tuple[str, str], tmp_path: Path
) -> None:
    recipes = [
        settings_yaml(tmp_path / name, f"--{leaf}", value)
        for name, value in zip("ab", values, strict=True)
    ]
    shared = runpy.run_path(str(ROOT / "ray_jobs" / "compare.py"))["shared_settings"]
    with pytest.raises(UserError, match=rf"--{leaf}: {values[0]} in .*, {values[1]} in "):
        shared(recipes, [])
    assert getattr(shared(recipes, [f"--{leaf}", values[0]]), leaf.split(".")[0])


@pytest.mark.parametrize(
    ("seeds", "argv", "reason"),
    [
        ([0, 0], [], "--seeds 0 0: a seed is given twice"),
        ([0], ["--seed", "3"], "--seed: each row's own"),
        ([0], ["--pretrain.seed=3"], "--pretrain.seed: each row's own"),
    ],
)
def test_seeds_that_are_no_rows_own_are_refused(
    seeds: list[int], argv: list[str], reason: str
) -> None:
    given = argparse.Namespace(recipes=["twinbert_tiny"], seeds=seeds, settings=argv)
    with pytest.raises(UserError, match=reason):
        runpy.run_path(str(ROOT / "ray_jobs" / "compare.py"))["work"](given)


def test_two_models_whose_settings_have_one_file_name_are_two_rows() -> None:
    names = runpy.run_path(str(ROOT / "ray_jobs" / "compare.py"))["row_names"]
    recipes = ["a/settings.yaml", "b/settings.yaml", "my/own.yaml", "acebert_tiny"]
    assert names(recipes) == ["a/settings.yaml", "b/settings.yaml", "own", "acebert_tiny"]


def test_seconds_are_told_of_every_stage_behind_a_row_pre_training_and_cnn_among_them() -> None:
    table = runpy.run_path(str(ROOT / "ray_jobs" / "compare.py"))["seconds_table"]

    def stages(**seconds: float) -> list[Stage]:
        return [Stage(name, Path(name), name, s, reused=True) for name, s in seconds.items()]

    crops = Stage("features", Path("crops"), "crops", 30.0, reused=False)
    spent = {
        "rows without training": stages(demo=1.5, ingest=2.5, evaluate=3.5),
        "cebert": [*stages(ingest=2.5, features=4.0, cnn=50.0, pretrain=60.0, finetune=7.0), crops],
    }
    lines = [line.replace("│", " ").replace("┃", " ").split() for line in table(spent).splitlines()]
    shown = ["demo", "ingest", "features", "cnn", "pretrain", "finetune", "evaluate"]
    assert ["row", *shown] in lines
    assert ["rows", "without", "training", "1.5", "2.5", "-", "-", "-", "-", "3.5"] in lines
    assert ["cebert", "-", "2.5", "34.0", "50.0", "60.0", "7.0", "-"] in lines


@pytest.mark.slow
def test_a_comparison_ends_with_a_table_pictures_and_commands_and_is_a_table_in_mlflow(
    tmp_path: Path,
) -> None:
    workdir = tmp_path / "w"
    lines = job("compare.py", "--recipes", "twinbert_tiny", "--workdir", str(workdir), *SMALL)
    table = {words[1] for line in lines if len(words := line.split()) > 2 and words[0] == "│"}
    assert {*BASELINES, "twinbert_tiny"} <= table
    (stage,) = (p for p in (workdir / "evaluate").iterdir() if (p / BASELINES[0]).is_dir())
    recall = {
        name: json.loads((stage / name / "metrics.json").read_text())["overall"].get("recall_100")
        for name in BASELINES
    }
    best = max((name for name in BASELINES if recall[name] is not None), key=recall.__getitem__)
    assert any(line.startswith(f"twinbert_tiny − {best}: difference") for line in lines)
    (said,) = (line for line in lines if line.startswith("pictures: "))
    pictures = [Path(path) for path in said.removeprefix("pictures: ").split(", ")]
    assert all(path.stat().st_size > 10_000 for path in pictures)
    stages = {"demo", "ingest", "tokens", "plan", "finetune", "embed", "evaluate"}
    assert any(stages <= {*line.split()} for line in lines)
    next_commands = lines[lines.index("Next, try:") + 1 :]
    assert len(next_commands) == 3
    assert all(SMALL[0] in command for command in next_commands[1:])

    settings = load_settings(["--workdir", str(workdir)])
    mlflow = client(settings)
    experiment = mlflow.get_experiment_by_name(settings.tracking.experiment).experiment_id
    rows = mlflow.search_runs([experiment], "tags.table = 'compare'")
    scored = {run.info.run_name: run.data.metrics["overall/gauc"] for run in rows}
    (ingested,) = (workdir / "ingest").glob("[!.]*")
    assert {run.data.tags["acebert.data"] for run in rows} == {ingested.name}
    (ours,) = scored.keys() - set(BASELINES)
    assert ours.startswith("evaluate twinbert_tiny, seed 0, ")

    drawn = mlflow.search_runs([experiment], "tags.`acebert.stage` = 'compare'")
    assert [run.info.run_name for run in drawn] == [f"compare {pictures[0].parent.name[:6]}"]
    artifacts = {file.path for file in mlflow.list_artifacts(drawn[0].info.run_id)}
    assert artifacts == {"compare.png", "curves.png", "stage.json"}
    assert drawn[0].data.tags["acebert.data"] == ingested.name

    (model,) = (workdir / "finetune").glob("[!.]*")
    measured = job("evaluate.py", "--workdir", str(workdir), "--model", str(model), *SMALL[-8:])
    metrics = json.loads((Path(measured[-1]) / "metrics.json").read_text())
    assert metrics["overall"]["gauc"] == pytest.approx(scored[ours])
    assert pq.read_metadata(model / "history.parquet").num_rows == 4
