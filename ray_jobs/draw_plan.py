"""Draw the mini-batches' categories as the paper's Fig. 4 does, and the hard share against P."""

from acebert.config import Settings
from acebert.job import run_job


def work(settings: Settings) -> None:
    from acebert.data.plan_figure import read_points, table_text
    from acebert.pipeline import plan_figure_stage

    drawn = plan_figure_stage(settings)
    print(table_text(read_points(drawn)))
    print(drawn.path / "plan.png")


if __name__ == "__main__":
    run_job(work, __doc__)
