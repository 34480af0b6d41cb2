"""A comparison as its user runs it, and a model measured again, on a small demo."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from acebert.config import load_settings
from acebert.evaluation.evaluate import BASELINES
from acebert.tracking import client

ROOT = Path(__file__).parents[2]
SMALL = [
    *["--demo.products", "80", "--demo.searches_per_day", "200", "--demo.days", "4"],
    *["--model.width", "32", "--model.heads", "2", "--model.layers", "1", "--eval.bootstrap", "50"],
    *["--text.vocab_size", "300", "--train.batch_size", "32", "--train.max_steps", "4"],
    *["--train.valid_products", "50", "--train.threads_per_worker", "1"],
]


def job(script: str, *argv: str) -> list[str]:
    """Lines that a job prints."""
    done = subprocess.run(
        [sys.executable, f"ray_jobs/{script}", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_comparison_ends_with_a_table_pictures_and_commands_and_is_a_table_in_mlflow(
    tmp_path: Path,
) -> None:
    workdir = tmp_path / "w"
    lines = job("compare.py", "--recipes", "twinbert_tiny", "--workdir", str(workdir), *SMALL)
    table = {words[1] for line in lines if len(words := line.split()) > 2 and words[0] == "│"}
    assert {*BASELINES, "twinbert_tiny"} <= table
    for name in ("compare.png", "curves.png"):
        assert (workdir / name).stat().st_size > 10_000
    next_commands = lines[lines.index("Next, try:") + 1 :]
    assert len(next_commands) == 3
    assert all(SMALL[0] in command for command in next_commands[1:])

    settings = load_settings(["--workdir", str(workdir)])
    mlflow = client(settings)
    experiment = mlflow.get_experiment_by_name(settings.tracking.experiment).experiment_id
    rows = mlflow.search_runs([experiment], "tags.table = 'compare'")
    scored = {run.info.run_name: run.data.metrics["overall/gauc"] for run in rows}
    (ours,) = scored.keys() - set(BASELINES)
    assert ours.startswith("evaluate twinbert_tiny, seed 0, ")

    (model,) = (workdir / "finetune").glob("[!.]*")
    measured = job("evaluate.py", "--workdir", str(workdir), "--model", str(model), *SMALL[-8:])
    metrics = json.loads((Path(measured[-1]) / "metrics.json").read_text())
    assert metrics["overall"]["gauc"] == pytest.approx(scored[ours])
    assert pq.read_metadata(model / "history.parquet").num_rows == 4
