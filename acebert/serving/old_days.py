"""What daily refreshes leave behind in a work directory, and how it goes."""

import logging
import shutil
from pathlib import Path

from acebert.data.earlier import stage_key
from acebert.errors import UserError
from acebert.serving.bundle import all_published
from acebert.serving.leases import held
from acebert.workdir import STAGE_FILE, remove_unfinished

log = logging.getLogger(__name__)


def remove_old_days(workdir: Path, keep: int, pinned: Path | None = None) -> list[Path]:
    """Delete the stages of refreshes, but for the `keep` newest catalogues with their logs and
    those that a bundle is of which is published, held by a replica or `pinned`; and what processes
    left that died half-way. Stages that a
    training uses are none of a refresh. Where it cannot be told what is published nothing goes.

    Returns:
        what is gone, as paths.
    """
    try:
        bundles = {*all_published(workdir), *held(workdir)}
    except UserError as error:
        log.warning("refresh: no old day is removed: %s", error)
        return []
    if pinned is not None:
        bundles.add(pinned)
    remove_unfinished(workdir)
    days = [path.parent for path in (workdir / "ingest").glob(f"[!.]*/{STAGE_FILE}")]
    days = [day for day in days if stage_key(day).get("held_out") == "nothing"]
    days.sort(key=lambda day: (day / STAGE_FILE).stat().st_mtime, reverse=True)
    there = [bundle for bundle in bundles if (bundle / STAGE_FILE).is_file()]
    served = {stage_key(bundle)["ingest"] for bundle in there}
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
