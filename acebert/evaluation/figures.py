"""Pictures of the results: rows side by side, and Recall by kind of query and product.

A row keeps its colour from one picture to the next: baselines have theirs by name, models take the
others in the order in which they come.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
from matplotlib.ticker import EngFormatter

from acebert.evaluation.tables import Row, label, read_metrics

KNOWN = {
    "bm25_titles": "#b8b8b8",
    "bm25_titles_hot": "#7a7a7a",
    "click_lookup": "#c9a66b",
    "popularity": "#e0cfa9",
    "position": "#9db4c0",
    "hybrid_bm25": "#59a14f",
    "with_clicks": "#c2527d",
}
MODELS = ("#1f5fa8", "#d1495b", "#7b4ea3", "#e08e2b", "#17807e", "#a05195")
GROUPS = (
    "seen",
    "unseen",
    "head",
    "tail",
    "warm",
    "cold",
    "with_image",
    "without_image",
    "title_has",
    "title_lacks",
)


def rows_figure(rows: Sequence[Row], path: Path) -> None:
    """A dot with its 95 % interval for each row: GAUC on the left, the deepest Recall beside it.

    Raises:
        UserError: a directory is not a row of results.
    """
    colours = _colours([row.name for row in rows])
    deepest = max((row.recalls for row in rows), key=len)[-1]
    height = 1.1 + 0.42 * len(rows)
    figure, axes = plt.subplots(1, 2, figsize=(10, height), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("gauc", deepest), strict=True):
        for y, row in enumerate(rows):
            found = row.measured(name)
            if found is None:
                continue
            colour = colours[row.name]
            axis.plot([found.low, found.high], [y, y], color=colour, linewidth=3)
            axis.plot(found.value, y, "o", color=colour, markersize=8)
            axis.annotate(
                f"{found.value:.3f}",
                (found.value, y),
                (0, 7),
                textcoords="offset points",
                ha="center",
            )
        axis.set_xlabel(f"{label(name)} (95 % interval)")
        axis.grid(axis="x", alpha=0.3)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axvline(0.5, color="black", linewidth=0.8, linestyle=":")  # a coin's GAUC
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.7)
    _save(figure, path)


def curves_figure(models: Mapping[str, Sequence[Path]], path: Path) -> None:
    """Training loss, and GAUC and Recall@100 of the validation sample, against pairs trained on.

    Args:
        models: name → model directories, one a seed (fine lines; the loss is a mean of up to 20
            steps)
    """
    colours = _colours(list(models))
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    labels = ("training loss", "validation GAUC", "validation Recall@100, of the sample")
    for name, directories in models.items():
        for i, directory in enumerate(directories):
            report = json.loads((directory / "report.json").read_text())
            W = report["pairs"] / report["steps"]
            history = pq.read_table(directory / "history.parquet")
            valid = pq.read_table(directory / "valid.parquet")
            style = {"color": colours[name], "linewidth": 1.3, "label": None if i else name}
            loss = history["loss"].to_numpy()
            window = min(20, 1 + len(loss) // 10)
            smooth = np.convolve(loss, np.ones(window) / window, "valid")
            axes[0].plot(history["step"].to_numpy()[window - 1 :] * W, smooth, **style)
            for axis, metric in zip(axes[1:], ("gauc", "recall_100"), strict=True):
                axis.plot(valid["step"].to_numpy() * W, valid[metric], marker="o", **style)
    for axis, text in zip(axes, labels, strict=True):
        axis.set_xlabel("pairs")
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.set_title(text, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    _save(figure, path)


def breakdown_figure(directories: Sequence[Path], path: Path) -> None:
    """Bars of the deepest Recall of each row by kind of query and of product.

    Raises:
        UserError: a directory is not a row of results.
    """
    rows = [read_metrics(directory) for directory in directories]
    rows = [row for row in rows if any(name.startswith("recall_") for name in row["overall"])]
    colours = _colours([row["name"] for row in rows])
    deepest = _deepest(rows)
    figure, axis = plt.subplots(figsize=(11, 4.2), layout="constrained")
    width = 0.8 / max(1, len(rows))
    for i, row in enumerate(rows):
        values = [row["breakdown"][group].get(f"recall_{deepest}") for group in GROUPS]
        measured = [g for g, value in enumerate(values) if value is not None]
        left = [g - 0.4 + (i + 0.5) * width for g in measured]
        heights = [values[g] for g in measured]
        bars = axis.bar(left, heights, width * 0.92, color=colours[row["name"]], label=row["name"])
        if len(rows) <= 3:
            axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    targets = [rows[0]["breakdown"][group]["targets"] for group in GROUPS] if rows else []
    labels = [f"{g.replace('_', ' ')}\n{n:,} pairs" for g, n in zip(GROUPS, targets, strict=False)]
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    for edge in range(1, len(GROUPS) // 2):
        axis.axvline(2 * edge - 0.5, color="black", linewidth=0.5, alpha=0.3)
    axis.set_xlabel("clicked pairs of the test day")
    axis.set_ylabel(f"Recall@{deepest}")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=max(1, len(rows)), frameon=False
    )
    _save(figure, path)


def _colours(names: list[str]) -> dict[str, str]:
    models = [name for name in names if name not in KNOWN]
    return KNOWN | {name: MODELS[i % len(MODELS)] for i, name in enumerate(dict.fromkeys(models))}


def _deepest(rows: list[dict[str, Any]]) -> int:
    names = (name for row in rows for name in row["overall"] if name.startswith("recall_"))
    return max(int(name.removeprefix("recall_")) for name in names)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
