"""What every training leaves beside its weights."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from acebert.config import Settings
from acebert.machine import machine
from acebert.training.checkpoint import Progress

if TYPE_CHECKING:
    from acebert.tracking import Run

RECORD = ("settings.yaml", "report.json", "history.parquet", "valid.parquet")


def write_record(
    out: Path, settings: Settings, progress: Progress, mlrun: "Run", report: dict[str, Any]
) -> None:
    """The files of RECORD, in `out` and among the run's artifacts: settings; `report` with steps,
    seconds, the run's id, machine and code; a row a step; a row a validation."""
    from acebert.tracking import code_digest  # MLflow, which workers do not need

    pq.write_table(progress.history, out / "history.parquet")
    pq.write_table(pa.Table.from_pylist(progress.validations), out / "valid.parquet")
    tree = settings.model_dump(mode="json", exclude={"tracking"})  # a run's, not the model's
    (out / "settings.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    about = {
        **{"steps": progress.step, "train_seconds": progress.seconds, "mlflow_run": mlrun.run_id},
        **{"machine": machine(), "code": code_digest()},
    }
    (out / "report.json").write_text(json.dumps(about | report, indent=2) + "\n")
    for name in RECORD:
        mlrun.log_artifact(out / name)
