"""The space file: what it says, and everything that can be wrong with it."""

import itertools
import math
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from acebert.config import Settings, load_settings
from acebert.errors import UserError
from acebert.sweep.space import (
    Space,
    Trial,
    check_space,
    corner_trials,
    read_space,
    trials_of,
    why_inert,
    with_leaves,
)

SPACES = Path(__file__).parents[2] / "tune_spaces"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    workdir = tmp_path_factory.mktemp("workdir")
    return load_settings(["--recipe", "acebert_tiny", "--workdir", str(workdir)])


def written(tmp_path: Path, **tree: object) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_spaces_that_we_ship_fit_the_settings(path: Path, base: Settings):
    space = read_space(path)
    check_space(space, base)
    points = space.points or math.prod(len(values) for values in space.vary.values())
    assert len(trials_of(space, base)) == points * len(space.seeds)


def test_the_guides_space_is_one_of_30_random_points_with_3_seeds(base: Settings, tmp_path: Path):
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    _, example = guide.split("```yaml\nvary:")
    (tmp_path / "space.yaml").write_text("vary:" + example.split("```")[0])
    space = read_space(tmp_path / "space.yaml")
    check_space(space, base)
    assert Counter(trial.seed for trial in trials_of(space, base)) == {0: 30, 1: 30, 2: 30}


def test_a_grid_is_every_combination_with_every_seed(base: Settings):
    space = Space(vary={"loss.gamma": [5, 10], "adversary.k": [1, 2, 3]}, seeds=[7, 8])
    expected = [
        ({"loss.gamma": gamma, "adversary.k": k}, seed)
        for gamma, k, seed in itertools.product([5, 10], [1, 2, 3], [7, 8])
    ]
    assert [(trial.point, trial.seed) for trial in trials_of(space, base)] == expected


def test_random_points_lie_in_their_ranges_and_come_from_the_seed(base: Settings):
    space = Space(
        vary={
            "loss.gamma": {"low": 1, "high": 100, "log": True},
            "train.batch_size": {"low": 2, "high": 4},
            "model.pooling": ["cls", "mean"],
        },
        search="random",
        points=400,
    )
    trials = trials_of(space, base)
    assert trials == trials_of(space, base)
    other = trials_of(space, base.model_copy(update={"seed": 1}))
    assert trials != other
    gamma = np.array([t.point["loss.gamma"] for t in trials])
    assert {float(f"{value:.4g}") for value in gamma} == set(gamma)  # as names and recipes say it
    assert gamma.min() >= 1
    assert gamma.max() <= 100
    # Even in the logarithm: half of the draws below 10; ±0.1 is four standard deviations.
    assert np.mean(gamma < 10) == pytest.approx(0.5, abs=0.1)
    assert {t.point["train.batch_size"] for t in trials} == {2, 3, 4}  # both ends, whole numbers
    assert {t.point["model.pooling"] for t in trials} == {"cls", "mean"}


def test_a_trials_settings_are_the_bases_but_for_its_point_and_seed(base: Settings):
    trial = Trial({"loss.gamma": 40, "adversary.k": 2}, seed=3)
    settings = trial.settings(base)
    assert (settings.loss.gamma, settings.adversary.k, settings.seed) == (40, 2, 3)
    assert settings.tracking.run_name == trial.name == "gamma=40 k=2 seed=3"
    put_back = Trial({"loss.gamma": base.loss.gamma, "adversary.k": base.adversary.k}, base.seed)
    assert put_back.settings(settings).model_dump(exclude={"tracking"}) == base.model_dump(
        exclude={"tracking"}
    )


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"vary": {"plan.partition": [1]}}, r"vary\.plan\.partition: there is no such.*partitions"),
        ({"vary": {"plans.partitions": [1]}}, r"vary\.plans\.partitions: there is no such setting"),
        ({"vary": {"loss": [1]}}, r"vary\.loss: there is no such setting"),
        (
            {"vary": {"loss.gama": [1]}},
            r"loss\.gama: .* setting \(loss\.gamma\?\)\. loss has",
        ),
        (
            {"vary": {"gamma": [1]}},
            r"vary\.gamma: .* setting \(loss\.gamma\?\); docs",
        ),
        ({"vary": {"loss.gamma": [1]}, "seeds": 3}, r"seeds: takes a list, e\.g\. \[0, 1, 2\]"),
        ({"vary": {"loss.gamma": []}}, r"vary\.loss\.gamma: an empty list"),
        ({"vary": {}}, "vary: names no setting"),
        ({"vary": {"loss.gamma": 5}}, r"vary\.loss\.gamma: takes a list of values or"),
        ({"vary": {"loss.gamma": ["big"]}}, "loss.gamma.*'big'"),
        ({"vary": {"loss.gamma": [-1]}}, "loss.gamma.*greater than 0"),
        ({"vary": {"train.batch_size": [1.5]}}, "train.batch_size.*integer"),
        ({"vary": {"seed": [1, 2]}}, "list the seeds under seeds:"),
        ({"vary": {"workdir.x": ["/tmp"]}}, r"vary\.workdir\.x: can be varied: settings of"),
        ({"vary": {"data.products": ["a"]}}, "can be varied: settings of"),
        ({"vary": {"train.num_workers": [1, 2]}}, "how a training runs, not what comes out"),
        ({"vary": {"loss.gamma": {"low": 1, "high": 9}}}, "a range, but search: grid"),
        (
            {"vary": {"loss.gamma": {"low": 9, "high": 1}}, "search": "random", "points": 3},
            "low 9 must be below high 1",
        ),
        (
            {"vary": {"model.pooling": {"low": 1, "high": 2}}, "search": "random", "points": 3},
            r"model\.pooling: a range, but this setting is no number",
        ),
        (
            {"vary": {"train.lr": {"low": 0, "high": 1, "log": True}}, "search": "random"},
            "log: true needs low above 0",
        ),
        ({"vary": {"train.lr": [1e-3]}, "search": "optuna"}, "needs to know how many"),
        ({"vary": {"train.lr": [1e-3]}, "points": 4}, "grid takes every combination"),
        ({"vary": {"train.lr": [1e-3]}, "metric": "ndcg"}, "metric: .*'recall_100' or 'gauc'"),
        ({"vary": {"train.lr": [1e-3]}, "seeds": []}, "seeds: must be at least one"),
        ({"vary": {"train.lr": [1e-3]}, "seeds": [1, 1]}, "seeds: must be at least one, each once"),
        ({"vary": {"train.lr": [1e-3]}, "sampler": "x"}, "sampler: there is no such key; a space"),
        (
            {
                "vary": {"train.lr": [1e-3]},
                **{"seeds": [0, 1], "asha": {"first_rung": 5}},
            },
            "asha: a point is judged by its mean",
        ),
        (
            {
                "vary": {"text.title_tokens": {"low": 4, "high": 32}},
                **{"search": "optuna", "points": 3},
            },
            "new text stages between trials",
        ),
        (
            {
                "vary": {"pretrain.lr": {"low": 1e-5, "high": 1e-3}},
                **{"search": "optuna", "points": 3},
            },
            "new pretrain stages between trials",
        ),
        (
            {"vary": {"train.lr": [1e-3]}, "metric": "gauc"},
            r"metric: gauc, but a trial keeps .* by --train\.valid_metric recall_100",
        ),
    ],
)
def test_what_is_wrong_is_named(
    tree: dict[str, object], words: str, tmp_path: Path, base: Settings
):
    with pytest.raises(UserError, match=words):
        check_space(read_space(written(tmp_path, **tree)), base)


@pytest.mark.parametrize(
    ("leaf", "values", "others", "words"),
    [
        ("adversary.k", [1, 5], {"adversary.form": "off"}, "adversary.form is off"),
        (
            "image.pixel_source",
            ["roi", "photo"],
            {"model.patches": False, "model.pixels": False},
            "neither model.patches nor model.pixels",
        ),
        ("cnn.lr", [1e-3], {"image.cnn_weights": "random"}, "no CNN is trained"),
        ("pretrain.lr", [1e-3], {"model.start": "backbone"}, "model.start is backbone"),
        ("model.image_attention_bias", [-4, 0], {"model.start": "pretrain"}, "it is 0"),
        ("plan.batches_per_partition", [1, 65], {"plan.partitions": 3}, "plan.partitions is 3"),
        ("model.width", [32, 64], {"model.backbone": "bert"}, "backbone bert brings its own"),
        ("text.vocab_size", [400], {"model.backbone": "bert"}, "backbone bert brings its own"),
        ("loss.hard_negative_ranks", [[1, 9]], {"loss.hard_negatives": 0}, "hard_negatives is 0"),
    ],
)
def test_a_setting_that_does_nothing_beside_the_others_is_refused(
    leaf: str, values: list[object], others: dict[str, object], words: str, base: Settings
):
    with pytest.raises(UserError, match=f"vary.{leaf}: all its values train the same: .*{words}"):
        check_space(Space(vary={leaf: values}), with_leaves(base, others))


def test_a_setting_that_does_something_beside_some_values_of_another_is_not_refused(
    base: Settings,
):
    vary = {"adversary.form": ["off", "minimax"], "adversary.k": [1, 5]}
    space = Space(vary=vary)
    check_space(space, base)
    why = [why_inert("adversary.k", trial.settings(base)) for trial in trials_of(space, base)]
    assert why == ["adversary.form is off", "adversary.form is off", None, None]
    with pytest.raises(UserError, match=r"adversary\.k: all its values train the same"):
        check_space(Space(vary={**vary, "adversary.form": ["off"]}), base)


@pytest.mark.parametrize(("batch", "steps"), [(32, 120), (64, 60), (96, 40), (100_000, 1)])
def test_trials_of_any_batch_size_are_validated_after_as_many_pairs(
    batch: int, steps: int, base: Settings
):
    of = with_leaves(base, {"train.batch_size": 64, "train.validate_every": 60})
    trial = Trial({"train.batch_size": batch}, seed=0)
    assert trial.settings(of).train.validate_every == steps
    both = Trial({"train.batch_size": batch, "train.validate_every": 7}, seed=0)
    assert both.settings(of).train.validate_every == 7


def test_optuna_takes_no_ranges_of_an_encoder_that_is_pre_trained(base: Settings):
    space = Space(vary={"model.dropout": {"low": 0, "high": 0.5}}, search="optuna", points=3)
    check_space(space, base)
    with pytest.raises(UserError, match=r"model\.dropout: Optuna would ask for new pretrain"):
        check_space(space, with_leaves(base, {"model.start": "pretrain"}))


def test_the_bounds_of_a_search_over_many_lists_are_few():
    lists = {f"loss.x{number}": list(range(10)) for number in range(8)}
    ranges = {"loss.gamma": {"low": 1, "high": 2}, "train.lr": {"low": 3, "high": 4}}
    space = Space(vary={**lists, **ranges}, search="random", points=3)
    points = [trial.point for trial in corner_trials(space)]
    assert len(points) == 4 * (1 + 8 * 9)
    ends = {(point["loss.gamma"], point["train.lr"]) for point in points}
    assert ends == {(1, 3), (1, 4), (2, 3), (2, 4)}
    for leaf, values in lists.items():
        assert {point[leaf] for point in points} == set(values)


def test_the_job_refuses_a_wrong_space_by_a_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    space = written(tmp_path, vary={"plan.partition": [1]})
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--space", str(space)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SPACES.parent / "ray_jobs" / "sweep.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: vary.plan.partition: there is no such")


def test_a_space_that_is_not_there_or_no_yaml_is_said_so(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.yaml: no such file"):
        read_space(tmp_path / "gone.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("vary: [")
    with pytest.raises(UserError, match=r"bad\.yaml: not valid YAML"):
        read_space(bad)
    bad.write_text("- 1")
    with pytest.raises(UserError, match="a space is a mapping"):
        read_space(bad)


def test_a_trials_name_tells_two_leaves_of_one_name_apart():
    trial = Trial({"train.lr": 0.001, "adversary.lr": 0.01, "loss.gamma": 20}, seed=0)
    assert trial.name == "train.lr=0.001 adversary.lr=0.01 gamma=20 seed=0"


def test_two_values_have_two_names_however_close_they_are():
    names = {Trial({"train.lr": lr}, seed=0).name for lr in (0.00012345, 0.00012346)}
    assert names == {"lr=0.00012345 seed=0", "lr=0.00012346 seed=0"}
