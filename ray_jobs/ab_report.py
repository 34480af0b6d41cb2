"""What a running experiment says so far: CTR and revenue by arm, lifts with intervals.

    python ray_jobs/ab_report.py --workdir W --experiment.name N --experiment.arms control,new

Reads the log under W/serving/events, or `--logs DIR`, a copy of one; settings are those that the
service runs with. docs/experiments.md describes the log and what is computed from it.
"""

import argparse
from pathlib import Path

from acebert.config import load_settings
from acebert.errors import UserError
from acebert.job import run_job
from acebert.workdir import digest_of, run_stage


def work(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.settings)
    from acebert.experiment.assignment import Experiment
    from acebert.experiment.event_log import collect, compact
    from acebert.experiment.readout import read_out, write_report
    from acebert.pipeline import tracked

    experiment = Experiment.of(settings.experiment)
    if experiment is None:
        raise UserError(
            "--experiment.name: which experiment to report; --experiment.arms: its arms"
        )
    events = arguments.logs or settings.workdir / "serving" / "events"
    collect(events)
    if arguments.logs is None:
        compact(events)
    files = {
        str(path.relative_to(events)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(events.glob("*/*/*.parquet"))
    }
    dealt = settings.experiment.model_dump(include={"name", "arms", "shares", "design", "salt"})
    stage = run_stage(
        settings.workdir,
        "ab_report",
        {"version": 1, "files": digest_of(files), **dealt},
        lambda out: write_report(read_out(experiment, events, settings.data.memory_limit), out),
    )
    tracked(settings, stage, name=f"A/B {experiment.name}")
    print((stage.path / "report.txt").read_text())
    print(stage.path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--logs", type=Path, help="directory of a log (none: the service's)")
    run_job(work, __doc__, parser)
