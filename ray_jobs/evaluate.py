"""Measure a model directory on the test day: GAUC, Recall@K, breakdown, TREC files."""

import argparse

from acebert.job import model_arguments, run_job
from acebert.model_settings import settings_for


def work(arguments: argparse.Namespace) -> None:
    settings = settings_for(arguments.model, arguments.settings)
    from acebert.evaluation.evaluate import BASELINES
    from acebert.evaluation.tables import Row, rows_table
    from acebert.pipeline import baselines_stage, evaluate_stage

    _embedded, evaluated = evaluate_stage(settings, arguments.model)
    baselines = baselines_stage(settings).path
    untrained = [Row.of(baselines / name) for name in BASELINES]
    row = Row.of(evaluated.path)
    print(rows_table([*untrained, row, row.with_clicks]))
    print(evaluated.path)


if __name__ == "__main__":
    run_job(work, __doc__, model_arguments())
