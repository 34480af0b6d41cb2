"""The 'report' stage: from measured rows to one page that stands alone.

`report.html` holds its pictures and style, and asks nobody for anything; `numbers.json` has every
number of it for programs, `figures/` the pictures.
"""

import hashlib
import json
import os
import platform
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq

from acebert import __version__
from acebert.config import Settings, flatten
from acebert.evaluation.significance import Interval
from acebert.evaluation.tables import label
from acebert.machine import machine
from acebert.report import words
from acebert.report.alignment import alignment_stage
from acebert.report.alignment_figure import alignment_panels
from acebert.report.departures import departures, start_weights
from acebert.report.gains import GROUP_METRICS, Comparison, comparisons, queries_of, value_of
from acebert.report.loss_figure import final_losses, loss_curves, loss_panels, steps_trained
from acebert.report.page import render
from acebert.report.partitions_figure import (
    best_points,
    lost_trials,
    partition_panels,
    partition_points,
)
from acebert.report.parts import (
    SWEPT,
    TABLES,
    WITH_ADVERSARY,
    WITHOUT_ADVERSARY,
    Table,
)
from acebert.report.rows import ACEBERT, PLUS, PLUS_CLICKS
from acebert.report.rows_figure import rows_panel
from acebert.report.run import Measured, Results, trainings
from acebert.report.style import Panel
from acebert.tracking import code_digest, without_password
from acebert.workdir import Stage, run_stage

VERSION = 3
NOT_TOLD: Any = {
    **dict.fromkeys(("recipe", "workdir", "tracking", "seed", "cnn", "demo"), True),
    "pretrain": {"seed"},
}
"""settings that make no row different"""
T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """What was asked for.

    Attributes:
        parts: of `acebert.report.parts.PARTS`
        seeds: of the trained rows, by part; a row has those of the first part with the most seeds,
            of those that it stands in
        arguments: the whole command line
    """

    parts: tuple[str, ...]
    seeds: dict[str, tuple[int, ...]]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A table of the page: rows with their intervals, comparisons, pictures."""

    table: Table
    names: list[tuple[str, str]]
    """(row, what the table calls it), those that were measured, from the top"""
    values: dict[str, dict[str, Interval]]
    """metric → row → value"""
    groups: dict[str, dict[tuple[str, str], float]]
    """row → (group, metric) → value"""
    queries: dict[tuple[str, str], int]
    """(group, metric) → the queries that count, where a row has that number"""
    comparisons: list[Comparison]
    panels: list[Panel]


def report_stage(
    settings: Settings, ingested: Stage, given: Given, results: Results, swept: Path | None
) -> Stage:
    """Build the page. `swept` is the directory of Fig. 5's sweep, where that part is wanted."""
    given = replace(given, arguments=tuple(map(without_password, given.arguments)))
    systems = {
        system.name: results.rows[system.name]
        for system in (WITHOUT_ADVERSARY, WITH_ADVERSARY)
        if system.name in results.rows
    }
    shared = _shared_seeds(list(systems.values())) if len(systems) == 2 else []
    told = Results(results.rows, dict(results.left_out), results.failed)
    names = f"{WITHOUT_ADVERSARY.name} and {WITH_ADVERSARY.name}"
    for part, figure in (("fig6", "Figure 6"), ("fig7", "Figure 7")):
        if part in given.parts and not shared:
            both = len(systems) == 2
            why = "have no seed in common" if both else "were not both measured"
            told.left_out[figure] = f"{names} {why}"
    aligned = None
    if "fig7" in given.parts and shared:
        directories = {
            name: [measured.embedded[measured.seeds.index(seed)] for seed in shared]
            for name, measured in systems.items()
        }
        aligned = _drawn(told, "Figure 7", alignment_stage, settings, ingested, directories)
    key = {
        "version": VERSION,
        "code": code_digest(),
        "given": asdict(given),
        "rows": {
            name: [
                [_of_stage(path, settings.workdir) for path in measured.row.seeds],
                [path.name for path in measured.models],
                measured.others,
            ]
            for name, measured in results.rows.items()
        },
        "left_out": dict(told.left_out),
        "swept": _digest(swept / "trials.parquet") if swept else None,
        "aligned": aligned.digest if aligned else None,
    }

    def build(out: Path) -> None:
        sections = [
            _section(table, told)
            for part in given.parts
            for table in TABLES.get(part, ())
            if any(system.name in results.rows for system in table.systems)
        ]
        loss = alignment = partitions = None
        if "fig6" in given.parts and shared:
            loss = _drawn(told, "Figure 6", _loss, systems, shared)
        if aligned:
            alignment = _drawn(told, "Figure 7", _alignment, aligned.path)
        if swept:
            told.left_out |= _drawn(told, "Figure 5", lost_trials, swept) or {}
            partitions = _drawn(told, "Figure 5", _partitions, swept)
        paths = _trainings(settings.workdir, results.rows, swept)
        ours = results.rows[ACEBERT.name].settings if ACEBERT.name in results.rows else None
        context = {
            "given": given,
            "command": shlex.join(given.arguments),
            "sections": sections,
            "rows": results.rows,
            "left_out": told.left_out,
            "loss": loss,
            "alignment": alignment,
            "partitions": partitions,
            "summary": _summary(sections, results.rows, (partitions, loss, alignment)),
            "departures": departures(ours) if ours else None,
            "starts": _starts(sections, results.rows),
            "data": _data(ingested),
            "machine": _machine(),
            "trained_on": _trained_on(paths),
            "settings": _differing(results.rows),
            "common": _common(results.rows),
            "cost": sum(paths.values()) + _cost_of_others(results.rows),
        }
        (out / "report.html").write_text(render(context), encoding="utf-8")
        (out / "numbers.json").write_text(json.dumps(_numbers(sections, context), indent=2) + "\n")
        (out / "figures").mkdir()
        shown = [panel for section in sections for panel in section.panels]
        for figure in (loss, alignment, partitions):
            shown += figure["panels"] if figure else []
        for panel in shown:
            (out / "figures" / f"{panel.name}.png").write_bytes(panel.png)

    return run_stage(settings.workdir, "report", key, build)


def _drawn(told: Results, name: str, draw: Callable[..., T], *of: object) -> T | None:
    """`draw(*of)`; left out by its name where it fails, whatever the reason."""
    try:
        return draw(*of)
    except Exception as error:
        told.leave_out(name, error)
        return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _of_stage(path: Path, workdir: Path) -> str:
    return str(path.relative_to(workdir)) if path.is_relative_to(workdir) else str(path)


def _section(table: Table, told: Results) -> Section:
    names = [*table.untrained, *(system.name for system in table.systems)]
    shown = [(n, table.aliases.get(n, n)) for n in names if n in told.rows]
    measured = {name: told.rows[name] for name, _ in shown}
    values = {metric: _intervals(measured, metric) for metric in table.metrics}
    groups = {
        name: {
            (group, metric): value
            for group in table.groups
            for metric in GROUP_METRICS
            if (value := value_of(one.row, metric, group)) is not None
        }
        for name, one in measured.items()
    }
    has = {of: name for name, found in groups.items() for of in found}
    queries = {of: queries_of(measured[name].row, *of) for of, name in has.items()}
    panels = []
    for metric, found in values.items():
        figure = f"{table.title}, figure of {label(metric)}"
        panel = _drawn(told, figure, rows_panel, table.key, metric, found, shown)
        panels += [panel] if panel else []
    return Section(table, shown, values, groups, queries, comparisons(table, measured), panels)


def _intervals(measured: dict[str, Measured], metric: str) -> dict[str, Interval]:
    found = {name: one.row.measured(metric) for name, one in measured.items()}
    return {name: interval for name, interval in found.items() if interval is not None}


def _shared_seeds(rows: Sequence[Measured]) -> list[int]:
    """Seeds that all of the rows were trained with: Fig. 6 and 7 pair by them."""
    return [seed for seed in rows[0].seeds if all(seed in row.seeds for row in rows)]


def _loss(systems: dict[str, Measured], seeds: Sequence[int]) -> dict[str, Any]:
    models = {
        name: [measured.models[measured.seeds.index(seed)] for seed in seeds]
        for name, measured in systems.items()
    }
    curves = {name: loss_curves(of) for name, of in models.items()}
    names = WITH_ADVERSARY.name, WITHOUT_ADVERSARY.name
    steps = [steps_trained(models[name]) for name in names]
    by_the_clock = any(m.settings and m.settings.train.max_minutes for m in systems.values())
    if by_the_clock and len({*steps[0], *steps[1]}) > 1:
        return {"panels": loss_panels(curves), "words": words.steps_words(*steps), "ends": None}
    ends = final_losses(*(curves[name] for name in names))
    return {
        "panels": loss_panels(curves),
        "words": words.loss_words(*ends),
        "ends": dict(zip(names, ends, strict=True)),
    }


def _alignment(directory: Path) -> dict[str, Any]:
    probes = json.loads((directory / "probe.json").read_text())
    by_seed = {name: [probe["mlp"] for probe in found] for name, found in probes.items()}
    table = {
        name: {kind: float(np.mean([probe[kind] for probe in found])) for kind in ("linear", "mlp")}
        for name, found in probes.items()
    }
    return {
        "panels": alignment_panels(directory / "points.parquet"),
        "words": words.probe_words(by_seed[WITHOUT_ADVERSARY.name], by_seed[WITH_ADVERSARY.name]),
        "probes": table,
        "held_out": probes[WITH_ADVERSARY.name][0]["points"],
    }


def _partitions(swept: Path) -> dict[str, Any]:
    points = partition_points(swept)
    return {
        "panels": partition_panels(points, SWEPT.name),
        "words": words.partitions_words(best_points(swept)),
        "points": points,
    }


def _summary(
    sections: Sequence[Section],
    rows: dict[str, Measured],
    figures: Sequence[dict[str, Any] | None],
) -> list[str]:
    paper = [s for s in sections if s.table.paper]
    told = [words.count_words([c for s in paper for c in s.comparisons])]
    for section in sections:
        if section.table.key == "table1":
            told += [words.order_words(section.comparisons, m) for m in GROUP_METRICS]
            chosen = {("ACE-BERT", "TwinBERT"), *((c, b) for c, b in _plus(section))}
            told += [
                words.step_words(c)
                for c in section.comparisons
                if (c.step.row, c.step.beside) in chosen
            ]
    told += [figure["words"] for figure in figures if figure]
    trained = [measured for measured in rows.values() if measured.seconds is not None]
    if once := sum(measured.one_seed for measured in trained):
        told.append(
            f"Nothing is claimed of rows that were trained with one seed, {once} of {len(trained)}:"
            " their intervals are over the test day's queries alone, and another seed may tell "
            "otherwise. --seeds 0 1 2 trains with more, --table1_seeds those of Table 1."
        )
    settings = [measured.settings for measured in trained if measured.settings]
    if any(one.image.cnn_weights == "trained" for one in settings):
        told.append(
            "The patch CNN is trained here, once for whole photos and once for regions of "
            "interest, and all seeds share it: what another training of it would change is in no "
            "interval."
        )
    return [sentence for sentence in told if sentence]


def _starts(sections: Sequence[Section], rows: dict[str, Measured]) -> dict[str, str]:
    """Start weights of the trained rows in the paper's tables."""
    return {
        name: start_weights(settings)
        for section in sections
        if section.table.paper
        for name, _ in section.names
        if (settings := rows[name].settings)
    }


def _plus(section: Section) -> list[tuple[str, str]]:
    ours = (PLUS.name, PLUS_CLICKS.name)
    return [(s.row, s.beside) for s in section.table.steps if s.row in ours]


def _data(ingested: Stage) -> dict[str, Any]:
    report = json.loads((ingested.path / "report.json").read_text())
    return {"digest": ingested.digest, **report}


def _machine() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "page and its measurements": machine(),
        "memory of this node": f"{memory:.0f} GiB",
        "Python": platform.python_version(),
        "acebert": f"{__version__}, code {code_digest()}",
    }


def _trainings(workdir: Path, rows: dict[str, Measured], swept: Path | None) -> dict[Path, float]:
    """Seconds of all trainings of ours behind the page, by directory."""
    models = {path for measured in rows.values() for path in measured.models}
    if swept:
        trials = pq.read_table(swept / "trials.parquet", columns=["status", "model"]).to_pylist()
        models |= {Path(t["model"]) for t in trials if t["status"] == "finished"}
    ours: dict[Path, float] = {}
    for model in models:
        ours |= trainings(model, workdir)
    return ours


def _cost_of_others(rows: dict[str, Measured]) -> float:
    """Seconds of the trainings that are not ours."""
    return sum(m.seconds * len(m.row.seeds) for m in rows.values() if m.seconds and not m.models)


def _trained_on(trainings: Iterable[Path]) -> list[str]:
    """The distinct machines and versions of the code; a training may be older than their record."""
    reports = (json.loads((path / "report.json").read_text()) for path in trainings)
    return sorted({f"{r['machine']}, code {r['code']}" for r in reports if "machine" in r})


def _flat(measured: Measured) -> dict[str, Any]:
    assert measured.settings is not None
    own_cnn = measured.settings.image.cnn_weights == "trained"
    told = {leaf: all_of for leaf, all_of in NOT_TOLD.items() if leaf != "cnn" or not own_cnn}
    flat = flatten(measured.settings.model_dump(mode="json", exclude=told))
    return {k: without_password(v) if isinstance(v, str) else v for k, v in flat.items()}


def _common(rows: dict[str, Measured]) -> dict[str, Any]:
    """Settings that all trained rows share."""
    trees = [_flat(measured) for measured in rows.values() if measured.settings]
    if not trees:
        return {}
    return {
        leaf: value
        for leaf, value in trees[0].items()
        if all(tree.get(leaf) == value for tree in trees)
    }


def _differing(rows: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    """Row → the settings in which the trained rows differ."""
    common = _common(rows)
    return {
        name: {leaf: value for leaf, value in _flat(measured).items() if leaf not in common}
        for name, measured in rows.items()
        if measured.settings
    }


def _numbers(sections: Sequence[Section], context: dict[str, Any]) -> dict[str, Any]:
    def plain(interval: Interval) -> dict[str, float | None]:
        ends = {"low": interval.low, "high": interval.high}  # JSON knows no infinity
        return {"value": interval.value} | {k: v if isfinite(v) else None for k, v in ends.items()}

    rows: dict[str, Measured] = context["rows"]
    return {
        "summary": context["summary"],
        "left_out": context["left_out"],
        **{name: context[name] for name in ("departures", "starts", "data", "trained_on")},
        "seeds": {name: measured.seeds for name, measured in rows.items()},
        "validation_day": {name: m.valid for name, m in rows.items() if m.valid},
        "tables": {
            s.table.key: {
                "rows": {
                    metric: {name: plain(found) for name, found in by_row.items()}
                    for metric, by_row in s.values.items()
                },
                "groups": [
                    {
                        **{"queries": group, "metric": metric, "count": count},
                        "rows": {
                            name: found[group, metric]
                            for name, found in s.groups.items()
                            if (group, metric) in found
                        },
                    }
                    for (group, metric), count in s.queries.items()
                ],
                "gains": [
                    {
                        "row": c.step.row,
                        "beside": c.step.beside,
                        "metric": gain.metric,
                        "queries": gain.group or "all",
                        "count": gain.queries,
                        **plain(gain.ours),
                        "difference": plain(gain.difference),
                        "paper": gain.paper,
                        "verdict": words.verdict(gain),
                    }
                    for c in s.comparisons
                    for gain in c.gains
                ],
            }
            for s in sections
        },
        "final_losses": context["loss"]["ends"] if context["loss"] else None,
        "probes": context["alignment"]["probes"] if context["alignment"] else None,
        "partitions": [
            {k: plain(v) if isinstance(v, Interval) else v for k, v in point.items()}
            for point in (context["partitions"]["points"] if context["partitions"] else [])
        ],
        "cost": {
            name: {"seconds": m.seconds, "pairs": m.pairs}
            for name, m in rows.items()
            if m.seconds is not None
        },
    }
