"""The paper's tables and figures on your data, and what goes beyond it, on one page.

    python ray_jobs/reproduce.py [--parts table1 fig6 …] [--seeds 0 1 2] [settings]

Trains every row with every seed; what is done is reused, and the same command goes on where it was
stopped. Settings of the command line hold for all rows; what rows are told apart by is refused
there. The last line printed is the page; where rows failed it lacks them, and the job has failed.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from acebert.config import Settings, load_settings
from acebert.errors import UserError
from acebert.job import refuse_given, run_job
from acebert.report.parts import PARTS, TABLES, seeds_by_part, systems_of, told_apart_by
from acebert.report.rows import System

FIG_5 = Path(__file__).parents[1] / "tune_spaces" / "fig5_partitions.yaml"


def work(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.settings)
    own = ("recipe", "seed", "pretrain.seed")
    refuse_given(arguments.settings, own, "each row's own: give --size and --seeds")
    told_apart = "rows are told apart by it, and would not be what the page calls them"
    refuse_given(arguments.settings, told_apart_by(arguments.parts), told_apart)
    seeds = seeds_by_part(arguments.parts, arguments.seeds, arguments.table1_seeds)
    at_once = arguments.rows_at_once
    if at_once is not None and at_once < 1:
        raise UserError(f"--rows_at_once {at_once}: at least one")
    start = arguments.sentence_transformer
    if start is not None and not start.is_dir():
        raise UserError(f"--sentence_transformer {start}: no such directory")
    from acebert.cluster import connect_and_load, leave

    connect_and_load()
    from acebert.pipeline import ingest_stage, tracked
    from acebert.report.report import Given, report_stage
    from acebert.report.run import (
        Results,
        measure_partitions,
        measure_rival,
        measure_systems,
        measure_untrained,
    )
    from acebert.tracking import DATA_TAG

    given = Given(tuple(seeds), seeds, tuple(sys.argv))
    make = partial(row_settings, arguments)
    results = Results()
    wanted = systems_of(given.parts)
    if any(table.untrained for part in given.parts for table in TABLES.get(part, ())):
        measure_untrained(settings, results)
    measure_systems(wanted, seeds, make, results, at_once)
    if "table1" in given.parts:
        lr = arguments.sentence_transformer_lr
        measure_rival(make, start, seeds["table1"], lr, results)
    swept = None
    if "fig5" in given.parts:
        swept = measure_partitions(make, FIG_5, seeds["fig5"], results, at_once)
    ingested = ingest_stage(settings)
    page = report_stage(settings, ingested, given, results, swept)
    tracked(settings, page, tags={DATA_TAG: ingested.digest})
    leave()
    print(page.path / "report.html")
    if results.failed:
        raise UserError(f"left out of the page, which says why: {', '.join(results.failed)}")


def row_settings(arguments: argparse.Namespace, system: System, seed: int) -> Settings:
    """Those of one training. A row that starts from a pre-training has one of its own for each
    seed, or its interval would not know what another pre-training makes of it."""
    recipe = f"{system.recipe}_tiny" if arguments.size == "tiny" else system.recipe
    own = ["--recipe", recipe, "--seed", str(seed), "--pretrain.seed", str(seed)]
    named = ["--tracking.tag", "none", "--tracking.run_name", f"{system.name}, seed {seed}"]
    none = ["--tracking.register_as", "none"]  # a table's rows are not for serving
    return load_settings([*arguments.settings, *own, *named, *none, *system.changed])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of every trained row")
    parser.add_argument(
        "--table1_seeds", nargs="+", type=int, help="of Table 1's, where they differ"
    )
    parser.add_argument(
        "--rows_at_once", type=int, help="trainings; default: one on CPUs, as many as find GPUs"
    )
    parser.add_argument(
        "--size", choices=("tiny", "paper"), default="tiny", help="recipes for two cores, or full"
    )
    parser.add_argument(
        "--sentence_transformer", type=Path, help="directory of a model for two rows of Table 1"
    )
    parser.add_argument("--sentence_transformer_lr", type=float, default=5e-5)
    run_job(work, __doc__, parser)
