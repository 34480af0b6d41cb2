"""Rehearse an experiment: send shoppers of a click model through a running service.

    serve run serve.app:app workdir=W experiment.name=N experiment.arms=control,new
    python ray_jobs/ab_simulate.py --workdir W --experiment.name N --experiment.arms control,new

Settings are those that the service runs with, and those of its catalogue. On the demo catalogue
the shoppers are the demo's; on another one they ask the queries of its test day, and click by a
model fitted on that day's log. Never train on what they click. Another `--seed` sends others.
docs/experiments.md tells what is assumed.
"""

import argparse
import asyncio
import os
import shlex

from acebert.config import load_settings
from acebert.errors import UserError
from acebert.job import run_job


def work(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.settings)
    for name in ("users", "searches", "at_once"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be 1 or more")
    from acebert.experiment.shoppers import demo_searches, log_searches
    from acebert.experiment.simulate import send, sent_text
    from acebert.pipeline import ingest_stage

    users, n = arguments.users, arguments.searches
    if settings.data.products is None:
        shown, searches = demo_searches(settings.demo, users, n, settings.seed)
    else:
        ingested = ingest_stage(settings)
        shown, searches = log_searches(settings.workdir, ingested, users, n, settings.seed)
    key = os.environ.get("ACEBERT_API_KEY")
    url = arguments.url.rstrip("/")
    sent = asyncio.run(send(url, searches, shown, arguments.at_once, settings.seed, key))
    experiment = settings.experiment
    print(sent_text(sent, experiment.arms))
    dealt = experiment.model_dump(
        include={"name", "arms", "shares", "design", "salt"}, exclude_defaults=True
    )
    command = ["python", "ray_jobs/ab_report.py", "--workdir", str(settings.workdir)]
    for leaf, value in (dealt or {"name": "NAME", "arms": ("CONTROL", "TREATMENT")}).items():
        given = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        command += [f"--experiment.{leaf}", given]
    print(f"in {experiment.flush_seconds:g} s, when replicas have moved their logs to Parquet:")
    print(shlex.join(command))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--searches", type=int, default=10_000, help="searches to send")
    parser.add_argument("--users", type=int, default=2_000, help="users who send them")
    parser.add_argument("--at_once", type=int, default=8, help="searches under way at a time")
    run_job(work, __doc__, parser)
