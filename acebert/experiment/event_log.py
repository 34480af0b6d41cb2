"""The log of an experiment: searches that were answered, and what became of them.

    EVENTS/hot/<replica>.sqlite          a replica's newest events, durable when `append` returns
    EVENTS/exposure/<day>/<id>.parquet   whole files only: written aside, then renamed
    EVENTS/action/<day>/<id>.parquet

A replica appends to a SQLite file of its own (WAL, so what was written outlives kill -9; the last
transactions before a power failure may be lost) and moves what is there to Parquet now and then.
Its file is locked for as long as it lives: whoever finds one unlocked knows that its replica is
dead, and moves what it left. A kill between the rename and the deletion leaves events twice, with
one id: readers drop the second. Days are UTC days; whole days are deleted when they are too old.
Files are deleted and put together by one process at a time, the one that holds the log's lock; who
reads many of them holds it too.
"""

import hmac
import json
import logging
import os
import secrets
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

ROWS = 100_000  # of a row group
MOVED = 10_000  # events moved to Parquet at a time: bounds the memory, and how long appends wait
STALE_SECONDS = 3600  # without a byte more, after which a half-written file is nobody's
DAY_SECONDS = 24 * 3600
TIME = pa.timestamp("ms", tz="UTC")
SCHEMAS = {
    "exposure": pa.schema(
        {
            "search_id": pa.string(),
            "at": TIME,
            "experiment": pa.string(),
            "arm": pa.string(),
            "user": pa.string(),
            "query": pa.string(),
            "products": pa.list_(pa.string()),
            "teams": pa.list_(pa.string()),
            "dealing": pa.string(),
            "design": pa.string(),
            "versions": pa.map_(pa.string(), pa.string()),
        }
    ),
    "action": pa.schema(
        {
            "search_id": pa.string(),
            "at": TIME,
            "action": pa.string(),
            "product_id": pa.string(),
            "revenue": pa.float64(),
        }
    ),
}


Shown = Literal["split", "interleave", "compare"]
"""one arm's list, a draft of two, or two lists side by side"""


@dataclass(frozen=True)
class Exposure:
    """A search that was answered."""

    search_id: str
    at: datetime
    experiment: str
    arm: str | None
    """that answered; None: interleaved, or two arms side by side"""
    user: str
    """salted hash, see `user_key`; a reviewer's likewise"""
    query: str
    products: list[str]
    """as shown, best first"""
    dealing: str
    """how users were dealt to arms, see `Experiment.dealing`"""
    design: Shown
    versions: dict[str, str]
    """arm that answered → version of its model"""
    teams: Sequence[str | None] | None = None
    """interleaved, or two lists side by side (the left one first): the arm that a click on each
    product counts for; None: for no arm"""


@dataclass(frozen=True)
class Action:
    """What a shopper did with a product of an answer, or which list of two a reviewer found better.
    The same again counts once."""

    search_id: str
    at: datetime
    action: str
    """click, purchase or vote"""
    product_id: str
    """of a vote: the arm that won, or '' where neither did"""
    revenue: float | None = None
    """of a purchase, in the shop's currency"""


Event = Exposure | Action
Row = tuple[int, str, str]
"""seq, kind, event as JSON"""


def events_directory(workdir: Path) -> Path:
    """Where the services of a work directory log."""
    return workdir / "serving" / "events"


class EventLog:
    """One replica's part of the log; safe for several threads."""

    def __init__(self, directory: Path) -> None:
        (directory / "hot").mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._path = directory / "hot" / f"{uuid.uuid4().hex}.sqlite"
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        try:
            self._db = _open(self._path, "rwc", wait=5)  # a collector may look at it
            self._db.execute("CREATE TABLE event (seq INTEGER PRIMARY KEY, kind TEXT, body TEXT)")
            self._db.commit()
        except sqlite3.Error:  # a full disk: whoever tries again has a file of another name
            _unlink(self._path)
            raise

    def append(self, events: Sequence[Event]) -> list[None]:
        """Durable when it returns; a None for each event."""
        rows = [(_kind(event), json.dumps(vars(event), default=_milliseconds)) for event in events]
        with self._lock, self._db:
            self._db.executemany("INSERT INTO event (kind, body) VALUES (?, ?)", rows)
        return [None] * len(events)

    def flush(self) -> int:
        """Move what is there to Parquet; how many events those were. Events are appended while
        their files are written."""
        moved = 0
        with self._flushing:
            while True:
                with self._lock:
                    rows = _rows(self._db)
                _write(rows, self._directory)
                with self._lock:
                    _delete(self._db, rows)
                moved += len(rows)
                if len(rows) < MOVED:  # not until none is left: some always may come
                    return moved

    def close(self) -> None:
        """Flush, and leave no file behind."""
        with self._flushing, self._lock:
            _move(self._db, self._directory)
            self._db.close()
            _unlink(self._path)


def collect(directory: Path) -> int:
    """Move what dead replicas left to Parquet; how many events those were. Files of replicas that
    live are passed by, one that cannot be read is set aside under another name."""
    moved = 0
    for path in sorted((directory / "hot").glob("*.sqlite")):
        try:
            with closing(_open(path, "rw", wait=0)) as db:
                moved += _move(db, directory)
                _unlink(path)  # while it is locked
        except sqlite3.OperationalError:
            pass  # locked: it lives; no table yet: it starts; gone: another collector was faster
        except (sqlite3.DatabaseError, ValueError, LookupError, pa.ArrowException) as error:
            aside = path.with_suffix(".broken")
            for suffix in ("", "-wal"):
                with suppress(FileNotFoundError):
                    path.with_name(path.name + suffix).rename(f"{aside}{suffix}")
            log.warning("%s: events that cannot be read (%s) are set aside there", aside, error)
    return moved


def tend(directory: Path, days: int) -> None:
    """`collect` and `forget`, the second also where the disk has no room for the first."""
    try:
        collect(directory)
    finally:
        forget(directory, days)


def forget(directory: Path, days: int) -> None:
    """Delete the days that ended more than `days` days ago, what was set aside before that, and
    half-written files of processes that were killed. Where another process holds the log's lock it
    is left for the next time."""
    if not directory.is_dir():
        return
    now = datetime.now(UTC)
    first = f"{now - timedelta(days=days):%Y-%m-%d}"
    with suppress(Timeout), _lock(directory).acquire(timeout=0):
        for kind in SCHEMAS:
            for folder in (directory / kind).glob("????-??-??"):
                if folder.name < first:
                    shutil.rmtree(folder)
            for partial in (directory / kind).glob("*/.*.partial"):
                with suppress(FileNotFoundError):  # it is whole by now
                    if partial.stat().st_mtime < now.timestamp() - STALE_SECONDS:
                        partial.unlink()
        for aside in (directory / "hot").glob("*.broken*"):
            if aside.stat().st_mtime < now.timestamp() - (days + 1) * DAY_SECONDS:
                aside.unlink()


def compact(directory: Path) -> int:
    """Make one file of each day that is over; how many files were replaced. Replicas only add
    files, so it may run beside them; a kill leaves events twice, of which readers drop the second.
    A day that cannot be read or written stays as it is, with a line in the log.

    Memory: ROWS rows, whatever the length of a day.
    """
    replaced = 0
    if not directory.is_dir():
        return replaced
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    with _lock(directory):
        for kind, schema in SCHEMAS.items():
            for folder in sorted((directory / kind).glob("????-??-??")):
                files = sorted(folder.glob("*.parquet"))
                if folder.name >= today or len(files) < 2:
                    continue
                try:
                    rows = ds.dataset(files, schema).to_batches(batch_size=ROWS)
                    _write_file(folder, schema, rows)
                except (OSError, pa.ArrowException) as error:
                    log.warning("%s: not made one file: %s", folder, error)
                    continue
                for file in files:
                    file.unlink()
                replaced += len(files)
    return replaced


@contextmanager
def unchanging(directory: Path) -> Iterator[None]:
    """No file of the log is deleted or replaced in this block, though some may come. A log that
    cannot be written, which is a copy, is read without the lock."""
    if not os.access(directory, os.W_OK):
        yield
        return
    with _lock(directory):
        yield


def _lock(directory: Path) -> FileLock:
    return FileLock(directory / ".lock")


def user_key(directory: Path, user: str) -> str:
    """`user` as it is logged: an HMAC with the log's own salt, 32 hex digits."""
    return hmac.new(_salt(directory), user.encode(errors="surrogatepass"), "sha256").hexdigest()[
        :32
    ]


_SALTS: dict[Path, bytes] = {}


def _salt(directory: Path) -> bytes:
    """Made once, with the first of the replicas to ask, readable by the service's user alone."""
    if directory not in _SALTS:
        path = directory / "user_salt"
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            aside = directory / f".user_salt.{uuid.uuid4().hex}"
            try:
                with os.fdopen(
                    os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
                ) as out:
                    out.write(secrets.token_bytes(32))
                with suppress(FileExistsError):  # another replica was faster: its salt holds
                    os.link(aside, path)
            finally:
                aside.unlink(missing_ok=True)
        _SALTS[directory] = path.read_bytes()
    return _SALTS[directory]


def _open(path: Path, mode: str, wait: float) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"file:{path}?mode={mode}", uri=True, timeout=wait, check_same_thread=False
    )
    try:
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("BEGIN IMMEDIATE")  # takes the lock, which stays until the file is closed
        db.commit()
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


def _move(db: sqlite3.Connection, directory: Path) -> int:
    moved = 0
    while rows := _rows(db):
        _write(rows, directory)
        _delete(db, rows)
        moved += len(rows)
    return moved


def _rows(db: sqlite3.Connection) -> list[Row]:
    """The oldest, MOVED at most."""
    sql = "SELECT seq, kind, body FROM event ORDER BY seq LIMIT ?"
    return db.execute(sql, (MOVED,)).fetchall()


def _delete(db: sqlite3.Connection, rows: list[Row]) -> None:
    if rows:
        with db:
            db.execute("DELETE FROM event WHERE seq <= ?", (rows[-1][0],))


def _write(rows: list[Row], directory: Path) -> None:
    """To Parquet, durable when it returns."""
    of_file: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _, kind, body in rows:
        event = json.loads(body)
        if kind == "exposure":
            event["versions"] = list(event["versions"].items())  # as Arrow wants a map
        day = f"{datetime.fromtimestamp(event['at'] / 1000, UTC):%Y-%m-%d}"
        of_file.setdefault((kind, day), []).append(event)
    for (kind, day), events in of_file.items():
        folder = directory / kind / day
        folder.mkdir(parents=True, exist_ok=True)
        _write_file(folder, SCHEMAS[kind], [pa.RecordBatch.from_pylist(events, SCHEMAS[kind])])


def _write_file(folder: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """One file more, in row groups of at least ROWS; durable when it returns. What cannot be
    written whole leaves nothing: on a full disk each try would take some more of it."""
    final = folder / f"{uuid.uuid4().hex}.parquet"
    aside = folder / f".{final.name}.partial"
    try:
        with aside.open("wb") as file:
            with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                group: list[pa.RecordBatch] = []
                for batch in batches:
                    group.append(batch)
                    if sum(len(part) for part in group) >= ROWS:
                        writer.write_table(pa.Table.from_batches(group, schema))
                        group = []
                writer.write_table(pa.Table.from_batches(group, schema))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)


def _unlink(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _kind(event: Event) -> str:
    return "exposure" if isinstance(event, Exposure) else "action"


def _milliseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000)
