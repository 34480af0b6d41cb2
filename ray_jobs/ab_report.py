"""What a running experiment says so far: CTR and revenue by arm, lifts with intervals.

    python ray_jobs/ab_report.py --workdir W --experiment.name N --experiment.arms control,new

Reads the log under W/serving/events; settings are those that the service runs with.
"""

from acebert.config import Settings
from acebert.errors import UserError
from acebert.experiment.assignment import Experiment
from acebert.experiment.event_log import collect
from acebert.experiment.readout import read_out, write_report
from acebert.job import run_job
from acebert.pipeline import tracked
from acebert.workdir import run_stage


def work(settings: Settings) -> None:
    experiment = Experiment.of(settings.experiment)
    if experiment is None:
        raise UserError(
            "--experiment.name: which experiment to report; --experiment.arms: its arms"
        )
    events = settings.workdir / "serving" / "events"
    collect(events)
    files = sorted(path.name for path in events.glob("*/*/*.parquet"))
    dealt = settings.experiment.model_dump(include={"name", "arms", "shares", "design", "salt"})
    stage = run_stage(
        settings.workdir,
        "ab_report",
        {"version": 1, "files": files, **dealt},
        lambda out: write_report(read_out(experiment, events), out),
    )
    tracked(settings, stage, name=f"A/B {experiment.name}")
    print((stage.path / "report.txt").read_text())
    print(stage.path)


if __name__ == "__main__":
    run_job(work, __doc__)
