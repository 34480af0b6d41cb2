"""Pre-train CE-BERT on the catalogue (Ray Train); prints its directory and a page to look at."""

from acebert.config import Settings
from acebert.job import run_job


def work(settings: Settings) -> None:
    from acebert.cluster import connect_and_load, leave

    connect_and_load()
    from acebert.pipeline import look_inside_stage, pretrain_stage

    pretrained = pretrain_stage(settings)
    if settings.reads_images:
        print(look_inside_stage(settings, pretrained).path)
    leave()
    print(pretrained.path)


if __name__ == "__main__":
    run_job(work, __doc__)
