"""Fine-tune a dual encoder (Ray Train); the last line printed is its model directory."""

from acebert.cluster import leave
from acebert.config import Settings
from acebert.job import run_job
from acebert.pipeline import finetune_stage


def work(settings: Settings) -> None:
    model = finetune_stage(settings)
    leave()
    print(model.path)


if __name__ == "__main__":
    run_job(work, __doc__)
