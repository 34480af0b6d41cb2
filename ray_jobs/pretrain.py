"""Pre-train CE-BERT on the catalogue (Ray Train); prints its directory and a page to look at."""

from acebert.cluster import leave
from acebert.config import Settings
from acebert.job import run_job
from acebert.pipeline import look_inside_stage, pretrain_stage


def work(settings: Settings) -> None:
    pretrained = pretrain_stage(settings)
    if settings.reads_images:
        print(look_inside_stage(settings, pretrained).path)
    leave()
    print(pretrained.path)


if __name__ == "__main__":
    run_job(work, __doc__)
