"""Train several recipes on the same data and print them beside the rows that need no training.

    python ray_jobs/compare.py --recipes twinbert_tiny acebert_tiny [--seeds 0 1] [settings]

All settings but the recipe and the seed, the pre-training's too, are shared. A recipe may be the
settings.yaml of a model; all of them read the same data. What is done already is reused. Each
recipe is compared with the one named before it, and the last also with the row without training
that finds most, by a bootstrap over seeds and queries. The runs carry one tag in MLflow, so that
its compare page shows the table.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from acebert.config import ScheduleSettings, Settings, load_settings
from acebert.errors import UserError
from acebert.job import refuse_given, run_job
from acebert.report.parts import refuse_repeated
from acebert.workdir import Stage, run_stage, stages_used

if TYPE_CHECKING:
    from acebert.evaluation.tables import Row

STAGES = (
    *("demo", "ingest", "vocabulary", "tokens", "features", "cnn_labels", "cnn", "plan"),
    *("pretrain", "hard_negatives", "finetune", "embed", "evaluate"),
)
"""whose seconds are shown, where a row needs them"""
OF_A_SEED = ("seed", "pretrain.seed")
"""or an interval over seeds would not know what another pre-training makes of a row"""


def work(arguments: argparse.Namespace) -> None:
    settings = shared_settings(arguments.recipes, arguments.settings)
    refuse_given(arguments.settings, ("recipe", *OF_A_SEED), "each row's own: --recipes, --seeds")
    refuse_repeated("seeds", arguments.seeds)
    from acebert.cluster import connect_and_load

    connect_and_load()
    from acebert.evaluation.evaluate import BASELINES
    from acebert.evaluation.figures import curves_figure, rows_figure
    from acebert.evaluation.tables import Row, differences_table, rows_table
    from acebert.pipeline import (
        baselines_stage,
        evaluate_stage,
        finetune_stage,
        ingest_stage,
        tracked,
    )
    from acebert.tracking import DATA_TAG, shared, tagged

    tag = settings.tracking.tag or "compare"
    spent: dict[str, list[Stage]] = {}
    with stages_used() as used:
        baselines = baselines_stage(tagged(settings, tag))
    spent["rows without training"] = list(used.values())
    rows: list[Row] = []
    models: dict[str, list[Path]] = {}
    for name, recipe in zip(row_names(arguments.recipes), arguments.recipes, strict=True):
        evaluated = []
        for seed in arguments.seeds:
            own = ["--recipe", recipe, "--tracking.tag", "none"]
            own += [word for leaf in OF_A_SEED for word in (f"--{leaf}", str(seed))]
            chosen = load_settings([*arguments.settings, *own])
            with stages_used() as used:
                model = finetune_stage(chosen)
                result = evaluate_stage(tagged(chosen, tag), model.path)[1]
            evaluated.append(result.path)
            models.setdefault(name, []).append(model.path)
            trained = chosen.train
            spent[f"{name}, seed {seed}"] = list(used.values())
        rows.append(Row(name, tuple(evaluated)))
    untrained = [Row.of(baselines.path / name) for name in BASELINES]
    print()
    print(rows_table([*untrained, *rows, *(row.with_clicks for row in rows)]))
    for above, row in pairwise(rows):
        print(differences_table(row, above))
    print(differences_table(rows[-1], finds_most(untrained)))
    print(seconds_table(spent))

    def draw(out: Path) -> None:
        rows_figure([*untrained, *rows], out / "compare.png")
        curves_figure(models, out / "curves.png")

    shown = [[row.name, *(path.name for path in row.seeds)] for row in rows]
    key = {"version": 1, "rows": shown, "baselines": baselines.digest}
    drawn = run_stage(settings.workdir, "compare", key, draw)
    data = {DATA_TAG: ingest_stage(shared(settings)).digest}
    tracked(shared(settings), drawn, name=f"{tag} {drawn.digest[:6]}", tags=data)
    print(f"pictures: {drawn.path / 'compare.png'}, {drawn.path / 'curves.png'}")
    print_next(settings, arguments, trained)


def shared_settings(recipes: Sequence[str], argv: Sequence[str]) -> Settings:
    """The first recipe's, for what belongs to no row.

    Raises:
        UserError: another recipe reads other data, or measures otherwise.
    """
    first, *others = (load_settings([*argv, "--recipe", recipe]) for recipe in recipes)
    for recipe, other in zip(recipes[1:], others, strict=True):
        theirs = of_the_table(other)
        for leaf, value in of_the_table(first).items():
            if value != theirs[leaf]:
                raise UserError(
                    f"--{leaf}: {value} in {recipes[0]}, {theirs[leaf]} in {recipe}. All rows of a "
                    "table need the same: say on the command line which"
                )
    return first


def of_the_table(settings: Settings) -> dict[str, Any]:
    """Settings that all rows share, by name. How many dimensions are kept is a row's own."""
    sections = {name: getattr(settings, name) for name in ("data", "demo", "eval")}
    leaves = {f"{name}.{leaf}": v for name, section in sections.items() for leaf, v in section}
    return {"workdir": settings.workdir, **leaves} | {"eval.dimensions": None}


def finds_most(rows: Sequence["Row"]) -> "Row":
    """The row of the highest Recall at the deepest K; rows without a Recall are passed over."""

    def found(row: "Row") -> float:
        interval = row.measured(row.recalls[-1])
        return interval.value if interval else 0.0

    return max((row for row in rows if row.recalls), key=found)


def row_names(recipes: Sequence[str]) -> list[str]:
    """Each recipe's file name or, where two have the same, all that was given."""
    stems = [Path(recipe).stem for recipe in recipes]
    return [s if stems.count(s) == 1 else r for s, r in zip(stems, recipes, strict=True)]


def seconds_table(spent: Mapping[str, Sequence[Stage]]) -> str:
    """Seconds that the stages behind each row took when they were built, those reused included."""
    from acebert.evaluation.tables import printed

    names = [name for name in STAGES if any(s.name == name for of in spent.values() for s in of)]
    table = Table(title="seconds that each stage took when it was built", title_justify="left")
    table.add_column("row")
    for name in names:
        table.add_column(name, justify="right")
    for row, stages in spent.items():
        seconds = {name: [s.seconds for s in stages if s.name == name] for name in names}
        table.add_row(row, *(f"{sum(of):.1f}" if of else "-" for of in seconds.values()))
    return printed(table)


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
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipes", nargs="+", default=["twinbert_tiny", "acebert_tiny"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    run_job(work, __doc__, parser)
