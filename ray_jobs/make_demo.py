"""Draw the demo catalogue and its search log: products.parquet, impressions/, boxes.parquet."""

from acebert.config import Settings
from acebert.job import run_job


def work(settings: Settings) -> None:
    from acebert.pipeline import demo_stage

    print(demo_stage(settings).path)


if __name__ == "__main__":
    run_job(work, __doc__)
