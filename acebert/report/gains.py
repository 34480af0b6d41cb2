"""What may be said of one row beside another: its relative gain, with the interval that decides."""

from dataclasses import dataclass
from typing import Literal

from acebert.evaluation.significance import Interval, relative_gain
from acebert.evaluation.tables import Row, read_metrics, read_ratios
from acebert.report.parts import Step, Table

Verdict = Literal["up", "down", "open"]
GROUP_METRICS = ("gauc", "recall_100")
"""what is told of a part of the queries"""


@dataclass(frozen=True)
class Gain:
    """One metric of one row beside another's.

    Attributes:
        metric, group: what is measured; group None: all queries
        ours: relative gain, with its 95 % interval over seeds and queries; where the other row may
            be 0, an end is infinite
        difference: the same as a difference, which decides
        paper: the paper's, or None
    """

    metric: str
    group: str | None
    ours: Interval
    difference: Interval
    paper: float | None

    @property
    def verdict(self) -> Verdict:
        """up or down where the difference's interval lies on one side of 0, else open."""
        if self.difference.low > 0:
            return "up"
        return "down" if self.difference.high < 0 else "open"

    @property
    def agrees(self) -> bool | None:
        """Whether the paper's direction is shown (True), the other one is (False), or neither."""
        if self.paper is None or self.verdict == "open":
            return None
        return (self.verdict == "up") == (self.paper > 0)


@dataclass(frozen=True)
class Comparison:
    """A step of a table with a gain for each of its metrics and groups."""

    step: Step
    gains: tuple[Gain, ...]


def comparisons(table: Table, measured: dict[str, Row]) -> list[Comparison]:
    """The table's steps between rows that were measured, by the rows' names."""
    return [
        Comparison(step, tuple(_gains(table, step, measured[step.row], measured[step.beside])))
        for step in table.steps
        if step.row in measured and step.beside in measured
    ]


def _gains(table: Table, step: Step, row: Row, beside: Row) -> list[Gain]:
    measured: list[tuple[str, str | None]] = [(metric, None) for metric in table.metrics]
    measured += [(metric, group) for group in table.groups for metric in GROUP_METRICS]
    out = []
    for metric, group in measured:
        found = relative(row, beside, metric, group)
        if found is not None:
            paper = None if group else _paper_gain(table, step, metric)
            out.append(Gain(metric, group, *found, paper))
    return out


def relative(
    row: Row, beside: Row, metric: str, group: str | None = None
) -> tuple[Interval, Interval] | None:
    """row / beside − 1 and row − beside; None where one of them has no such number, or beside's is
    0."""
    if any(value_of(one, metric, group) is None for one in (row, beside)):
        return None
    a, b = (read_ratios(one.seeds, metric, group) for one in (row, beside))
    return relative_gain(a, b, samples=2000) if b.value > 0 else None


def value_of(row: Row, metric: str, group: str | None = None) -> float | None:
    """The metric's mean over the seeds; None where the row, or its group, has no such number."""
    found = []
    for directory in row.seeds:
        metrics = read_metrics(directory)
        own = metrics["overall"] if group is None else metrics["breakdown"][group]
        found.append(own.get(metric))
    return None if None in found else sum(found) / len(found)


def _paper_gain(table: Table, step: Step, metric: str) -> float | None:
    try:
        return table.paper[step.row][metric] / table.paper[step.beside][metric] - 1
    except KeyError:
        return None
