"""Measure a model directory on the test day: GAUC, Recall@K, breakdown, TREC files."""

import argparse
from pathlib import Path

from acebert.config import Settings
from acebert.job import run_job


def work(_: Settings, arguments: argparse.Namespace) -> None:
    from acebert.evaluation.evaluate import BASELINES
    from acebert.evaluation.tables import Row, rows_table
    from acebert.pipeline import baselines_stage, evaluate_stage, settings_for

    settings = settings_for(arguments.model, arguments.settings)
    _embedded, evaluated = evaluate_stage(settings, arguments.model)
    baselines = baselines_stage(settings).path
    untrained = [Row.of(baselines / name) for name in BASELINES]
    print(rows_table([*untrained, Row.of(evaluated.path)]))
    print(evaluated.path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", type=Path, required=True, help="directory that finetune printed")
    run_job(work, __doc__, parser)
