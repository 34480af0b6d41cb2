"""Fig. 6: the semantic matching loss in training, with and without the adversary."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.report.style import LOOK, WIDTH, Panel, colour, panel

WINDOW = 20  # steps that a point of the curve is the mean of
LAST = 0.1  # share of the steps whose mean is the loss at the end


def steps_trained(models: Sequence[Path]) -> list[int]:
    """By model."""
    return [pq.read_metadata(model / "history.parquet").num_rows for model in models]


def loss_curves(models: Sequence[Path]) -> NDArray[np.float64]:
    """Eq. 5 by step [seeds, steps], as far as all seeds were trained."""
    tables = [pq.read_table(model / "history.parquet", columns=["loss"]) for model in models]
    steps = min(steps_trained(models))
    return np.stack([table["loss"].to_numpy()[:steps] for table in tables])


def final_losses(
    with_adversary: NDArray[np.float64], without: NDArray[np.float64]
) -> tuple[list[float], list[float]]:
    """By seed, the mean loss over the last tenth of the steps that both were trained."""
    steps = min(with_adversary.shape[1], without.shape[1])
    last = slice(int(steps * (1 - LAST)), steps)
    return with_adversary[:, last].mean(axis=1).tolist(), without[:, last].mean(axis=1).tolist()


def loss_panels(curves: Mapping[str, NDArray[np.float64]]) -> list[Panel]:
    """System → curves [seeds, steps]: the whole training, and its last half near by."""
    steps = max(c.shape[1] for c in curves.values())
    return [
        _panel("fig6_loss", "whole training", curves, 0),
        _panel("fig6_loss_end", "the last half", curves, steps // 2),
    ]


def _panel(name: str, title: str, curves: Mapping[str, NDArray[np.float64]], first: int) -> Panel:
    with plt.rc_context(LOOK):
        figure, axis = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
        for system, by_seed in curves.items():
            window = min(WINDOW, by_seed.shape[1])
            kernel = np.ones(window) / window
            smooth = np.stack([np.convolve(curve, kernel, "valid") for curve in by_seed])
            step = np.arange(window, by_seed.shape[1] + 1)
            inside = step > first
            axis.plot(
                step[inside],
                smooth.mean(axis=0)[inside],
                color=colour(system),
                linewidth=1.6,
                label=system,
            )
            low, high = smooth.min(axis=0), smooth.max(axis=0)
            axis.fill_between(
                step[inside],
                low[inside],
                high[inside],
                color=colour(system),
                alpha=0.15,
                linewidth=0,
            )
        axis.set_xlabel(f"encoder step (mean of {WINDOW})")
        axis.set_title(f"Semantic matching loss, {title}", loc="left")
        axis.legend()
        ends = ", ".join(f"{system} ends at {c[:, -1].mean():.2f}" for system, c in curves.items())
        return panel(name, f"Semantic matching loss by step, {title}: {ends}", figure)
