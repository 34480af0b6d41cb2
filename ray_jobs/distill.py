"""Distil small query encoders from a trained model (Ray Train), and export them and it to ONNX.

    python ray_jobs/distill.py --workdir W --model MODEL_DIR

prints a table of layers × runtime, then the directories: the table's, the teacher's, the students'.
"""

import argparse

from acebert.job import model_arguments, run_job
from acebert.model_settings import settings_for


def work(arguments: argparse.Namespace) -> None:
    settings = settings_for(arguments.model, arguments.settings, also=("distill",))
    from acebert.cluster import leave
    from acebert.pipeline import distill_stages

    exports, table = distill_stages(settings, arguments.model)
    leave()
    print((table.path / "table.txt").read_text())
    for stage in (table, *exports):
        print(stage.path)


if __name__ == "__main__":
    run_job(work, __doc__, model_arguments())
