"""Distil small query encoders from a trained model (Ray Train), and export them and it to ONNX.

    python ray_jobs/distill.py --workdir W --model MODEL_DIR

prints a table of layers × runtime, then the directories: the table's, the teacher's, the students'.
"""

import argparse
from pathlib import Path

from acebert.config import Settings
from acebert.job import run_job


def work(_: Settings, arguments: argparse.Namespace) -> None:
    from acebert.cluster import leave
    from acebert.pipeline import OF_DISTILLATION, distill_stages, settings_for

    settings = settings_for(arguments.model, arguments.settings, also=OF_DISTILLATION)
    exports, table = distill_stages(settings, arguments.model)
    leave()
    print((table.path / "table.txt").read_text())
    for stage in (table, *exports):
        print(stage.path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", type=Path, required=True, help="directory that finetune printed")
    run_job(work, __doc__, parser)
