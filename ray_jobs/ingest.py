"""Read products and impressions: check, count, quarantine, split by time, list hot queries."""

from acebert.config import Settings
from acebert.job import run_job


def work(settings: Settings) -> None:
    from acebert.pipeline import ingest_stage

    print(ingest_stage(settings).path)


if __name__ == "__main__":
    run_job(work, __doc__)
