"""Rehearse an experiment: send shoppers of a click model through a running service.

    serve run serve.app:app workdir=W experiment.name=N experiment.arms=control,new
    python ray_jobs/ab_simulate.py --workdir W --experiment.name N --experiment.arms control,new

Settings are those that the service runs with, and those of its catalogue. On the demo catalogue
the shoppers are the demo's; on another one they ask the queries of its test day, and click by a
model fitted on that day's log. Never train on what they click. Another `--seed` sends others.
docs/experiments.md tells what is assumed.
"""

import argparse

from acebert.config import Settings
from acebert.errors import UserError
from acebert.job import run_job


def work(settings: Settings, arguments: argparse.Namespace) -> None:
    for name in ("users", "searches", "at_once"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be 1 or more")
    import asyncio
    import os

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
    wait = experiment.flush_seconds
    print(f"replicas move their logs every {wait:g} s (experiment.flush_seconds); then:")
    print(
        f"python ray_jobs/ab_report.py --workdir {settings.workdir} "
        f"--experiment.name {experiment.name or 'NAME'} "
        f"--experiment.arms {','.join(experiment.arms) or 'CONTROL,TREATMENT'}"
        + ("" if experiment.design == "split" else f" --experiment.design {experiment.design}")
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--searches", type=int, default=10_000, help="searches to send")
    parser.add_argument("--users", type=int, default=2_000, help="users who send them")
    parser.add_argument("--at_once", type=int, default=8, help="searches under way at a time")
    run_job(work, __doc__, parser)
