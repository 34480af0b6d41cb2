"""Fig. 5: what the number of partitions does, on the scale-free axis n/(P·W)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq

from acebert.data.plan_arithmetic import PAPER_BATCHES_PER_PARTITION
from acebert.evaluation.significance import Interval, difference
from acebert.evaluation.tables import SAMPLES, interval_of_seeds, label, read_ratios
from acebert.report.style import LOOK, WIDTH, Panel, colour, panel
from acebert.tracking import without_password

METRICS = ("gauc", "recall_100")
VARIED = "plan.batches_per_partition"
"""what tune_spaces/fig5_partitions.yaml varies"""


def partition_points(sweep: Path) -> list[dict[str, Any]]:
    """The finished points of a sweep over partitions, by n/(P·W): `partitions`,
    `batches_per_partition`, `hard_share`, `seeds`, and an Interval of the test day for each metric
    that it has."""
    trials = pq.read_table(sweep / "trials.parquet").to_pylist()
    finished = [trial for trial in trials if trial["status"] == "finished"]
    points = []
    for partitions in sorted({trial["partitions"] for trial in finished}, reverse=True):
        of = [trial for trial in finished if trial["partitions"] == partitions]
        rows = [Path(trial["test_row"]) for trial in of]
        point = {name: of[0][name] for name in ("partitions", "batches_per_partition")}
        point["hard_share"] = float(np.mean([trial["hard_share"] for trial in of]))
        point["seeds"] = sorted(trial["seed"] for trial in of)
        for metric in METRICS:
            if of[0].get(f"test_{metric}") is not None:
                point[metric] = interval_of_seeds(rows, metric)
        points.append(point)
    return points


@dataclass(frozen=True)
class Best:
    """The point that is best by a metric on the test day.

    Attributes:
        batches_per_partition: n/(P·W)
        above_ends: its differences from the easiest and the hardest point, each with its 95 %
            interval over seeds and queries; None: it is one of the two
        queries: that count
        seeds: of the point that has the fewest
    """

    batches_per_partition: float
    above_ends: tuple[Interval, Interval] | None
    queries: int
    seeds: int


def best_points(sweep: Path) -> dict[str, Best]:
    """By each metric that all points have."""
    rows: dict[float, list[Path]] = {}
    trials = pq.read_table(sweep / "trials.parquet").to_pylist()
    finished = [trial for trial in trials if trial["status"] == "finished"]
    for trial in finished:
        rows.setdefault(trial["batches_per_partition"], []).append(Path(trial["test_row"]))
    easy, hard = min(rows), max(rows)
    found = {}
    for metric in METRICS:
        if any(trial.get(f"test_{metric}") is None for trial in finished):
            continue
        ratios = {point: read_ratios(rows[point], metric) for point in rows}
        best = max(ratios, key=lambda point: ratios[point].value)
        above = None
        if best not in (easy, hard):
            from_easy, from_hard = (
                difference(ratios[best], ratios[end], SAMPLES) for end in (easy, hard)
            )
            above = (from_easy, from_hard)
        queries = min(one.queries for one in ratios.values())
        found[metric] = Best(best, above, queries, min(map(len, rows.values())))
    return found


def lost_trials(sweep: Path) -> dict[str, str]:
    """Points that lost some or all of their trials → why the first one did."""
    columns = [VARIED, "seed", "status", "reason"]
    trials = pq.read_table(sweep / "trials.parquet", columns=columns).to_pylist()
    lost = {}
    for value in dict.fromkeys(trial[VARIED] for trial in trials):
        of = [trial for trial in trials if trial[VARIED] == value]
        failed = [trial for trial in of if trial["status"] != "finished"]
        if failed:
            told = (
                f"Figure 5, point n/(P·W) = {value:g} (seeds {len(of) - len(failed)} of {len(of)})"
            )
            lost[told] = without_password(failed[0]["reason"] or failed[0]["status"])
    return lost


def partition_panels(points: list[dict[str, Any]], system: str) -> list[Panel]:
    """A panel a metric, and one for how hard the batches are."""
    x = [point["batches_per_partition"] for point in points]
    return [
        *(
            _panel(x, metric, label(metric), [point[metric] for point in points], system)
            for metric in METRICS
            if all(metric in point for point in points)
        ),
        _panel(x, "hard_share", "hard share of a batch", [p["hard_share"] for p in points], system),
    ]


def _panel(
    x: list[float], name: str, title: str, values: list[Interval] | list[float], system: str
) -> Panel:
    with plt.rc_context(LOOK):
        figure, axis = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
        y = [value.value if isinstance(value, Interval) else value for value in values]
        axis.plot(x, y, "o-", color=colour(system))
        bounds = [(v.low, v.high) for v in values if isinstance(v, Interval)]
        if bounds:
            low, high = zip(*bounds, strict=True)
            axis.fill_between(x, low, high, color=colour(system), alpha=0.15, linewidth=0)
        else:
            axis.set_ylim(0, 1)
        if max(x) >= PAPER_BATCHES_PER_PARTITION / 2:
            axis.axvline(PAPER_BATCHES_PER_PARTITION, color="0.5", linestyle="--", linewidth=1)
            axis.annotate(
                "paper's best",
                (PAPER_BATCHES_PER_PARTITION, 0.03),
                xycoords=("data", "axes fraction"),
                rotation=90,
                rotation_mode="anchor",  # or half a letter would lie below the axis
                va="bottom",
                color="0.4",
            )
        axis.set_xscale("log")
        axis.set_xticks(x, [f"{value:.3g}" for value in x])
        axis.minorticks_off()
        axis.set_xlabel("batches a partition, n/(P·W): easy to hard")
        axis.set_title(title, loc="left")
        words = ", ".join(f"{a:.3g}: {b:.3f}" for a, b in zip(x, y, strict=True))
        return panel(f"fig5_{name}", f"{title} by n/(P·W): {words}", figure)
