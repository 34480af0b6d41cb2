"""What a running experiment says so far: CTR and revenue by arm, lifts with intervals.

    python ray_jobs/ab_report.py --workdir W --experiment.name N --experiment.arms control,new

Reads the log under W/serving/events, or `--logs DIR`, a copy of one; settings are those that the
service runs with. `--from` and `--until` (UTC days) choose the searches that count, and `--lift`
the lift in CTR whose searches are told. Days of the service's log that are too old are deleted.
docs/experiments.md describes the log and what is computed from it.
"""

import argparse
from datetime import date
from pathlib import Path

from acebert.config import load_settings
from acebert.errors import UserError
from acebert.job import run_job
from acebert.workdir import digest_of, run_stage


def work(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.settings)
    from acebert.experiment.assignment import Experiment
    from acebert.experiment.event_log import (
        collect,
        compact,
        events_directory,
        unchanging,
    )
    from acebert.experiment.readout import read_out, write_report
    from acebert.pipeline import tracked

    experiment = Experiment.of(settings.experiment)
    if experiment is None:
        raise UserError(
            "--experiment.name: which experiment to report; --experiment.arms: its arms"
        )
    if not arguments.lift > -1 or arguments.lift == 0:
        raise UserError(f"--lift {arguments.lift:g}: a relative lift above -1, and not 0")
    events = arguments.logs or events_directory(settings.workdir)
    collect(events)
    if arguments.logs is None:
        compact(events)
    asked = {"first": arguments.first, "last": arguments.last, "looked_for": arguments.lift}

    def build(out: Path) -> None:
        limit = settings.data.memory_limit
        write_report(read_out(experiment, events, limit, scratch=out, **asked), out)

    with unchanging(events):
        files = {
            str(path.relative_to(events)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(events.glob("*/*/*.parquet"))
        }
        dealt = settings.experiment.model_dump(include={"name", "arms", "shares", "design", "salt"})
        key = {"version": 3, "files": digest_of(files), **dealt, **asked}
        stage = run_stage(settings.workdir, "ab_report", key, build)
    tracked(settings, stage, name=f"A/B {experiment.name}")
    print((stage.path / "report.txt").read_text())
    print(stage.path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--logs", type=Path, help="directory of a log (none: the service's)")
    day = date.fromisoformat
    parser.add_argument("--from", dest="first", type=day, default=date.min, help="first UTC day")
    parser.add_argument("--until", dest="last", type=day, default=date.max, help="last UTC day")
    parser.add_argument(
        "--lift", type=float, default=0.05, help="lift in CTR to be seen (default: 0.05)"
    )
    run_job(work, __doc__, parser)
