"""Stages: directories named by a digest of what went in, built once, whole or not at all.

    stage = run_stage(workdir, "ingest", key={...}, build=lambda out: ...)

* `key` holds everything that changes the result: digests of the inputs, the settings that matter,
  the stage's own `version`, raised by its author when its code changes what it writes.
* The directory is `<workdir>/<name>/<digest>`. It is there, then it is whole: `build` writes to a
  directory beside it, which is renamed when `build` returns.
* Two processes that want the same stage at once: the second waits on a file lock, then reuses.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from acebert.errors import UserError

log = logging.getLogger(__name__)

STAGE_FILE = "stage.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Stage:
    """A finished stage: its directory, its digest and what building it took."""

    name: str
    path: Path
    digest: str
    seconds: float
    """Wall-clock seconds that building it took (not this call, where it was reused)."""
    reused: bool


def digest_of(key: Any) -> str:
    """First 16 hex digits of the SHA-256 of `key` as canonical JSON (paths as strings)."""
    text = json.dumps(key, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each file below a directory, by its name from there."""
    found = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            name = path.relative_to(directory).as_posix()
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


_using: list[dict[Path, Stage]] = []
_said: set[Path] = set()
"""Stages that the log has named: a sweep asks for the same ones again for each trial."""


@contextmanager
def stages_used() -> Iterator[dict[Path, Stage]]:
    """All stages that this process asks for in the block, built or reused, by directory."""
    used: dict[Path, Stage] = {}
    _using.append(used)
    try:
        yield used
    finally:
        _using.pop()


def run_stage(
    workdir: Path,
    name: str,
    key: dict[str, Any],
    build: Callable[[Path], None],
) -> Stage:
    """Return the stage with this key, building it first if it is not there.

    `build(out)` writes its files under `out`, an empty directory that exists. When it raises,
    nothing is left that could be taken for a result.

    Raises:
        UserError: the work directory cannot be written, or the disk is full.
    """
    stage = _stage(workdir, name, key, build)
    if stage.reused and stage.path not in _said:
        log.info("%s: reused %s", name, stage.path)
    _said.add(stage.path)
    for used in _using:
        used[stage.path] = stage
    return stage


def _stage(workdir: Path, name: str, key: dict[str, Any], build: Callable[[Path], None]) -> Stage:
    digest = digest_of(key)
    final = workdir / name / digest
    if (final / STAGE_FILE).exists():
        return _reused(name, final, digest)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_file(workdir, name, digest))
        _acquire(lock, name)
    except OSError as error:
        raise UserError(f"workdir {workdir}: cannot be written ({error.strerror})") from error
    try:
        if (final / STAGE_FILE).exists():
            return _reused(name, final, digest)
        return _build(name, final, digest, key, build)
    finally:
        lock.release()


def lock_file(workdir: Path, name: str, digest: str) -> Path:
    """Of a stage, beside it: who holds its lock builds it, or notes it in MLflow."""
    return workdir / name / f".{digest}.lock"


def is_being_built(workdir: Path, name: str, digest: str) -> bool:
    """Whether a process builds this stage now."""
    try:
        with FileLock(lock_file(workdir, name, digest), timeout=0):
            return False
    except Timeout:
        return True


def remove_unfinished(workdir: Path) -> None:
    """Delete what processes left that died while they built a stage, or removed one."""
    for left in [*workdir.glob("*/.*.partial"), *workdir.glob("*/.*.removed")]:
        digest = left.name.split(".")[1]
        with suppress(Timeout), FileLock(lock_file(workdir, left.parent.name, digest), timeout=0):
            shutil.rmtree(left, ignore_errors=True)


def _acquire(lock: FileLock, name: str) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process is building it, waiting", name)
        lock.acquire()


def _reused(name: str, final: Path, digest: str) -> Stage:
    record = json.loads((final / STAGE_FILE).read_text())
    return Stage(name, final, digest, seconds=record["seconds"], reused=True)


def _build(
    name: str, final: Path, digest: str, key: dict[str, Any], build: Callable[[Path], None]
) -> Stage:
    aside = final.parent / f".{digest}.partial"
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that died while building
    aside.mkdir()
    log.info("%s: building %s", name, final)
    start = time.perf_counter()
    try:
        build(aside)
        seconds = time.perf_counter() - start
        record = {"name": name, "digest": digest, "seconds": round(seconds, 3), "key": key}
        (aside / STAGE_FILE).write_text(json.dumps(record, indent=2, default=str) + "\n")
        for path in [*aside.rglob("*"), aside]:  # a power failure must not leave its name alone
            sync(path)
        os.replace(aside, final)
        sync(final.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if is_disk_full(error):
            raise UserError(
                f"{name}: the disk under {final.parent} is full, or your quota of it; nothing "
                "was kept of this stage. Free some space or choose another --workdir"
            ) from error
        raise
    log.info("%s: done in %.1f s", name, seconds)
    return Stage(name, final, digest, seconds=seconds, reused=False)


def sync(path: Path) -> None:
    """Return when a file or directory is on the disk."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is ENOSPC or a quota's EDQUOT (pyarrow and Ray wrap
    them as text)."""
    seen: BaseException | None = error
    while seen is not None:
        told = str(seen)
        if any(getattr(seen, "errno", None) == n or os.strerror(n) in told for n in DISK_FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
