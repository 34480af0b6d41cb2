"""Rows of results side by side: a table to read, and differences that may be claimed."""

import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from acebert.errors import UserError
from acebert.evaluation import HYBRID, WITH_CLICKS
from acebert.evaluation.recall import recall
from acebert.evaluation.significance import (
    LEAST_QUERIES,
    Interval,
    Ratios,
    difference,
    interval,
    mean_of_queries,
    weighted_by_query,
)

WIDEST = 300  # a printed table is as wide as it needs to be, up to this
SAMPLES = 2000
QUERY_GROUPS = {"seen": ("seen", True), "unseen": ("seen", False)} | {
    "head": ("head", True),
    "tail": ("head", False),
}
TARGET_GROUPS = {
    "cold": ("cold", True),
    "warm": ("cold", False),
    "with_image": ("with_image", True),
    "without_image": ("with_image", False),
    "title_lacks": ("title_lacks", True),
    "title_has": ("title_lacks", False),
}


LEGEND = {
    "bm25_titles": "BM25 on titles",
    "bm25_titles_hot": "BM25 on titles and the queries most clicked for the product",
    "click_lookup": "products clicked for the very same query before",
    "popularity": "products clicked most, whatever the query",
    "position": "the order that the log's own engine showed (GAUC alone)",
}
"""rows that need no training"""
GROUPS = (
    "seen: queries clicked before the test day; head: the most frequent ones; cold: products never "
    "clicked before the test day; title lacks: clicks where a word of the query is not in the title"
)
ONE_SEED = "one seed: not claimed, for another seed may tell otherwise (--seeds 0 1 2)"


def read_metrics(directory: Path) -> dict[str, Any]:
    """metrics.json of a row.

    Raises:
        UserError: `directory` is not a row of results.
    """
    path = directory / "metrics.json"
    if not path.is_file():
        raise UserError(f"{directory}: no row of results (it has no metrics.json)")
    metrics: dict[str, Any] = json.loads(path.read_text())
    return metrics


@dataclass(frozen=True)
class Row:
    """One system: the directories of its results, one a seed."""

    name: str
    seeds: tuple[Path, ...]

    @classmethod
    def of(cls, directory: Path) -> Self:
        return cls(read_metrics(directory)["name"], (directory,))

    @property
    def with_clicks(self) -> "Row":
        """The same model's row whose scores are raised by past clicks."""
        return Row(f"{self.name} + past clicks", tuple(path / WITH_CLICKS for path in self.seeds))

    def measured(self, name: str, samples: int = SAMPLES) -> Interval | None:
        """`gauc`, `mrr` or `recall_K` over the whole test day: the mean over the seeds, with a 95 %
        interval over seeds and queries. None: this system has no such number."""
        metrics = [read_metrics(directory) for directory in self.seeds]
        value = metrics[0]["overall"].get(name)
        if value is None:
            return None
        if len(self.seeds) > 1:
            return interval_of_seeds(self.seeds, "rr" if name == "mrr" else name, samples)
        bounds = metrics[0]["interval"].get(name, {"low": value, "high": value})
        return Interval(value, bounds["low"], bounds["high"], 1)

    @property
    def one_seed(self) -> bool:
        """Trained, as far as one knows, and with a single seed, whose luck it may be."""
        return len(self.seeds) == 1 and self.name not in LEGEND

    @property
    def recalls(self) -> list[str]:
        """`recall_K` of all K."""
        names = (n for n in read_metrics(self.seeds[0])["overall"] if n.startswith("recall_"))
        return sorted(names, key=lambda name: int(name.removeprefix("recall_")))


def rows_table(rows: Sequence[Row]) -> str:
    """A text table: GAUC, each Recall@K and MRR; '-' where a system has no such number.

    `±` is half of the 95 % interval, which is nearly symmetric.
    """
    names = ["gauc", *max((row.recalls for row in rows), key=len), "mrr"]
    table = Table(
        title="±: half of the 95 % interval, bootstrap over the test day's queries, and over seeds"
        " where a row has several",
        title_style="dim",
        title_justify="left",
    )
    table.add_column("row", no_wrap=True)
    several = any(len(row.seeds) > 1 for row in rows)
    if several:
        table.add_column("seeds", justify="right")
    for name in names:
        table.add_column(label(name), justify="right", no_wrap=True)
    for row in rows:
        seeds = [str(len(row.seeds))] if several else []
        table.add_row(row.name, *seeds, *(_cell(row.measured(name)) for name in names))
    notes = {f"{row.name}: {note}" for row in rows for note in read_metrics(row.seeds[0])["notes"]}
    legend = [f"{row.name}: {LEGEND[row.name]}" for row in rows if row.name in LEGEND]
    return printed(table) + "".join(f"{line}\n" for line in [*legend, *sorted(notes)])


def differences_table(a: Row, b: Row) -> str:
    """A text table of a − b, overall and by group: GAUC and the deepest Recall@K.

    A difference whose 95 % interval excludes 0 is marked; the others are not to be claimed, and
    none of fewer than LEAST_QUERIES queries, or where a trained row has one seed.
    """
    one_seed = a.one_seed or b.one_seed
    recalls = a.recalls
    metrics = ["gauc", *recalls[-1:]] if a.measured("gauc") and b.measured("gauc") else recalls[-1:]
    table = Table(
        title=f"{a.name} − {b.name}: difference and 95 % interval"
        + ("" if one_seed else f", * where it excludes 0, of {LEAST_QUERIES} queries or more"),
        title_style="dim",
        title_justify="left",
    )
    table.add_column("clicks of", no_wrap=True)
    for name in metrics:
        table.add_column(label(name), justify="right", no_wrap=True)
    breakdown = read_metrics(a.seeds[0])["breakdown"]
    for group in (None, *QUERY_GROUPS, *TARGET_GROUPS):
        cells = []
        for name in metrics:
            if group is not None and breakdown[group].get(name) is None:
                cells.append("-")  # GAUC of a group of products; a group without clicks
                continue
            ours, theirs = (read_ratios(row.seeds, name, group) for row in (a, b))
            found = difference(ours, theirs, SAMPLES)
            few = min(ours.queries, theirs.queries) < LEAST_QUERIES
            mark = " *" if found.excludes_zero and not (one_seed or few) else "  "
            cells.append(f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{mark}")
        table.add_row("all" if group is None else group.replace("_", " "), *cells)
    notes = [GROUPS, *([ONE_SEED] if one_seed else [])]
    return printed(table) + "".join(f"{textwrap.fill(note, 100)}\n" for note in notes)


def label(metric: str) -> str:
    """How a metric is written."""
    return {"gauc": "GAUC", "mrr": "MRR"}.get(metric, metric.replace("recall_", "Recall@"))


def printed(table: Table) -> str:
    """The table as text, as wide as it is: Rich cuts numbers to fit a terminal."""
    text = io.StringIO()
    Console(width=WIDEST, file=text).print(table)
    return text.getvalue()


def read_ratios(directories: Sequence[Path], metric: str, group: str | None = None) -> Ratios:
    """A metric of one row from the directories of its seeds, for the bootstrap.

    Args:
        metric: `gauc`, or a column of per_query.parquet (`recall_100`, `rr`, `ndcg_10`).
        group: a group of the breakdown (`title_lacks`); of targets, Recall alone.

    Raises:
        UserError: no such metric or group there, or the seeds differ in their test queries.
    """
    models = (path.parent if path.name in (HYBRID, WITH_CLICKS) else path for path in directories)
    return replace(_ratios(directories, metric, group), models=tuple(models))


def _ratios(directories: Sequence[Path], metric: str, group: str | None) -> Ratios:
    tables = [_read(directory / "per_query.parquet") for directory in directories]
    queries = tables[0]["query"].to_pylist()
    for directory, table in zip(directories, tables, strict=True):
        if table["query"].to_pylist() != queries:
            raise UserError(f"{directory}: other test queries than {directories[0]}")
    if group is not None and group not in QUERY_GROUPS | TARGET_GROUPS:
        known = ", ".join(QUERY_GROUPS | TARGET_GROUPS)
        raise UserError(f"no group {group!r} in the breakdown; there are {known}")
    if metric == "gauc":
        ratios = _gauc_ratios(directories, queries)
    elif group in TARGET_GROUPS and metric.startswith("recall_"):
        return _target_ratios(directories, queries, int(metric.removeprefix("recall_")), group)
    elif metric in tables[0].column_names:
        values = [table[metric].to_numpy(zero_copy_only=False) for table in tables]
        ratios = mean_of_queries(np.stack(values))
    else:
        raise UserError(f"{directories[0]}: no metric {metric!r} in per_query.parquet")
    if group is None:
        return ratios
    if group in TARGET_GROUPS:
        raise UserError(f"{metric} has no value by {group}: a group of products, Recall only")
    column, wanted = QUERY_GROUPS[group]
    inside = (tables[0][column].to_numpy() == wanted).astype(np.float64)
    return Ratios(ratios.numerator * inside, ratios.denominator * inside)


def compare(
    a: Sequence[Path],
    b: Sequence[Path],
    metric: str,
    group: str | None = None,
    samples: int = SAMPLES,
) -> Interval:
    """95 % interval of row a − row b, each given by the directories of its seeds."""
    return difference(read_ratios(a, metric, group), read_ratios(b, metric, group), samples)


def interval_of_seeds(directories: Sequence[Path], metric: str, samples: int = SAMPLES) -> Interval:
    """95 % interval of a row over its seeds and queries."""
    return interval(read_ratios(directories, metric), samples)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} has no such metric")
    return pq.read_table(path)


def _gauc_ratios(directories: Sequence[Path], queries: list[str]) -> Ratios:
    row = {query: i for i, query in enumerate(queries)}
    tables = [_read(directory / "per_search.parquet") for directory in directories]
    of = np.array([row[query] for query in tables[0]["query"].to_pylist()], np.int64)
    aucs = np.stack([table["auc"].to_numpy(zero_copy_only=False) for table in tables])
    return weighted_by_query(aucs, tables[0]["impressions"].to_numpy(), of, len(queries))


def _target_ratios(directories: Sequence[Path], queries: list[str], k: int, group: str) -> Ratios:
    """Recall@k of the targets in a group of the breakdown."""
    column, wanted = TARGET_GROUPS[group]
    row = {query: i for i, query in enumerate(queries)}
    values = []
    for directory in directories:
        table = _read(directory / "per_target.parquet")
        inside = table[column].to_numpy(zero_copy_only=False) == wanted
        of = np.array([row[query] for query in table["query"].to_pylist()], np.int64)
        greater, equal = table["greater"].to_numpy(), table["equal"].to_numpy()
        values.append(recall(greater[inside], equal[inside], of[inside], len(queries), k))
    return mean_of_queries(np.stack(values))


def _cell(found: Interval | None) -> str:
    if found is None:
        return "-"
    half = (found.high - found.low) / 2
    return f"{found.value:.3f}" + (f" ±{half:.3f}" if half else "")
