"""Plan every epoch's mini-batches: the mixed negative sampling of paper section 4.3 (Ray Data)."""

from acebert.config import Settings
from acebert.job import run_job


def work(settings: Settings) -> None:
    from acebert.pipeline import plan_stage

    print(plan_stage(settings).path)


if __name__ == "__main__":
    run_job(work, __doc__)
