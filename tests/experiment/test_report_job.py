"""The report as its user runs it: no Ray, a copy of a log, MLflow in the work directory."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mlflow.tracking import MlflowClient

from acebert.experiment.event_log import Action, EventLog, Exposure, events_directory

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def report(workdir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "ray_jobs/ab_report.py", "--workdir", str(workdir), *more]
    argv += ["--experiment.name", "test", "--experiment.arms", "old,new"]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def exposure(name: str, at: datetime, arm: str, user: str, products: list[str]) -> Exposure:
    return Exposure(name, at, "test", arm, user, "q", products, "d", "split", {arm: "model"})


def test_the_report_is_a_table_a_picture_and_a_run(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    log = EventLog(logs)
    for user in range(40):
        arm = ("old", "new")[user % 2]
        log.append([exposure(f"s{user}", NOW, arm, f"u{user}", ["p1", "p2"])])
        if user % 5 == 0 or (arm == "new" and user % 3):  # old: 4 of 40 shown; new: 14 of 40
            log.append([Action(f"s{user}", NOW, "click", "p1")])
    log.flush()

    done = report(tmp_path, "--logs", str(logs))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("10.00%" in line for line in lines)
    assert any("35.00%" in line and "+250.00%" in line for line in lines)
    (picture,) = Path(lines[-1]).glob("*.png")
    assert picture.stat().st_size > 5000
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "acebert")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["arms/new/values/ctr"] == 0.35
    assert run.data.metrics["arms/old/users"] == 20
    assert "searches of 2026-03-01 to 2026-03-01" in done.stdout


def test_the_report_is_of_the_days_that_are_asked_for_and_deletes_none(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    log = EventLog(events_directory(tmp_path))
    for days in (1, 2, 3, 100):
        at = now - timedelta(days=days)
        log.append([exposure(f"{days}-{i}", at, "old", "u", ["p"]) for i in "ab"])
    log.flush()
    first, last = (f"{now - timedelta(days=days):%Y-%m-%d}" for days in (3, 2))
    done = report(tmp_path, "--from", first, "--until", last, "--lift", "0.01")
    assert done.returncode == 0, done.stderr
    assert f"searches of {first} to {last}" in done.stdout
    assert "see +1.0% CTR" in done.stdout
    told = json.loads((Path(done.stdout.splitlines()[-1]) / "report.json").read_text())
    assert told["arms"]["old"]["searches"] == 4
    assert len(list((events_directory(tmp_path) / "exposure").iterdir())) == 4
    refused = report(tmp_path, "--lift", "-1")
    assert refused.returncode == 2
    assert "--lift" in refused.stderr
