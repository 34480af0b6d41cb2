"""The report as its user runs it: no Ray, a copy of a log, MLflow in the work directory."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from mlflow.tracking import MlflowClient

from acebert.experiment.event_log import Action, EventLog, Exposure

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def test_the_report_is_a_table_a_picture_and_a_run(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    log = EventLog(logs)
    for user in range(40):
        arm = ("old", "new")[user % 2]
        log.append([Exposure(f"s{user}", NOW, "test", arm, f"u{user}", "q", ["p1", "p2"])])
        if user % 5 == 0 or (arm == "new" and user % 3):  # old: 4 of 40 shown; new: 14 of 40
            log.append([Action(f"s{user}", NOW, "click", "p1")])
    log.close()

    done = subprocess.run(
        [
            *[sys.executable, "ray_jobs/ab_report.py", "--workdir", str(tmp_path)],
            *["--logs", str(logs), "--experiment.name", "test", "--experiment.arms", "old,new"],
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
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
