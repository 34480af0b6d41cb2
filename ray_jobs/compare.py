"""Train several recipes on the same data and print them beside the rows that need no training.

    python ray_jobs/compare.py --recipes twinbert_tiny acebert_tiny [--seeds 0 1] [settings]

All settings but the recipe and the seed are shared. What is done already is reused. Each recipe is
compared with the one named before it, by a bootstrap over seeds and queries. The runs carry one tag
in MLflow, so that its compare page shows the table.
"""

import argparse
import json
import shlex
import sys
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from acebert.config import ScheduleSettings, Settings, load_settings
from acebert.job import run_job
from acebert.workdir import Stage


def work(settings: Settings, arguments: argparse.Namespace) -> None:
    from acebert.evaluation.evaluate import BASELINES
    from acebert.evaluation.figures import curves_figure, rows_figure
    from acebert.evaluation.tables import Row, differences_table, rows_table
    from acebert.pipeline import baselines_stage, evaluate_stage, finetune_stage
    from acebert.tracking import tagged

    tag = settings.tracking.tag or "compare"
    baselines = baselines_stage(tagged(settings, tag))
    spent: dict[str, dict[str, float]] = {"rows without training": {"evaluate": baselines.seconds}}
    rows: list[Row] = []
    models: dict[str, list[Path]] = {}
    for recipe in arguments.recipes:
        name = Path(recipe).stem
        evaluated = []
        for seed in arguments.seeds:
            own = ["--recipe", recipe, "--seed", str(seed), "--tracking.tag", "none"]
            chosen = load_settings([*arguments.settings, *own])
            model = finetune_stage(chosen)
            embedded, result = evaluate_stage(tagged(chosen, tag), model.path)
            evaluated.append(result.path)
            models.setdefault(name, []).append(model.path)
            trained = chosen.train
            spent[f"{recipe}, seed {seed}"] = seconds_of(settings, model, embedded, result)
        rows.append(Row(name, tuple(evaluated)))
    untrained = [Row.of(baselines.path / name) for name in BASELINES]
    print()
    print(rows_table([*untrained, *rows]))
    for above, row in pairwise(rows):
        print(differences_table(row, above))
    print_seconds(spent)
    picture, curves = settings.workdir / "compare.png", settings.workdir / "curves.png"
    rows_figure([*untrained, *rows], picture)
    curves_figure(models, curves)
    print(f"pictures: {picture}, {curves}")
    print_next(settings, arguments, trained)


def seconds_of(settings: Settings, model: Stage, *later: Stage) -> dict[str, float]:
    """Seconds of every stage behind a row when it was built, those reused included."""
    key = json.loads((model.path / "stage.json").read_text())["key"]
    out = {}
    for name in ("ingest", "tokens", "features", "plan"):
        if name in key:
            record = settings.workdir / name / key[name] / "stage.json"
            out[name] = json.loads(record.read_text())["seconds"]
    return out | {stage.name: stage.seconds for stage in (model, *later)}


def print_seconds(spent: dict[str, dict[str, float]]) -> None:
    names = ["ingest", "tokens", "features", "plan", "finetune", "embed", "evaluate"]
    table = Table(title="seconds that each stage took when it was built", title_justify="left")
    table.add_column("row")
    for name in names:
        table.add_column(name, justify="right")
    for row, seconds in spent.items():
        cells = (f"{seconds[name]:.1f}" if name in seconds else "-" for name in names)
        table.add_row(row, *cells)
    Console(width=100).print(table)


def print_next(
    settings: Settings, arguments: argparse.Namespace, trained: ScheduleSettings
) -> None:
    """Three commands to try, on the same data; the second trains twice as long."""
    from acebert.tracking import tracking_uri, without_password

    scripts = Path(sys.executable).parent
    uri = without_password(tracking_uri(settings))
    browser = f"{scripts}/mlflow ui --workers 1 --backend-store-uri {uri}"
    same = shlex.join([*arguments.settings, "--recipe", arguments.recipes[-1]])
    longer = f"--train.epochs {2 * trained.epochs}"
    if trained.max_steps:
        longer += f" --train.max_steps {2 * trained.max_steps}"
    print(
        "Next, try:\n"
        f"  {uri if uri.startswith('http') else browser}\n"
        f"  {sys.executable} ray_jobs/finetune.py {same} {longer}\n"
        f"  {sys.executable} ray_jobs/draw_plan.py {same}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--recipes", nargs="+", default=["twinbert_tiny", "acebert_tiny"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    run_job(work, __doc__, parser)
