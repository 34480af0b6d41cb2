"""What daily refreshes leave behind in a work directory, and how it goes."""

import json
import logging
import shutil
from pathlib import Path

from acebert.data.earlier import stage_key
from acebert.workdir import STAGE_FILE

log = logging.getLogger(__name__)


def remove_old_days(workdir: Path, keep: int) -> list[Path]:
    """Delete the stages of refreshes, but for the `keep` newest catalogues with their logs and
    those that a published bundle is of. Stages that a training uses are none of a refresh.

    Returns:
        what is gone, as paths.
    """
    for left in workdir.glob("*/.*.removed"):  # by a process that died here
        shutil.rmtree(left, ignore_errors=True)
    days = [path.parent for path in (workdir / "ingest").glob(f"[!.]*/{STAGE_FILE}")]
    days = [day for day in days if stage_key(day).get("held_out") == "nothing"]
    days.sort(key=lambda day: (day / STAGE_FILE).stat().st_mtime, reverse=True)
    served = {stage_key(bundle)["ingest"] for bundle in _published(workdir)}
    old = [day for day in days[keep:] if day.name not in served]
    names = {day.name for day in old}
    gone = [
        path.parent
        for path in workdir.glob(f"*/[!.]*/{STAGE_FILE}")
        if stage_key(path.parent).get("ingest") in names
    ]
    gone += old
    for path in gone:
        aside = path.with_name(f".{path.name}.removed")  # whole, or not there
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    if gone:
        log.info("refresh: removed %d stages of %d days gone by", len(gone), len(old))
    return gone


def _published(workdir: Path) -> list[Path]:
    """Bundles that services of this work directory are to serve, to all or to an arm."""
    pointers = (workdir / "serving").glob("*.json")
    bundles = [Path(json.loads(pointer.read_text())["bundle"]) for pointer in pointers]
    return [bundle for bundle in bundles if (bundle / STAGE_FILE).is_file()]
