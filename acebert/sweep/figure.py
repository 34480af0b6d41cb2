"""The metrics against what a sweep varied, as the paper's Fig. 5 draws the partition number.

A column a varied setting, a row a metric and one for the hard share of the batches. Dots are
trials, the line is the mean over seeds; of the test day, the band is the 95 % interval over seeds
and queries (`acebert.evaluation.significance`), of the validation day Student's t over the seeds.
Both end where a share does, at 0 and 1.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from acebert.data.plan_arithmetic import PAPER_BATCHES_PER_PARTITION
from acebert.evaluation.tables import interval_of_seeds
from acebert.sweep.results import METRICS, best
from acebert.sweep.space import Range, Space
from acebert.sweep.trials import Outcome, points_tried

Place = Callable[[Outcome], Any]
"""where a trial lies on the axis of a setting"""
PARTITION_LEAVES = ("plan.partitions", "plan.batches_per_partition")
VALID, TEST, HARD = "#1f5fa8", "#d1495b", "#59a14f"
FEW = 8  # values that are each marked on the axis
BANDS = "\nbands: 95 %, over seeds (validation day), over seeds and queries (test day)"
SAME_SHARE = 0.02  # between plans of one kind, by their draw
LOG_FROM = 8  # values that span more than this factor are drawn on a logarithmic axis


def sweep_figure(name: str, space: Space, outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw `sweep.png`; where no trial finished, nothing is drawn."""
    finished = [o for o in outcomes if o.status == "finished"]
    if not finished:
        return
    rows = [metric for metric in METRICS if metric in finished[0].result]
    shares = [o.result["hard_share"] for o in finished if "hard_share" in o.result]
    if shares and max(shares) - min(shares) > SAME_SHARE:
        rows.append("hard_share")
    figure, grid = plt.subplots(
        len(rows),
        len(space.vary),
        figsize=(1.5 + 5.5 * len(space.vary), 1 + 2.9 * len(rows)),
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    for column, leaf in enumerate(space.vary):
        alone = len(space.vary) == 1
        place = _axis(leaf, finished)
        for axes, row in zip(grid[:, column], rows, strict=True):
            _draw(axes, place, row, finished, alone)
        winner = best(space, outcomes)
        if winner is not None:
            x = place(winner[0])
            label = f"best by {METRICS[space.metric]}"
            for axes in grid[:, column]:
                axes.axvline(x, color="0.6", linewidth=1, linestyle="--", zorder=0, label=label)
        _label_x(list(grid[:, column]), leaf, space, place, finished)
    if len(space.seeds) > 1:
        grid[0, 0].plot([], [], ".", color="0.5", alpha=0.5, label="one seed")
    grid[0, 0].legend(frameon=False, fontsize=8)
    seeds = len(space.seeds)
    title = f"{name}: {len(finished)} trials, {seeds} seed{'s' if seeds > 1 else ''}"
    figure.suptitle(title + (BANDS if len(space.vary) == 1 and seeds > 1 else ""))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _axis(leaf: str, finished: Sequence[Outcome]) -> Place:
    """Partitions lie by their number P, whatever leaf sets it; values that are not all numbers lie
    as text."""

    def place(outcome: Outcome) -> Any:
        if leaf in PARTITION_LEAVES and "partitions" in outcome.result:
            return outcome.result["partitions"]
        return outcome.trial.point[leaf]

    if all(_is_number(place(outcome)) for outcome in finished):
        return place
    return lambda outcome: str(place(outcome))


def _draw(axes: Axes, place: Place, row: str, finished: Sequence[Outcome], alone: bool) -> None:
    if row == "hard_share":
        points = list(dict.fromkeys((place(o), o.result["hard_share"]) for o in finished))
        if _is_number(points[0][0]):
            points.sort()
        axes.plot(*zip(*points, strict=True), "o-" if alone else "o", color=HARD, markersize=4)
        axes.set(ylabel="hard share of a batch", ylim=(0, 1))
    else:
        _draw_metric(axes, place, row, "validation day", VALID, finished, alone)
        tested = [o for o in finished if f"test_{row}" in o.result]
        if tested:
            _draw_metric(axes, place, f"test_{row}", "test day", TEST, tested, alone)
        axes.set_ylabel(METRICS[row])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_metric(
    axes: Axes,
    place: Place,
    metric: str,
    label: str,
    colour: str,
    finished: Sequence[Outcome],
    alone: bool,
) -> None:
    xs = [place(o) for o in finished]
    axes.plot(xs, [o.result[metric] for o in finished], ".", color=colour, alpha=0.5)
    if not alone:  # other settings differ between these dots: a line would say too much
        axes.plot([], [], ".", color=colour, label=label)
        return
    points = points_tried(finished)
    if _is_number(xs[0]):  # text lies in the order of its first dots
        points.sort(key=lambda of: place(of[0]))
    at = [place(of[0]) for of in points]
    mean = [float(np.mean([o.result[metric] for o in of])) for of in points]
    axes.plot(at, mean, "o-", color=colour, markersize=5, label=label)
    bounds = [_interval(of, metric) for of in points]
    if all(bound is not None for bound in bounds):
        low, high = zip(*(b for b in bounds if b is not None), strict=True)
        band = np.clip(low, 0, 1), np.clip(high, 0, 1)
        axes.fill_between(at, *band, color=colour, alpha=0.15, linewidth=0)


def _interval(trials: Sequence[Outcome], metric: str) -> tuple[float, float] | None:
    """95 % interval of a point's mean; None with one seed and no test day."""
    if metric.startswith("test_"):
        rows = [Path(o.result["test_row"]) for o in trials]
        drawn = interval_of_seeds(rows, metric.removeprefix("test_"))
        return drawn.low, drawn.high
    of = [o.result[metric] for o in trials]
    if len(of) < 2:
        return None
    half = stats.t.ppf(0.975, len(of) - 1) * np.std(of, ddof=1) / np.sqrt(len(of))
    return float(np.mean(of) - half), float(np.mean(of) + half)


def _label_x(
    column: Sequence[Axes], leaf: str, space: Space, place: Place, finished: Sequence[Outcome]
) -> None:
    top, bottom = column[0], column[-1]
    numbers = [x for o in finished if _is_number(x := place(o))]
    varied = space.vary[leaf]
    searched_so = isinstance(varied, Range) and varied.log
    if (
        len(numbers) == len(finished)
        and min(numbers) > 0
        and (searched_so or max(numbers) > LOG_FROM * min(numbers))
    ):
        bottom.set_xscale("log")
        if len(set(numbers)) <= FEW:
            bottom.set_xticks(sorted(set(numbers)))
            bottom.minorticks_off()
        bottom.xaxis.set_major_formatter("{x:,g}")
    if leaf not in PARTITION_LEAVES or "partitions" not in finished[0].result:
        bottom.set_xlabel(leaf)
        return
    bottom.set_xlabel("partitions P")
    if len({o.trial.point.get("train.batch_size") for o in finished}) > 1:
        return  # n/(P·W) is another axis for each W
    result = finished[0].result
    batches = result["partitions"] * result["batches_per_partition"]  # n / W

    def other(x: Any) -> Any:
        return batches / np.maximum(x, 1e-9)  # its own inverse; the axis asks for 0 too

    paper = batches / PAPER_BATCHES_PER_PARTITION
    if paper >= 1:  # else the data has fewer batches than one of the paper's partitions
        _mark_paper(column, paper)
    second = top.secondary_xaxis("top", functions=(other, other))
    low, high = bottom.get_xlim()
    second.set_xticks([other(x) for x in bottom.get_xticks() if x > 0 and low <= x <= high])
    second.xaxis.set_major_formatter(lambda x, _: f"{x:,.3g}" if x < 1000 else f"{x:,.0f}")
    second.minorticks_off()
    second.set_xlabel("n/(P·W), batches in a partition")


def _mark_paper(column: Sequence[Axes], paper: float) -> None:
    for axes in column:
        axes.axvline(paper, color="0.3", linewidth=1, linestyle=":")
    column[0].annotate(
        f"paper's best: n/(P·W) = {PAPER_BATCHES_PER_PARTITION}",
        (paper, 0.02),
        (3, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=7,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
