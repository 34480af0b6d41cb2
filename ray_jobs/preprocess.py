"""Tokens of titles and queries; RoI, patch features and pixels of photos (Ray Data)."""

from acebert.config import Settings
from acebert.job import run_job


def work(settings: Settings) -> None:
    from acebert.pipeline import catalogue_stages

    data = catalogue_stages(settings)
    print(data.tokens.path)
    if data.features:
        print(data.features.path)


if __name__ == "__main__":
    run_job(work, __doc__)
