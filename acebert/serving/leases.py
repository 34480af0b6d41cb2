"""Which bundles replicas hold: what is mapped from disk must not be deleted under them.

    WORKDIR/serving/in_use/<replica>.json     the bundles of one replica, written again and again

Pointers of `publish` do not tell it: a replica may be told by its settings what to serve, or go on
with what it has. A replica that was killed leaves its file, which counts until it has expired.
"""

import json
import logging
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

EVERY_SECONDS = 600.0
EXPIRES_SECONDS = 24 * 3600.0
"""long: a replica that hangs, or whose disk is full, may come back"""


class Lease:
    """One replica's file."""

    def __init__(self, workdir: Path) -> None:
        self._path = _directory(workdir) / f"{uuid.uuid4().hex}.json"

    def hold(self, bundles: Iterable[Path]) -> None:
        """Say that these are in use, and no others any more. Where it cannot be written, what was
        said before stands: a full disk keeps nobody from serving."""
        aside = self._path.with_suffix(".partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(sorted(map(str, bundles))) + "\n")
            aside.replace(self._path)
        except OSError as error:
            log.warning("%s: cannot say which bundles are in use: %s", self._path, error)

    def end(self) -> None:
        self._path.unlink(missing_ok=True)


def held(workdir: Path) -> set[Path]:
    """Bundles that replicas hold. Files that have expired are deleted."""
    found = set()
    for path in _directory(workdir).iterdir() if _directory(workdir).is_dir() else ():
        try:
            if path.stat().st_mtime < time.time() - EXPIRES_SECONDS:
                path.unlink(missing_ok=True)
            elif path.suffix == ".json":
                found |= set(map(Path, json.loads(path.read_text())))
        except (FileNotFoundError, ValueError):
            pass  # its replica stopped, or a power failure stopped all
    return found


def _directory(workdir: Path) -> Path:
    return workdir / "serving" / "in_use"
