"""Train several recipes on the same data and print them beside the rows that need no training.

    python ray_jobs/compare.py --recipes twinbert_tiny acebert_tiny [--seeds 0 1] [settings]

All settings but the recipe and the seed are shared. What is done already is reused. The runs carry
one tag in MLflow, so that its compare page shows the table.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from acebert.config import Settings, load_settings
from acebert.evaluation.evaluate import BASELINES
from acebert.evaluation.figures import rows_figure
from acebert.evaluation.tables import rows_table
from acebert.job import run_job
from acebert.pipeline import baselines_stage, evaluate_stage, finetune_stage
from acebert.tracking import tracking_uri
from acebert.workdir import Stage


def work(settings: Settings, arguments: argparse.Namespace) -> None:
    baselines = baselines_stage(settings)
    rows = [baselines.path / name for name in BASELINES]
    spent: dict[str, list[Stage]] = {}
    tag = settings.tracking.tag or "compare"
    model = None
    for recipe in arguments.recipes:
        for seed in arguments.seeds:
            own = ["--recipe", recipe, "--seed", str(seed), "--tracking.tag", tag]
            chosen = load_settings([*arguments.settings, *own])
            model = finetune_stage(chosen)
            evaluated = evaluate_stage(chosen, model.path)
            rows.append(evaluated.path)
            spent[f"{recipe}, seed {seed}"] = [model, evaluated]
    figure = settings.workdir / "compare.png"
    rows_figure(rows, figure)
    print()
    print(rows_table(rows))
    print_seconds({"rows without training": [baselines], **spent})
    print(f"picture: {figure}")
    if model is not None:
        print_next(settings, arguments.recipes[-1], model.path)


def print_seconds(spent: dict[str, list[Stage]]) -> None:
    """Seconds of each stage that a row needed, those reused included."""
    names = sorted({stage.name for stages in spent.values() for stage in stages})
    table = Table(title="seconds a stage took when it was built", title_justify="left")
    for name in ["row", *names]:
        table.add_column(name, justify="left" if name == "row" else "right")
    for row, stages in spent.items():
        seconds = {stage.name: f"{stage.seconds:.1f}" for stage in stages}
        table.add_row(row, *(seconds.get(name, "-") for name in names))
    Console().print(table)


def print_next(settings: Settings, recipe: str, model: Path) -> None:
    """Three commands to try."""
    steps = json.loads((model / "report.json").read_text())["steps"]
    print(
        "Next, try:\n"
        f"  mlflow ui --backend-store-uri {tracking_uri(settings)}\n"
        f"  python ray_jobs/finetune.py --recipe {recipe} --workdir {settings.workdir} "
        f"--train.max_steps {2 * steps}\n"
        f"  python ray_jobs/draw_plan.py --recipe {recipe} --workdir {settings.workdir}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--recipes", nargs="+", default=["twinbert_tiny", "acebert_tiny"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    run_job(work, __doc__, parser)
