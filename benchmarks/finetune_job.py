"""`python ray_jobs/finetune.py` as its user starts it: seconds to the first step, and workers.

    python benchmarks/finetune_job.py --turns 2 --recipe acebert_tiny --train.batch_size 384

The stages before fine-tuning are made first; then the same job, over and over, with one worker on
one core, one on all, two on a machine, and two on two simulated nodes, in turns. `--layouts` takes
some of them by their number.

To the first step, by the job's own lines as they arrive: `ray` is the start of Python and of Ray;
`stages` the rest of the modules, which are imported meanwhile, and the stages found ready; `mlflow`
the run's start; `workers` Ray Train's, a worker's modules, its inputs and the model; `step` the
first step with its batch. Then, of the steps from the
fourth on, medians: pairs a second, that against one worker on one core, and the seconds of a step
by part (two workers wait for each other in `forward`, where embeddings are gathered, and in
`backward`, where gradients are summed).
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from acebert.config import load_settings
from acebert.job import run_job

JOB = Path(__file__).parents[1] / "ray_jobs" / "finetune.py"
WARM_UP = 3
MARKS = {
    "ray": r"ray: ",
    "stages": r"finetune: building",
    "mlflow": r"finetune-\w+: workers",
    "workers": r"finetune: \d+ steps of",
}
"""the job's lines that end a part"""
STEP = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Layout:
    name: str
    options: tuple[str, ...]
    nodes: int = 1


ONE = ("--train.num_workers", "1")
TWO = ("--train.num_workers", "2", "--train.threads_per_worker", "1")
LAYOUTS = (
    Layout("1 worker, 1 core", (*ONE, "--train.threads_per_worker", "1")),
    Layout("1 worker, all cores", ONE),
    Layout("2 workers, 1 core each", TWO),
    Layout("2 nodes, 1 worker of 1 core each", TWO, nodes=2),
)


def run(words: list[str], layout: Layout) -> dict[str, float]:
    """Seconds by part and pairs a second of one job."""
    cluster = None
    if layout.nodes > 1:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(layout.nodes):
            cluster.add_node(num_cpus=1)
    try:
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        if cluster is not None:
            env["RAY_ADDRESS"] = cluster.address
        return _measured([sys.executable, str(JOB), *words, *layout.options], env)
    finally:
        if cluster is not None:
            cluster.shutdown()


def _measured(command: list[str], env: dict[str, str]) -> dict[str, float]:
    start = time.perf_counter()
    job = subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert job.stdout is not None
    lines, ends = [""], {}
    for line in job.stdout:
        lines.append(line.rstrip())
        for part, pattern in MARKS.items():
            if part not in ends and re.search(pattern, line):
                ends[part] = time.perf_counter() - start
    if job.wait() or list(ends) != list(MARKS):
        raise SystemExit("\n".join(lines[-30:]))
    history = pq.read_table(Path(lines[-1]) / "history.parquet").to_pydict()
    seconds, before = {}, 0.0
    for part, end in ends.items():
        seconds[part], before = end - before, end
    seconds["step"] = history["seconds"][0]
    seconds["first step"] = before + seconds["step"]
    for part in STEP:
        seconds[part] = statistics.median(history[f"seconds_{part}"][WARM_UP:])
    seconds["pairs/s"] = statistics.median(history["pairs_per_second"][WARM_UP:])
    return seconds


def work(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.settings)
    own = Path(tempfile.mkdtemp(prefix="finetune-job-"))
    words = [
        *arguments.settings,
        *["--workdir", str(settings.workdir if arguments.keep else own)],
        *["--train.max_steps", str(arguments.steps), "--train.valid_searches", "50"],
        *["--train.valid_products", "200", "--train.validate_every", str(arguments.steps)],
    ]
    layouts = [LAYOUTS[number - 1] for number in arguments.layouts]
    rows: dict[str, list[dict[str, float]]] = {layout.name: [] for layout in layouts}
    console = Console(width=140)
    try:
        run([*words, "--loss.gamma", "9"], LAYOUTS[1])  # the stages, the files in memory
        for turn in range(arguments.turns):
            for layout in layouts:
                gamma = 10 + sum(map(len, rows.values()))  # one that was not trained yet
                row = run([*words, "--loss.gamma", str(gamma)], layout)
                rows[layout.name].append(row)
                console.print(
                    f"turn {turn + 1}, {layout.name}: first step after {row['first step']:.1f} s, "
                    f"{row['pairs/s']:.0f} pairs/s, load {os.getloadavg()[0]:.1f}"
                )
    finally:
        shutil.rmtree(own, ignore_errors=True)
    report(rows, console)


def report(rows: dict[str, list[dict[str, float]]], console: Console) -> None:
    """Medians over the turns."""
    median = {
        name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        for name, turns in rows.items()
    }
    table = Table(title="seconds to the first step", title_justify="left")
    table.add_column("")
    for column in (*MARKS, "step", "together"):
        table.add_column(column, justify="right")
    for name, row in median.items():
        parts = (*MARKS, "step", "first step")
        table.add_row(name, *(f"{row[part]:.1f}" for part in parts))
    console.print(table)
    table = Table(title="a step", title_justify="left")
    table.add_column("")
    for column in ("pairs/s", "against one core", *(f"{part}, s" for part in STEP)):
        table.add_column(column, justify="right")
    base = median.get(LAYOUTS[0].name)
    for name, row in median.items():
        ratio = f"{row['pairs/s'] / base['pairs/s']:.2f}" if base else ""
        table.add_row(name, f"{row['pairs/s']:.0f}", ratio, *(f"{row[part]:.3f}" for part in STEP))
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="steps of a job")
    parser.add_argument("--layouts", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--keep", action="store_true", help="work in --workdir, and leave it")
    run_job(work, __doc__, parser)
