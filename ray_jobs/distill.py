"""Distil small query encoders from a trained model (Ray Train).

    python ray_jobs/distill.py --workdir W --model MODEL_DIR
"""

import argparse
from pathlib import Path

from acebert.cluster import leave
from acebert.config import Settings
from acebert.job import run_job
from acebert.pipeline import distill_stages


def work(settings: Settings, arguments: argparse.Namespace) -> None:
    _, students = distill_stages(settings, arguments.model)
    leave()
    for student in students:
        print(student.path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", type=Path, required=True, help="directory that finetune printed")
    run_job(work, __doc__, parser)
