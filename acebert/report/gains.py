"""What may be said of one row beside another: its relative gain, with the interval that decides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from acebert.evaluation.significance import LEAST_QUERIES, Interval, relative_gain
from acebert.evaluation.tables import Row, read_metrics, read_ratios
from acebert.report.parts import Step, Table
from acebert.report.run import Measured

Verdict = Literal["up", "down", "open"]
Unclaimed = Literal[
    "the other alone is pre-trained: not claimed",
    "other numbers of pairs: not claimed",
    "one seed: not claimed",
    "too few queries",
]
BesidePaper = Literal[
    "reproduced", "reproduced, larger", "direction only, smaller", "the opposite", "not shown"
]
PAIRS_APART = 0.05
"""share by which rows that were trained by the clock may differ in pairs"""
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
        queries: that count in both rows
        one_seed: one of the two was trained, with a single seed
        behind: the other row starts from more than this one (`Measured.start`), so that the step
            adds one thing and takes another. The other way round the start is what is added
        apart: they were trained by the clock, on other numbers of pairs
    """

    metric: str
    group: str | None
    ours: Interval
    difference: Interval
    paper: float | None
    queries: int
    one_seed: bool
    behind: bool
    apart: bool

    @property
    def unclaimed(self) -> Unclaimed | None:
        """Why nothing may be claimed, whatever the interval is."""
        if self.behind:
            return "the other alone is pre-trained: not claimed"
        if self.apart:
            return "other numbers of pairs: not claimed"
        if self.one_seed:
            return "one seed: not claimed"
        return "too few queries" if self.queries < LEAST_QUERIES else None

    @property
    def verdict(self) -> Verdict:
        """up or down where the difference's interval lies on one side of 0, else open."""
        if self.unclaimed:
            return "open"
        if self.difference.low > 0:
            return "up"
        return "down" if self.difference.high < 0 else "open"

    @property
    def beside_paper(self) -> BesidePaper | None:
        """What became of the paper's gain: reproduced where its direction is shown and the interval
        contains it. None: the paper has none, or nothing may be claimed."""
        if self.paper is None or self.unclaimed:
            return None
        if self.verdict == "open":
            return "not shown"
        if (self.verdict == "up") != (self.paper > 0):
            return "the opposite"
        if self.ours.low <= self.paper <= self.ours.high:
            return "reproduced"
        larger = abs(self.ours.value) > abs(self.paper)
        return "reproduced, larger" if larger else "direction only, smaller"


@dataclass(frozen=True)
class Comparison:
    """A step of a table with a gain for each of its metrics and groups."""

    step: Step
    gains: tuple[Gain, ...]


def comparisons(table: Table, measured: Mapping[str, Measured]) -> list[Comparison]:
    """The table's steps between rows that were measured, by the rows' names."""
    return [
        Comparison(step, tuple(_gains(table, step, measured[step.row], measured[step.beside])))
        for step in table.steps
        if step.row in measured and step.beside in measured
    ]


def _gains(table: Table, step: Step, row: Measured, beside: Measured) -> list[Gain]:
    wanted: list[tuple[str, str | None]] = [(metric, None) for metric in table.metrics]
    wanted += [(metric, group) for group in table.groups for metric in GROUP_METRICS]
    one_seed = row.one_seed or beside.one_seed
    behind, apart = beside.start > row.start, _apart(row, beside)
    out = []
    for metric, group in wanted:
        found = relative(row.row, beside.row, metric, group)
        if found is not None:
            paper = None if group else _paper_gain(table, step, metric)
            ours, difference, queries = found
            said = (paper, queries, one_seed, behind, apart)
            out.append(Gain(metric, group, ours, difference, *said))
    return out


def _apart(row: Measured, beside: Measured) -> bool:
    by_the_clock = any(m.settings and m.settings.train.max_minutes for m in (row, beside))
    if not by_the_clock or row.pairs is None or beside.pairs is None:
        return False
    return abs(row.pairs - beside.pairs) > PAIRS_APART * max(row.pairs, beside.pairs)


def relative(
    row: Row, beside: Row, metric: str, group: str | None = None
) -> tuple[Interval, Interval, int] | None:
    """row / beside − 1, row − beside, and the queries that count in both; None where one of them
    has no such number, or beside's is 0."""
    if any(value_of(one, metric, group) is None for one in (row, beside)):
        return None
    a, b = (read_ratios(one.seeds, metric, group) for one in (row, beside))
    if b.value <= 0:
        return None
    return *relative_gain(a, b, samples=2000), min(a.queries, b.queries)


def queries_of(row: Row, group: str, metric: str) -> int:
    """Queries of a group that count in a metric which the row has."""
    return read_ratios(row.seeds, metric, group).queries


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
