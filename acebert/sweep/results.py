"""What a sweep leaves: a table for people, one for programs, and the best settings as a recipe."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from acebert.config import Settings
from acebert.errors import UserError
from acebert.evaluation.tables import WIDEST
from acebert.sweep.space import Point, Space, point_words, short
from acebert.sweep.trials import Outcome, points_tried

METRICS = {"gauc": "GAUC", "recall_100": "Recall@100"}
NOT_IN_A_RECIPE = {"recipe", "workdir", "tracking"}


def values(outcomes: Sequence[Outcome], metric: str) -> list[float]:
    """The metric of the finished trials among `outcomes`."""
    return [float(o.result[metric]) for o in outcomes if o.status == "finished"]


def best(space: Space, outcomes: Sequence[Outcome]) -> list[Outcome] | None:
    """The finished trials of the point with the best mean over seeds; None where none finished.

    A point that lost a seed is behind every point that lost none: a mean over fewer is noisier.
    """
    points = [[o for o in of if o.status == "finished"] for of in points_tried(outcomes)]
    points = [of for of in points if of]
    if not points:
        return None
    return max(points, key=lambda of: (len(of), np.mean(values(of, space.metric))))


def best_trial(space: Space, winners: Sequence[Outcome]) -> Outcome:
    """Of the best point's trials the one whose model is best on the validation day."""
    return max(winners, key=lambda o: float(o.result[space.metric]))


def _place(space: Space, point: Point) -> tuple[Any, ...]:
    """A point's place in a table: lists in the space's order, ranges by value."""
    return tuple(
        of.index(point[leaf]) if isinstance(of, list) else point[leaf]
        for leaf, of in space.vary.items()
    )


def write_table(space: Space, outcomes: Sequence[Outcome], path: Path) -> None:
    """trials.parquet: a row a trial; the varied settings by their whole names, what came out, and
    the reason if failed.

    A varied setting whose values are of several types is a column of text.
    """
    rows: list[dict[str, Any]] = []
    for o in sorted(outcomes, key=lambda o: (_place(space, o.trial.point), o.trial.seed)):
        head = {**o.trial.point, "seed": o.trial.seed, "status": o.status}
        rows.append({**head, **o.result, "seconds": o.seconds, "reason": o.reason})
    columns = {name: [row.get(name) for row in rows] for name in _union(rows)}
    for name, column in columns.items():
        kinds = {type(value) for value in column if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            columns[name] = [None if value is None else str(value) for value in column]
    pq.write_table(pa.table(columns), path)


def refuse_failures(directory: Path) -> None:
    """
    Raises:
        UserError: a trial of a sweep that has ended failed.
    """
    status = pq.read_table(directory / "trials.parquet")["status"].to_pylist()
    if failed := status.count("failed"):
        raise UserError(
            f"{failed} of {len(status)} trials failed, {directory / 'report.txt'} says why. The "
            "same command tries them again"
        )


def _union(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def write_recipe(
    name: str, space: Space, winners: Sequence[Outcome], base: Settings, path: Path
) -> None:
    """best.yaml: the settings of the best point as a recipe, whole, so that it means the same
    tomorrow; with the seed of its best trial, whose model is there."""
    trial = best_trial(space, winners).trial
    tree = trial.settings(base).model_dump(mode="json", exclude=NOT_IN_A_RECIPE)
    found = f"{METRICS[space.metric]} {mean_text(values(winners, space.metric))} (validation day)"
    head = f"# Best of the sweep {name}, {' '.join(point_words(trial.point))}: {found}\n"
    path.write_text(head + yaml.safe_dump(tree, sort_keys=False))


def table_text(space: Space, outcomes: Sequence[Outcome]) -> str:
    """A row a point: mean over its seeds, the spread over them, and what did not finish. Its
    seconds are of training where the trials say so: one that was trained before took none here.
    """
    shown = [name for name in METRICS if any(name in o.result for o in outcomes)]
    tests = [
        f"test_{name}" for name in METRICS if any(f"test_{name}" in o.result for o in outcomes)
    ]
    plan = any("hard_share" in o.result for o in outcomes)
    spread = "; ± is the standard deviation over seeds" if len(space.seeds) > 1 else ""
    title = f"validation day, best by {METRICS[space.metric]}{spread}"
    table = Table(title=title, title_justify="left")
    for leaf in space.vary:
        table.add_column(leaf.split(".")[-1], justify="right", no_wrap=True)
    others = [*(("P", "n/(P·W)", "hard") if plan else ()), *map(_label, [*shown, *tests])]
    for name in (*others, "trials", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    winner = best(space, outcomes)
    points = sorted(points_tried(outcomes), key=lambda of: _place(space, of[0].trial.point))
    for of in points:
        point = of[0].trial.point
        cells = [short(value) for value in point.values()]
        if plan:
            known = next((o.result for o in of if "hard_share" in o.result), None)
            cells += _plan_cells(known)
        cells += [mean_text(values(of, name)) for name in shown]
        cells += [mean_text([o.result[name] for o in of if name in o.result]) for name in tests]
        finished = [o for o in of if o.status == "finished"]
        seconds = [o.result.get("train_seconds", o.seconds) for o in of]
        cells += [f"{len(finished)} of {len(space.seeds)}", f"{np.mean(seconds):.0f}"]
        is_best = winner is not None and winner[0].trial.point == point
        table.add_row(*cells, style="bold" if is_best else None)
    text = io.StringIO()
    console = Console(width=WIDEST, file=text)
    console.print(table)
    for outcome in outcomes:
        if outcome.status == "failed":
            console.print(f"{outcome.trial.name} failed: {outcome.reason}", markup=False)
    if winner is not None:
        console.print(f"best: {' '.join(point_words(winner[0].trial.point))}", markup=False)
    return text.getvalue()


def _label(name: str) -> str:
    return f"test {METRICS[name[5:]]}" if name.startswith("test_") else METRICS[name]


def _plan_cells(result: dict[str, Any] | None) -> list[str]:
    if result is None:
        return ["-"] * 3
    per_partition, hard = result["batches_per_partition"], result["hard_share"]
    digits = ",.0f" if per_partition >= 100 else ".3g"
    return [f"{result['partitions']:,}", f"{per_partition:{digits}}", f"{hard:.2f}"]


def mean_text(of: Sequence[float]) -> str:
    """`0.412 ±0.003`: mean, and standard deviation over seeds where there are several."""
    if not of:
        return "-"
    spread = f" ±{np.std(of, ddof=1):.3f}" if len(of) > 1 else ""
    return f"{np.mean(of):.3f}{spread}"
