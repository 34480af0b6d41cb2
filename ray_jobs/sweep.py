"""Train a recipe many times with some settings varied (Ray Tune); the best come out as a recipe.

    python ray_jobs/sweep.py --space tune_spaces/fig5_partitions.yaml [--evaluate] [settings]

A space file names what is varied and how: see tune_spaces/ and docs/guide.md. Trials are chosen by
the validation day; --evaluate measures all of them on the test day afterwards. The same command
given again goes on where a sweep was stopped. The last line printed is its directory; where a trial
failed, the others are finished first and the job ends with an error.
"""

import argparse
from pathlib import Path

from acebert.config import load_settings
from acebert.job import run_job


def work(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.settings)
    from acebert.cluster import connect_and_load, leave
    from acebert.sweep.space import check_space, read_space

    path = arguments.space
    space = read_space(path)
    check_space(space, settings)  # before Ray and torch, which take ten seconds
    connect_and_load()
    from acebert.sweep.results import refuse_failures
    from acebert.sweep.run import sweep

    directory = sweep(settings, path.stem, space, evaluate=arguments.evaluate)
    leave()
    print(directory)
    refuse_failures(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--space", type=Path, required=True, help="YAML file under tune_spaces/")
    parser.add_argument("--evaluate", action="store_true", help="measure trials on the test day")
    run_job(work, __doc__, parser)
