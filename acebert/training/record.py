"""What every training leaves beside its weights."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from acebert.config import Settings
from acebert.training.checkpoint import Progress

RECORD = ("settings.yaml", "report.json", "history.parquet", "valid.parquet")


def write_record(out: Path, settings: Settings, progress: Progress, report: dict[str, Any]) -> None:
    """The files of RECORD: settings; `report` with steps and seconds; a row a step; a row a
    validation."""
    pq.write_table(progress.history, out / "history.parquet")
    pq.write_table(pa.Table.from_pylist(progress.validations), out / "valid.parquet")
    tree = settings.model_dump(mode="json")
    (out / "settings.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    report = {"steps": progress.step, "train_seconds": progress.seconds, **report}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
