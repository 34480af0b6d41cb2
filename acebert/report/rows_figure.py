"""A table drawn: a dot a row with its 95 % interval, a panel a metric."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt

from acebert.evaluation.significance import Interval
from acebert.evaluation.tables import label
from acebert.report.style import LOOK, WIDTH, Panel, colour, panel


def rows_panel(
    key: str,
    metric: str,
    found: Mapping[str, Interval],
    shown: Sequence[tuple[str, str]],
) -> Panel:
    """One metric of some rows.

    Args:
        key: the table's, for the picture's name
        found: row → its value and interval; rows without one are left out
        shown: (row, what the table calls it), from the top
    """
    lines = [(name, text, found[name]) for name, text in shown if name in found]
    with plt.rc_context(LOOK):
        height = 1.0 + 0.36 * len(lines)
        figure, axis = plt.subplots(figsize=(WIDTH, height), layout="constrained")
        for y, (name, _, interval) in enumerate(lines):
            axis.plot([interval.low, interval.high], [y, y], color=colour(name), linewidth=3)
            axis.plot(interval.value, y, "o", color=colour(name), markersize=7)
        names = [text.replace(", ", ",\n").replace(" (", "\n(") for _, text, _ in lines]
        axis.set_yticks(range(len(lines)), names, linespacing=0.9)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.margins(x=0.08)
        axis.set_title(label(metric), loc="left")
        axis.set_xlabel("95 % interval")
        words = ", ".join(f"{text} {interval.value:.3f}" for _, text, interval in lines)
        return panel(f"{key}_{metric}", f"{label(metric)}: {words}", figure)
