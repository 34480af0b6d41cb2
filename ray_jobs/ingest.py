"""Read products and impressions: check, count, quarantine, split by time, list hot queries."""

from acebert.config import Settings
from acebert.job import run_job
from acebert.pipeline import ingest_stage


def work(settings: Settings) -> None:
    print(ingest_stage(settings).path)


if __name__ == "__main__":
    run_job(work, __doc__)
