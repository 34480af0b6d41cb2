"""What a sweep leaves, from outcomes written by hand."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from acebert.config import load_settings
from acebert.errors import UserError
from acebert.sweep import figure
from acebert.sweep.children import run_metrics
from acebert.sweep.figure import sweep_figure
from acebert.sweep.records import Records
from acebert.sweep.results import best, refuse_failures, table_text, write_recipe, write_table
from acebert.sweep.space import Space, Trial
from acebert.sweep.trials import Outcome

LEAF = "plan.batches_per_partition"


def outcome(per_partition: float, seed: int, recall: float, status: str = "finished") -> Outcome:
    """Of 1,000 batches (n/W)."""
    result = {
        "recall_100": recall,
        "gauc": 0.7,
        "partitions": round(1000 / per_partition),
        "batches_per_partition": per_partition,
        "hard_share": 0.1 + per_partition / 2000,
    }
    reason = None if status == "finished" else "out of luck"
    return Outcome(Trial({LEAF: per_partition}, seed), status, result, 5.0, reason)  # type: ignore[arg-type]


SPACE = Space(vary={LEAF: [1, 10, 100]}, seeds=(0, 1))
OUTCOMES = [
    *(outcome(1, 0, 0.30), outcome(1, 1, 0.32)),
    *(outcome(10, 0, 0.36), outcome(10, 1, 0.38)),
    *(outcome(100, 0, 0.50), outcome(100, 1, 0.50, "failed")),
]


def test_best_is_by_the_mean_of_all_seeds_and_a_lost_seed_falls_behind():
    winner = best(SPACE, OUTCOMES)
    assert winner is not None
    assert [(o.trial.point[LEAF], o.trial.seed) for o in winner] == [(10, 0), (10, 1)]
    lone = best(SPACE, OUTCOMES[-2:])  # better than nothing
    assert lone is not None
    assert [o.trial.seed for o in lone] == [0]
    assert best(SPACE, OUTCOMES[-1:]) is None


def test_the_table_has_means_spreads_and_reasons():
    text = table_text(SPACE, OUTCOMES)
    spread = np.std([0.36, 0.38], ddof=1)
    assert f"0.370 ±{spread:.3f}" in text
    assert "1 of 2" in text
    assert "batches_per_partition=100 seed=1 failed: out of luck" in text
    assert text.rstrip().endswith("best: batches_per_partition=10")


def test_trials_parquet_has_a_row_a_trial_and_takes_settings_of_any_type(tmp_path: Path):
    mixed = [
        Outcome(Trial({"train.max_steps": value}, 0), "finished", {"recall_100": 0.1}, 1.0)
        for value in (None, 5)
    ] + [Outcome(Trial({"train.max_steps": "x"}, 0), "failed", {}, 1.0, "no number")]
    write_table(SPACE, OUTCOMES, tmp_path / "trials.parquet")
    rows = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert len(rows) == 6
    assert rows[2][LEAF] == 10
    assert rows[2]["partitions"] == 100
    assert rows[5]["reason"] == "out of luck"
    space = Space(vary={"train.max_steps": [None, 5, "x"]})
    write_table(space, mixed, tmp_path / "trials.parquet")
    steps = pq.read_table(tmp_path / "trials.parquet")["train.max_steps"]
    assert steps.to_pylist() == [None, "5", "x"]


def test_rows_are_in_the_spaces_order_whatever_ended_first(tmp_path: Path):
    write_table(SPACE, OUTCOMES[::-1], tmp_path / "trials.parquet")
    rows = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [(row[LEAF], row["seed"]) for row in rows] == [
        (o.trial.point[LEAF], o.trial.seed) for o in OUTCOMES
    ]
    lines = [line for line in table_text(SPACE, OUTCOMES[::-1]).splitlines() if "of 2" in line]
    assert [line.split("│")[1].strip() for line in lines] == ["1", "10", "100"]
    between = Space(vary={"loss.gamma": {"low": 1, "high": 90}}, search="random", points=3)
    drawn = [
        Outcome(Trial({"loss.gamma": gamma}, 0), "finished", {"recall_100": 0.1}, 1.0)
        for gamma in (22.9, 36.3, 9.5)
    ]
    write_table(between, drawn, tmp_path / "trials.parquet")
    gammas = pq.read_table(tmp_path / "trials.parquet")["loss.gamma"]
    assert gammas.to_pylist() == [9.5, 22.9, 36.3]


def test_a_point_that_waits_for_its_other_seed_is_told_from_a_whole_one():
    assert "1 of 2" in table_text(SPACE, OUTCOMES[:1])


def test_seconds_are_of_training_also_of_what_was_trained_before():
    trained = replace(OUTCOMES[0], seconds=94, result={**OUTCOMES[0].result, "train_seconds": 70})
    before = replace(trained, trial=Trial({LEAF: 1}, 1), seconds=2)
    (row,) = [line for line in table_text(SPACE, [trained, before]).splitlines() if "of 2" in line]
    assert row.split("│")[-2].strip() == "70"


def test_a_sweep_whose_trials_failed_ends_with_an_error(tmp_path: Path):
    write_table(SPACE, OUTCOMES[:5], tmp_path / "trials.parquet")
    refuse_failures(tmp_path)
    write_table(SPACE, OUTCOMES, tmp_path / "trials.parquet")
    with pytest.raises(UserError, match=r"1 of 6 trials failed, .*report\.txt says why"):
        refuse_failures(tmp_path)


def test_the_recipe_gives_back_the_settings_of_the_points_best_trial(tmp_path: Path):
    base = load_settings(["--recipe", "acebert_tiny", "--workdir", str(tmp_path), "--seed", "9"])
    write_recipe("toy", SPACE, OUTCOMES[2:4], base, tmp_path / "best.yaml")
    head = (tmp_path / "best.yaml").read_text().splitlines()[0]
    assert head.startswith("# Best of the sweep toy, batches_per_partition=10: ")
    assert head.endswith(": Recall@100 0.370 ±0.014 (validation day)")
    argv = ["--recipe", str(tmp_path / "best.yaml"), "--workdir", str(tmp_path)]
    again, wanted = load_settings(argv), OUTCOMES[3].trial.settings(base)
    assert (again.plan.batches_per_partition, again.seed) == (10, 1)
    without = {"recipe", "tracking"}
    assert again.model_dump(exclude=without) == wanted.model_dump(exclude=without)


def test_records_survive_the_process_and_keep_the_order_of_starts(tmp_path: Path):
    records = Records(tmp_path)
    for one in OUTCOMES[:3]:
        records.put(Outcome(one.trial, "running", {}, 0.0))
    records.put(OUTCOMES[1])
    again = Records(tmp_path)
    assert [o.trial for o in again.all.values()] == [o.trial for o in OUTCOMES[:3]]
    assert again.ended() == [OUTCOMES[1]]
    again.put(OUTCOMES[5])
    assert [o.trial for o in Records(tmp_path).all.values()][-1] == OUTCOMES[5].trial


def test_mlflow_names_of_a_result_are_in_groups():
    result = {**OUTCOMES[0].result, "test_gauc": 0.6, "model": "path"}
    assert run_metrics(result) == {
        **{"best/gauc": 0.7, "best/recall_100": 0.30, "test/gauc": 0.6},
        **{"plan/partitions": 1000, "plan/batches_per_partition": 1, "plan/hard_share": 0.1005},
    }


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> plt.Figure:
    """The figure of OUTCOMES, kept open."""
    monkeypatch.setattr(figure.plt, "close", lambda _: None)
    sweep_figure("toy", SPACE, OUTCOMES, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    return plt.gcf()


def test_the_figure_draws_means_against_p_with_the_papers_best_at_its_n_over_pw(drawn: plt.Figure):
    gauc, recall, hard = drawn.axes[:3]
    assert [axes.get_ylabel() for axes in (gauc, recall, hard)] == [
        *("GAUC", "Recall@100"),
        "hard share of a batch",
    ]
    assert recall.get_xscale() == "log"
    lines = {line.get_label(): line for line in recall.get_lines()}
    np.testing.assert_allclose(lines["validation day"].get_xdata(), [10, 100, 1000])  # P
    np.testing.assert_allclose(lines["validation day"].get_ydata(), [0.50, 0.37, 0.31])
    upright = [
        line.get_xdata()[0] for line in recall.get_lines() if len(set(line.get_xdata())) == 1
    ]
    assert 1000 / 65 in [pytest.approx(x) for x in upright]  # n/(P·W) = 65 of 1,000 batches
    (second,) = gauc.child_axes
    assert second.get_xlabel().startswith("n/(P·W)")
    forward, _ = second._functions
    np.testing.assert_allclose(forward(np.array([10, 100, 1000])), [100, 10, 1])


def test_the_axis_of_n_over_pw_has_its_ticks_where_p_has_them(drawn: plt.Figure):
    gauc, _, hard = drawn.axes[:3]
    (second,) = gauc.child_axes
    drawn.canvas.draw()
    low, high = hard.get_xlim()
    below = [x for x in hard.get_xticks() if low <= x <= high]
    assert set(below) >= {10, 100, 1000}
    np.testing.assert_allclose(second.get_xticks(), [1000 / x for x in below])


def test_the_papers_best_is_not_drawn_where_the_data_has_no_partition_as_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(figure.plt, "close", lambda _: None)
    few = [  # of 60 batches
        replace(o, result={**o.result, "partitions": 60 // per, "batches_per_partition": per})
        for o, per in zip(OUTCOMES[:4], (1, 1, 10, 10), strict=True)
    ]
    sweep_figure("few", SPACE, few, tmp_path / "sweep.png")
    texts = [text.get_text() for axes in plt.gcf().axes for text in axes.texts]
    assert not any("paper's best" in text for text in texts)
    assert plt.gcf().axes[0].get_xlim()[0] > 1


def test_a_band_ends_where_a_share_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figure.plt, "close", lambda _: None)
    wide = [
        replace(o, result={**o.result, "recall_100": recall})
        for o, recall in zip(OUTCOMES[:4], (0.1, 0.9, 0.2, 0.8), strict=True)
    ]
    low, high = figure._interval(wide[:2], "recall_100") or (0, 0)
    assert low < 0
    assert high > 1
    sweep_figure("wide", SPACE, wide, tmp_path / "sweep.png")
    (band,) = plt.gcf().axes[1].collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (0, 1)


def test_a_hard_share_that_only_the_draw_of_plans_changes_is_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(figure.plt, "close", lambda _: None)
    alike = [
        replace(o, result={**o.result, "hard_share": 0.2 + o.trial.seed / 100}) for o in OUTCOMES
    ]
    sweep_figure("alike", SPACE, alike, tmp_path / "sweep.png")
    assert [axes.get_ylabel() for axes in plt.gcf().axes] == ["GAUC", "Recall@100"]


def test_a_range_that_is_searched_by_its_logarithm_is_drawn_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(figure.plt, "close", lambda _: None)
    leaf = "loss.gamma"
    outcomes = [
        Outcome(Trial({leaf: gamma}, 0), "finished", {"recall_100": 0.3}, 1.0)
        for gamma in (22.9, 36.3)
    ]
    for log, scale in ((True, "log"), (False, "linear")):
        vary = {leaf: {"low": 5, "high": 80, "log": log}}
        space = Space(vary=vary, search="random", points=2)
        sweep_figure("gamma", space, outcomes, tmp_path / "sweep.png")
        assert plt.gcf().axes[0].get_xscale() == scale


def test_the_validation_interval_is_students():
    low, high = figure._interval(OUTCOMES[2:4], "recall_100") or (0, 0)
    of = [0.36, 0.38]
    expected = stats.t.interval(0.95, 1, np.mean(of), stats.sem(of))
    assert (low, high) == pytest.approx(expected)
    assert figure._interval(OUTCOMES[:1], "recall_100") is None


def test_nothing_beside_numbers_is_drawn_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figure.plt, "close", lambda _: None)
    leaf = "train.max_steps"
    outcomes = [
        Outcome(Trial({leaf: value}, 0), "finished", {"recall_100": y, "hard_share": y}, 1.0)
        for value, y in ((100, 0.3), (None, 0.2), (20, 0.1))
    ]
    sweep_figure("steps", Space(vary={leaf: [100, None, 20]}), outcomes, tmp_path / "sweep.png")
    recall, hard = plt.gcf().axes
    plt.gcf().canvas.draw()
    assert [label.get_text() for label in hard.get_xticklabels()] == ["100", "None", "20"]
    best_by = next(line for line in recall.get_lines() if "best by" in str(line.get_label()))
    assert list(recall.convert_xunits(best_by.get_xdata())) == [0, 0]


def test_where_the_batch_size_varies_too_there_is_no_axis_of_one_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(figure.plt, "close", lambda _: None)
    vary = {LEAF: [1, 10], "train.batch_size": [32, 64]}
    outcomes = [
        replace(one, trial=Trial({**one.trial.point, "train.batch_size": size}, 0))
        for one in (OUTCOMES[0], OUTCOMES[2])
        for size in (32, 64)
    ]
    sweep_figure("toy", Space(vary=vary), outcomes, tmp_path / "sweep.png")
    assert plt.gcf().axes[0].child_axes == []
    texts = [text.get_text() for axes in plt.gcf().axes for text in axes.texts]
    assert not any("paper's best" in text for text in texts)
