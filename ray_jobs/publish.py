"""Make a bundle of a model (vectors of products and hot queries, index, photos) and publish it.

    python ray_jobs/publish.py --workdir W --model MODEL_DIR [--query_encoder DIR] [--arm NAME]

Services of this work directory take it over while they serve; with `--arm`, for the users of that
arm of an experiment alone. `--model` also takes the address of
a registered model, e.g. models:/acebert@candidate.
"""

import argparse

from acebert.job import bundle_arguments, run_job
from acebert.model_settings import settings_for, without_the_models


def work(arguments: argparse.Namespace) -> None:
    from acebert.tracking import model_directory

    directory = model_directory(without_the_models(arguments.settings), arguments.model)
    settings = settings_for(directory, arguments.settings)
    from acebert.cluster import leave
    from acebert.pipeline import bundle_stage
    from acebert.serving.bundle import publish

    stage = bundle_stage(settings, directory, arguments.query_encoder or directory)
    publish(settings.workdir, stage.path, arguments.arm)
    leave()
    print(stage.path)


if __name__ == "__main__":
    run_job(work, __doc__, bundle_arguments())
