"""Train the patch CNN on the catalogue (Ray Train); the last line printed is its weights file."""

from acebert.config import Settings
from acebert.job import run_job


def work(settings: Settings) -> None:
    from acebert.cluster import connect_and_load, leave

    connect_and_load()
    from acebert.pipeline import cnn_stage
    from acebert.training.train_cnn import WEIGHTS

    cnn = cnn_stage(settings)
    leave()
    print(cnn.path / WEIGHTS)


if __name__ == "__main__":
    run_job(work, __doc__)
