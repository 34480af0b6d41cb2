"""What the number of partitions does to the mini-batches: a picture and a table.

Above, mini-batches as the paper's Fig. 4 shows them, a bar a batch, a coloured run a category, for
few, the chosen and many partitions. Below, the hard share against P, and against the batches in a
partition n / (P·W), which compares between data sets.
"""

import logging
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from acebert.config import Settings
from acebert.data.partitions import PART_ROWS, count_pairs, parts_of
from acebert.data.plan_arithmetic import (
    Layout,
    batch_of_step,
    layout_of,
    order_partitions,
    random_hard_share,
)
from acebert.workdir import Stage, run_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

VERSION = 1
BARS = 10  # batches drawn for each P
COLOURS = 12  # categories with a colour of their own; the others share greys
SAMPLED_PAIRS = 5_000_000  # epochs are averaged up to this many pairs for each P, at least one


@dataclass(frozen=True)
class Point:
    """One row of the table."""

    partitions: int
    batches_per_partition: float
    """n / (P·W)"""
    hard_share: float
    times_random: float
    """hard share over that of batches drawn at random"""
    chosen: bool
    """whether the settings say so"""


def draw_plan(settings: Settings, ingested: Stage) -> Stage:
    """The stage with `plan.png` and `hard_share.csv` (columns of `Point`), by rising P.

    Hard shares are exact, from the plan's own arithmetic on the first epochs; no plan need exist.

    Raises:
        UserError: as `acebert.data.partitions.plan`.
    """
    pairs_file = ingested.path / "pairs.parquet"
    W = settings.train.batch_size
    chosen = layout_of(
        count_pairs(pairs_file),
        W,
        settings.plan.partitions,
        settings.seed,
        settings.plan.batches_per_partition,
    )
    epochs = max(1, min(settings.train.epochs, SAMPLED_PAIRS // chosen.pairs))
    key = {"version": VERSION, "ingest": ingested.digest, "epochs": epochs, **asdict(chosen)}

    def build(out: Path) -> None:
        column = pq.read_table(pairs_file, columns=["category_code"])["category_code"]
        categories = column.to_numpy().astype(np.int32, copy=False)
        points = hard_share_curve(chosen, categories, epochs)
        names = category_names(ingested.path)
        table = pa.Table.from_pylist([asdict(point) for point in points])
        pyarrow.csv.write_csv(table, out / "hard_share.csv")
        _draw(out / "plan.png", chosen, categories, names, points)

    return run_stage(settings.workdir, "plan_figure", key, build)


def read_points(stage: Stage) -> list[Point]:
    """The table of a `draw_plan` stage."""
    rows = pyarrow.csv.read_csv(stage.path / "hard_share.csv").to_pylist()
    return [Point(**row) for row in rows]


def table_text(points: list[Point]) -> str:
    """The table in columns, the chosen P marked."""
    lines = [f"{'P':>10}  {'n/(P·W)':>10}  {'hard share':>10}  {'× random':>9}"]
    lines += [
        f"{p.partitions:>10,}  {p.batches_per_partition:>10,.1f}  {p.hard_share:>10.4f}  "
        f"{p.times_random:>9.2f}{'  ← chosen' if p.chosen else ''}"
        for p in points
    ]
    return "\n".join(lines)


def hard_share_curve(chosen: Layout, categories: NDArray[np.int32], epochs: int) -> list[Point]:
    """The hard share at P = 1, 2, 5, 10, …, the chosen P and one batch a partition.

    Args:
        categories: int32 [n].
    """
    steps = {m * 10**e for e in range(19) for m in (1, 2, 5)}
    grid = {P for P in steps if chosen.full_batches > P}
    floor = random_hard_share(np.bincount(categories))
    points = []
    for P in sorted(grid | {chosen.partitions, chosen.full_batches}):
        layout = Layout(chosen.pairs, chosen.batch_size, P, chosen.seed)
        share = float(np.mean([epoch_hard_share(layout, e, categories) for e in range(epochs)]))
        log.info("plan: P = %s, hard share %.4f", f"{P:,}", share)
        per_partition = layout.pairs / (P * layout.batch_size)
        points.append(Point(P, per_partition, share, share / floor, chosen.partitions == P))
    return points


def epoch_hard_share(layout: Layout, epoch: int, categories: NDArray[np.int32]) -> float:
    """`hard_share` of the epoch's full batches, a run of partitions at a time."""
    C = int(categories.max()) + 1
    same = sum(
        order_partitions(layout, epoch, categories, C, first, last)[1]
        for first, last in parts_of(layout, PART_ROWS)
    )
    W = layout.batch_size
    return same / (layout.full_batches * W * (W - 1))


def category_names(ingested: Path) -> dict[int, str]:
    """Name of each category code, by the catalogue."""
    files = str(ingested / "products" / "*.parquet")
    with duckdb.connect() as connection:
        return dict(
            connection.execute(
                """SELECT category_code, coalesce(any_value(category), 'no category')
                FROM read_parquet(?) GROUP BY 1""",
                [files],
            ).fetchall()
        )


def _draw(
    file: Path,
    chosen: Layout,
    categories: NDArray[np.int32],
    names: dict[int, str],
    points: list[Point],
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    counts = np.bincount(categories)
    largest = np.argsort(-counts, kind="stable")[:COLOURS]
    largest = largest[counts[largest] > 0]
    palette = _palette(len(counts), largest)
    shares = {point.partitions: point.hard_share for point in points}

    figure = Figure(figsize=(13, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    halves = figure.add_gridspec(2, 1, height_ratios=(1.15, 1))
    above, below = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    shown = _shown_partitions(chosen)
    panels = np.ravel(above.subplots(1, len(shown), sharey=True))
    panels[0].set_ylabel("step")
    for axes, P in zip(panels, shown, strict=True):
        layout = Layout(chosen.pairs, chosen.batch_size, P, chosen.seed)
        _draw_batches(axes, layout, categories, palette)
        share = shares.get(P) or epoch_hard_share(layout, 0, categories)
        mark = " (chosen)" if chosen.partitions == P else ""
        axes.set_title(f"P = {P:,}{mark}, hard share {share:.2f}")
    patches = [
        Patch(color=palette[code], label=_short(names.get(int(code), f"category {code}")))
        for code in largest
    ]
    if np.count_nonzero(counts) > len(largest):
        others = np.count_nonzero(counts) - len(largest)
        patches.append(Patch(color="0.75", label=f"{others:,} others"))
    above.legend(handles=patches, loc="outside lower center", ncols=7, frameon=False)

    axes = below.subplots()
    floor = random_hard_share(counts)
    axes.plot([p.partitions for p in points], [p.hard_share for p in points], "o-", color="C0")
    axes.axvline(
        chosen.partitions, color="C3", linewidth=1, label=f"chosen, P = {chosen.partitions:,}"
    )
    axes.axhline(floor, color="0.5", linestyle="--", label=f"random batches, {floor:.3f}")
    axes.set(xscale="log", ylim=(0, 1), xlabel="partitions P", ylabel="hard share")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    batches = chosen.pairs / chosen.batch_size

    def per_partition(P: ArrayLike) -> NDArray[np.float64]:
        return batches / np.maximum(P, 1e-9)  # its own inverse; the axis asks for 0 too

    second = axes.secondary_xaxis("top", functions=(per_partition, per_partition))
    for axis in (axes.xaxis, second.xaxis):
        axis.set_major_formatter("{x:,g}")
    second.set_xlabel("batches in a partition, n / (P·W)")
    below.suptitle(
        f"{chosen.pairs:,} training pairs, W = {chosen.batch_size}, "
        f"{np.count_nonzero(counts):,} categories"
    )
    figure.savefig(file, dpi=110)


def _shown_partitions(chosen: Layout) -> list[int]:
    full = chosen.full_batches
    middle = chosen.partitions if 1 < chosen.partitions < full else isqrt(full)
    return sorted({1, middle, full})


def _palette(num_categories: int, largest: NDArray[np.int64]) -> NDArray[np.float64]:
    """RGB [C, 3]: the largest categories in colours, the others in alternating greys."""
    from matplotlib import colormaps

    grey = 0.62 + 0.08 * (np.arange(num_categories) % 4)
    palette = np.repeat(grey[:, None], 3, axis=1)
    palette[largest] = colormaps["Paired"](np.arange(len(largest)))[:, :3]
    return palette


def _draw_batches(
    axes: "Axes", layout: Layout, categories: NDArray[np.int32], palette: NDArray[np.float64]
) -> None:
    """The batches of the first steps, each a bar of its categories, most frequent first."""
    C, W = len(palette), layout.batch_size
    for row, batch in enumerate(batch_of_step(layout, 0)[:BARS]):
        partition = int(layout.partition_of(np.array([batch], np.uint64))[0])
        pairs, _ = order_partitions(layout, 0, categories, C, partition, partition + 1)
        codes, slots = np.unique(
            categories[pairs[batch - layout.first_batch(partition)]], return_counts=True
        )
        order = np.argsort(-slots, kind="stable")
        left = np.cumsum(slots[order]) - slots[order]
        axes.barh(
            np.full(len(codes), row),
            slots[order],
            left=left,
            height=0.82,
            color=palette[codes[order]],
            edgecolor="white",
            linewidth=0.4,
        )
    axes.set(xlim=(0, W), ylim=(BARS - 0.4, -0.6), xlabel="pairs of the batch")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"
