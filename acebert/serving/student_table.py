"""The 'students' stage: layers × runtime → Recall@100 kept, latency, size.

Latencies are of `QueryEncoder.encode`, from text to vector, in milliseconds; all encoders take
turns, so that their ratios hold on a machine that does other work too.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.evaluation.teach import validation_day
from acebert.serving.query_encoder import ONNX_FILES, QueryEncoder, Runtime
from acebert.training.distill_validation import HeldOutQueries
from acebert.training.teacher_targets import TeacherTargets
from acebert.workdir import Stage, run_stage

log = logging.getLogger(__name__)

VERSION = 1
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
TEACHER = "teacher"
THREADS = (1, 2)
CALLS = {1: 40, 32: 8}
"""calls in a turn, by batch"""
TURNS = 5
KEPT = 0.98  # of the teacher's Recall@100, for a student to be recommended

Row = dict[str, float]
Table = dict[str, dict[str, Row]]
"""model → runtime → numbers"""


def students_table(
    settings: Settings, ingested: Stage, targets: Stage, exports: Mapping[str, Stage]
) -> Stage:
    """Measure exported models on all queries of the validation day against the whole catalogue.

    Args:
        exports: by name in the table, the teacher's under TEACHER first

    Writes report.json (`Table`), table.txt and students.png.
    """
    key = {
        "version": VERSION,
        "targets": targets.digest,
        "exports": {name: stage.digest for name, stage in exports.items()},
        "cpus": os.cpu_count(),
    }

    def build(out: Path) -> None:
        queries, _, _ = validation_day(ingested.path)
        held_out = HeldOutQueries(TeacherTargets.open(targets.path), len(queries))
        paths = {name: stage.path for name, stage in exports.items()}
        table = _quality(paths, queries, held_out)
        for (name, runtime, measure), p50 in latencies(paths, queries).items():
            table[name][runtime][measure] = p50
        (out / "report.json").write_text(json.dumps(table, indent=2) + "\n")
        (out / "table.txt").write_text(as_text(table))
        _figure(table, out / "students.png")

    return run_stage(settings.workdir, "students", key, build)


def _quality(paths: Mapping[str, Path], queries: list[str], held_out: HeldOutQueries) -> Table:
    """Recall, closeness and size of each model in each runtime."""
    table: Table = {}
    for name, path in paths.items():
        table[name] = {}
        for runtime in RUNTIMES:
            encoder = QueryEncoder.load(path, runtime)
            vectors = encoder.encode(queries)
            if runtime == "torch":
                own = vectors
            table[name][runtime] = {
                **held_out.measure(vectors),
                "max_difference_to_torch": float(np.abs(vectors - own).max()),
                "least_cosine_to_torch": float(np.einsum("qd,qd->q", vectors, own).min()),
                "megabytes": _megabytes(path, runtime),
            }
            log.info("students: %s, %s: %s", name, runtime, _numbers(table[name][runtime]))
    return table


def _megabytes(path: Path, runtime: Runtime) -> float:
    """Of the query side's weights, or of the ONNX file [10^6 bytes]."""
    if runtime != "torch":
        return (path / ONNX_FILES[runtime]).stat().st_size / 1e6
    from acebert.models.dual import DualEncoder

    model = DualEncoder.load(path)
    tower = model.query_tower or model.tower
    return sum(p.nbytes for p in tower.parameters()) / 1e6


def latencies(
    paths: Mapping[str, Path], queries: list[str]
) -> dict[tuple[str, Runtime, str], float]:
    """(model, runtime, 'ms_batch1_threads1' …) → median of a call [ms]."""
    import torch

    cases = list(product(paths, RUNTIMES, THREADS))
    encoders = {case: QueryEncoder.load(paths[case[0]], *case[1:]) for case in cases}
    seconds: dict[tuple[str, Runtime, str], list[float]] = {}
    draw = np.random.default_rng(0)
    for _, batch in product(range(TURNS), CALLS):
        texts: list[NDArray[np.str_]] = [
            draw.choice(queries, batch) for _ in range(CALLS[batch] + 2)
        ]
        for case, encoder in encoders.items():
            name, runtime, threads = case
            torch.set_num_threads(threads)  # one number for the process, set by whoever came last
            times = []
            for some in texts:
                start = time.perf_counter()
                encoder.encode(some.tolist())
                times.append(time.perf_counter() - start)
            measure = f"ms_batch{batch}_threads{threads}"
            seconds.setdefault((name, runtime, measure), []).extend(times[2:])  # two to warm up
    return {case: 1e3 * float(np.median(times)) for case, times in seconds.items()}


def as_text(table: Table) -> str:
    """The table for people, and which row to take."""
    columns = {
        "kept": ("kept_100", "6.3f"),
        "new": ("kept_100_new", "6.3f"),
        "overlap": ("overlap_100", "7.3f"),
        "cosine": ("cosine", "6.4f"),
        "MB": ("megabytes", "6.1f"),
        **{
            f"b{batch} t{threads}": (f"ms_batch{batch}_threads{threads}", "7.2f")
            for batch, threads in product(CALLS, THREADS)
        },
    }
    base = table[TEACHER]["torch"]["ms_batch1_threads1"]
    lines = [
        "Recall@100 of the teacher on the validation day: "
        f"{table[TEACHER]['torch']['recall_100']:.4f}; kept: share of it, new: of queries not "
        "trained on; overlap: share of the teacher's first 100; b, t: p50 of a call [ms] by batch "
        "and threads; faster: than the teacher in torch, b1 t1",
        f"{'model':<12}{'runtime':<11}"
        + "".join(f"{name:>{int(form[0]) + 2}}" for name, (_, form) in columns.items())
        + "  faster",
    ]
    for model, runtimes in table.items():
        for runtime, row in runtimes.items():
            cells = "".join(f"  {row[key]:{form}}" for key, form in columns.values())
            faster = base / row["ms_batch1_threads1"]
            lines.append(f"{model:<12}{runtime:<11}{cells}  {faster:5.1f}x")
    good = [
        (row["ms_batch1_threads1"], model, runtime)
        for model, runtimes in table.items()
        for runtime, row in runtimes.items()
        if row["kept_100"] >= KEPT
    ]
    what = f"keeps {KEPT:.0%} of Recall@100"
    if good:
        _, model, runtime = min(good)
        lines.append(f"fastest that {what}: {model}, {runtime}")
    else:  # of a teacher that finds nothing there is nothing to keep
        lines.append(f"none {what}")
    return "\n".join(lines) + "\n"


def _numbers(row: Row) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items())


def _figure(table: Table, path: Path) -> None:
    """Recall@100 kept over the latency of one query on one thread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for runtime, marker in zip(RUNTIMES, "os^", strict=True):
        rows = [runtimes[runtime] for runtimes in table.values()]
        x = [row["ms_batch1_threads1"] for row in rows]
        y = [row["kept_100"] for row in rows]
        axes.plot(x, y, marker, label=runtime)
        for name, at in zip(table, zip(x, y, strict=True), strict=True):
            axes.annotate(name, at, textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.axhline(KEPT, color="0.7", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel("one query on one thread, p50 [ms]")
    axes.set_ylabel("Recall@100 kept")
    axes.legend()
    figure.savefig(path, dpi=120)
