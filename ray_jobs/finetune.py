"""Fine-tune a dual encoder (Ray Train); the last line printed is its model directory."""

from acebert.config import Settings
from acebert.job import run_job


def work(settings: Settings) -> None:
    from acebert.cluster import connect_and_load, leave

    connect_and_load()
    from acebert.pipeline import finetune_stage

    model = finetune_stage(settings)
    leave()
    print(model.path)


if __name__ == "__main__":
    run_job(work, __doc__)
