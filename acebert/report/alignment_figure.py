"""Fig. 7: queries and products on a plane, coloured by category, told apart by shape."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
from matplotlib.lines import Line2D

from acebert.report.style import CATEGORIES, LOOK, WIDTH, Panel, panel

SHAPES = {"product": ("o", 0.35), "query": ("^", 0.8)}
"""marker and opacity"""


LONGEST = 20  # letters of a name in the legend, of which two stand side by side


def alignment_panels(points: Path) -> list[Panel]:
    """A panel a system of points.parquet, and one with the legend of both."""
    table = pq.read_table(points)
    systems = table["system"].unique().to_pylist()
    names = table["category"].unique().to_pylist()
    colours = dict(zip(names, CATEGORIES, strict=False))
    drawn = [_panel(points, i, system, colours) for i, system in enumerate(systems)]
    return [*drawn, _legend(colours)]


def _panel(points: Path, number: int, system: str, colours: dict[str, str]) -> Panel:
    table = pq.read_table(points, filters=[("system", "=", system)])
    category, side = (np.array(table[name].to_pylist()) for name in ("category", "side"))
    x, y = table["x"].to_numpy(), table["y"].to_numpy()
    size = float(np.clip(9000 / len(x), 2, 18))
    with plt.rc_context({**LOOK, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(WIDTH, WIDTH), layout="constrained")
        for shape, (marker, opacity) in SHAPES.items():
            inside = np.flatnonzero(side == shape)
            # In one call and in random order, so that no category lies on top of the others.
            inside = np.random.default_rng(0).permutation(inside)
            axis.scatter(
                x[inside],
                y[inside],
                s=size,
                c=[colours[name] for name in category[inside]],
                marker=marker,
                alpha=opacity,
                linewidths=0,
                rasterized=True,
            )
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
        axis.spines[:].set_color("0.8")
        letter = "ab"[number] if number < 2 else ""
        axis.set_title(f"({letter}) {system}", loc="left")
        queries = int((side == "query").sum())
        alt = f"t-SNE of {queries} queries and {len(side) - queries} products of {system}"
        return panel(f"fig7_{number}", alt, figure)


def _legend(colours: dict[str, str]) -> Panel:
    dots = [
        Line2D([], [], marker="o", color=c, linestyle="", label=short(name))
        for name, c in colours.items()
    ]
    shapes = [
        Line2D([], [], marker=marker, color="0.3", linestyle="", label=side)
        for side, (marker, _) in SHAPES.items()
    ]
    with plt.rc_context(LOOK):
        figure = plt.figure(figsize=(WIDTH, 0.35 + 0.24 * -(-(len(dots) + len(shapes)) // 2)))
        figure.legend(
            handles=[*shapes, *dots], loc="center", ncols=2, handlelength=1, columnspacing=1
        )
        return panel("fig7_legend", "triangles are queries, dots are products", figure)


def short(name: str) -> str:
    """Cut in the middle: categories are often paths, which start or end alike."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"
