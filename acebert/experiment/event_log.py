"""The log of an experiment: searches that were answered, and what became of them.

    EVENTS/hot/<id>.jsonl                a replica's newest events, a line each, with its end
    EVENTS/exposure/<day>/<id>.parquet   whole files only: written aside, then renamed
    EVENTS/action/<day>/<id>.parquet

A replica appends to a file of its own, by one write to the kernel, so what was appended outlives
kill -9; the last seconds before a power failure may be lost, and a last line without an end was
never acknowledged. Now and then it begins a new file and moves the old one to Parquet. It holds the
lock of its file for as long as it lives: whoever finds one unlocked knows that its replica is dead,
and moves what it left. A kill between the rename and the deletion leaves events twice, with one id:
readers drop the second. Days are UTC days; whole days are deleted when they are too old. Files are
deleted and put together by one process at a time, the one that holds the log's lock; who reads many
of them holds it too.
"""

import errno
import fcntl
import hmac
import logging
import os
import secrets
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.json as pj
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from pydantic_core import to_json

log = logging.getLogger(__name__)

ROWS = 100_000  # of a row group
MOVED = 4 * 2**20  # bytes read at a time while events are moved to Parquet: bounds the memory
STALE_SECONDS = 3600  # without a byte more, after which a half-written file is nobody's
DAY_SECONDS = 24 * 3600
TIME = pa.timestamp("ms", tz="UTC")
VERSIONS = pa.map_(pa.string(), pa.string())
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
            "versions": VERSIONS,
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
# of the lines, as Arrow reads them: it has no maps and no numbers for times
IN_JSON: dict[pa.DataType, pa.DataType] = {
    TIME: pa.int64(),
    VERSIONS: pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())])),
}
LINES = pj.ParseOptions(
    pa.schema(
        {
            kind: pa.struct([(field.name, IN_JSON.get(field.type, field.type)) for field in schema])
            for kind, schema in SCHEMAS.items()
        }
    ),
    unexpected_field_behavior="error",
)

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
    """normalised; empty where `experiment.log_queries` is off"""
    products: list[str]
    """as shown, best first"""
    dealing: str
    """how users were dealt to arms, see `Experiment.dealing`"""
    design: Shown
    versions: dict[str, str]
    """arm that answered → version of its model and of its query encoder"""
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


def events_directory(workdir: Path) -> Path:
    """Where the services of a work directory log."""
    return workdir / "serving" / "events"


class EventLog:
    """One replica's part of the log; safe for several threads. After the last `flush` it leaves no
    file behind."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._current: _HotFile | None = None
        """that takes events; there is none before the first after a flush"""
        self._ended: _HotFile | None = None
        """to be moved"""

    def append(self, events: Sequence[Event]) -> None:
        """In the kernel's hands when it returns, after some microseconds, whatever else goes on.

        Raises:
            OSError: the disk is full, or away; none of the events is in the log.
        """
        data = b"".join(_line(event) for event in events)
        with self._lock:
            if self._current is None:
                self._current = _HotFile.new(self._directory)
            self._current.append(data)

    def flush(self) -> int:
        """Move what is there to Parquet; how many events those were. Events are appended while
        their files are written."""
        with self._flushing:
            moved = self._move_ended()  # what could not be moved before
            with self._lock:
                self._ended, self._current = self._current, None
            return moved + self._move_ended()

    def _move_ended(self) -> int:
        if self._ended is None:
            return 0
        moved = self._ended.move(self._directory)
        self._ended.close()
        self._ended = None
        return moved


class _HotFile:
    """Locked for as long as it is open. The lock is of the open file, not of the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd
        self._size = os.fstat(fd).st_size

    @classmethod
    def new(cls, directory: Path) -> Self:
        """Nobody else sees it before it is locked."""
        path = directory / "hot" / f"{uuid.uuid4().hex}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".new")
        fd = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            aside.rename(path)
        except OSError:
            os.close(fd)
            aside.unlink(missing_ok=True)
            raise
        return cls(path, fd)

    @classmethod
    def left(cls, path: Path) -> Self | None:
        """That of a dead process; None: its process lives, or another has moved it."""
        try:
            fd = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():  # no name comes twice
                return cls(path, fd)
        os.close(fd)
        return None

    def append(self, data: bytes) -> None:
        """All of it, or nothing.

        Raises:
            OSError: the disk is full, or away.
        """
        try:
            if os.write(self._fd, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def move(self, directory: Path) -> int:
        """To Parquet, all or nothing, durable when it returns; how many events those were. Where a
        line is no event the file is set aside under another name.

        Raises:
            OSError: the disk is full, or away.
        """
        moved = 0
        try:
            moved = _write(self._events(), directory)
            self._path.unlink(missing_ok=True)
        except (ValueError, TypeError, LookupError, AttributeError, pa.ArrowException) as error:
            aside = self._path.with_suffix(".broken")
            with suppress(FileNotFoundError):
                self._path.rename(aside)
            log.warning("%s: events that cannot be read (%s) are set aside there", aside, error)
        return moved

    def close(self) -> None:
        """Unlocks it too."""
        os.close(self._fd)

    def _events(self) -> Iterator[pa.Table]:
        """Some events at a time, a column for each kind; without what a kill left of a line. Also
        where somebody has deleted the file: the events in it were acknowledged."""
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)  # of the open file, which is appended to whatever the place
            while some := file.read(MOVED) + file.readline():
                if whole := some[: some.rfind(b"\n") + 1]:
                    reading = pj.ReadOptions(use_threads=False, block_size=len(whole))
                    yield pj.read_json(pa.BufferReader(whole), reading, LINES)


def collect(directory: Path) -> int:
    """Move what dead replicas left to Parquet; how many events those were. Files of replicas that
    live are passed by; so are, with a line in the log, those of a log that is read-only or that
    another user's service writes."""
    moved = 0
    for path in sorted((directory / "hot").glob("*.jsonl")):
        try:
            file = _HotFile.left(path)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            log.warning("%s: what is in it is not read: %s", path, error.strerror)
            continue
        if file is None:
            continue
        try:
            moved += file.move(directory)
        finally:
            file.close()
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
        newest = [d for kind in SCHEMAS for d in sorted((directory / kind).glob("????-??-??"))[-2:]]
        begun = [partial for day in newest for partial in day.glob(".*.partial")]
        for partial in [*begun, *directory.glob("hot/*.new")]:
            with suppress(FileNotFoundError):  # it is whole by now
                if partial.stat().st_mtime < now.timestamp() - STALE_SECONDS:
                    partial.unlink()
        for aside in (directory / "hot").glob("*.broken"):
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
                    _put_together(files, folder, schema)
                except (OSError, pa.ArrowException) as error:
                    log.warning("%s: not made one file: %s", folder, error)
                    continue
                for file in files:
                    file.unlink()
                replaced += len(files)
    return replaced


def _put_together(files: list[Path], folder: Path, schema: pa.Schema) -> None:
    one = _ParquetFile(folder, schema)
    try:
        for rows in ds.dataset(files, schema).to_batches(batch_size=ROWS):
            one.write(rows)
        one.end()
        one.publish()
    finally:
        one.discard()


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
    key = hmac.digest(_salt(directory), user.encode(errors="surrogatepass"), "sha256")
    return key.hex()[:32]


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


def _write(tables: Iterator[pa.Table], directory: Path) -> int:
    """To a file for each kind and day, all or none; how many events those were."""
    count = 0
    files: dict[tuple[str, str], _ParquetFile] = {}
    try:
        for table in tables:
            for kind, day, rows in _by_file(table):
                if (kind, day) not in files:
                    files[kind, day] = _ParquetFile(directory / kind / day, SCHEMAS[kind])
                files[kind, day].write(rows)
                count += len(rows)
        for file in files.values():
            file.end()
        for file in files.values():
            file.publish()
    finally:
        for file in files.values():
            file.discard()
    return count


def _by_file(table: pa.Table) -> Iterator[tuple[str, str, pa.RecordBatch]]:
    """Kind, day and their events."""
    for kind, schema in SCHEMAS.items():
        events = table[kind].combine_chunks().drop_null()
        columns = [_typed(events.field(field.name), field.type) for field in schema]
        rows = pa.RecordBatch.from_arrays(columns, schema=schema)
        days = pc.strftime(rows["at"], "%Y-%m-%d")
        for day in days.unique():
            yield kind, day.as_py(), rows.filter(pc.equal(days, day))


def _typed(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if kind == VERSIONS:
        keys, items = (values.values.field(name) for name in ("key", "value"))
        return pa.MapArray.from_arrays(values.offsets, keys, items)
    return values.cast(kind)


class _ParquetFile:
    """One file more of a day. What is not published leaves nothing: on a full disk each try would
    take some more of it."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._final = folder / f"{uuid.uuid4().hex}.parquet"
        self._aside = folder / f".{self._final.name}.partial"
        self._schema = schema
        self._group: list[pa.RecordBatch] = []
        self._file: IO[bytes] | None = None
        self._writer: pq.ParquetWriter | None = None

    def write(self, rows: pa.RecordBatch) -> None:
        """In row groups of at least ROWS, but the last."""
        self._group.append(rows)
        if sum(len(part) for part in self._group) >= ROWS:
            self._write_group()

    def _write_group(self) -> None:
        if self._writer is None:
            self._file = self._aside.open("wb")
            self._writer = pq.ParquetWriter(self._file, self._schema, compression="zstd")
        self._writer.write_table(pa.Table.from_batches(self._group, self._schema))
        self._group = []

    def end(self) -> None:
        """On the disk when it returns."""
        self._write_group()
        assert self._writer is not None
        assert self._file is not None
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self) -> None:
        self._aside.replace(self._final)

    def discard(self) -> None:
        """Nothing, where it is published."""
        for part in (self._writer, self._file):
            with suppress(OSError):  # the disk's, once more
                if part is not None:
                    part.close()
        self._aside.unlink(missing_ok=True)


def _line(event: Event) -> bytes:
    told = vars(event) | {"at": round(event.at.timestamp() * 1000)}
    if isinstance(event, Action):
        return to_json({"action": told}) + b"\n"
    told["versions"] = [{"key": arm, "value": version} for arm, version in event.versions.items()]
    return to_json({"exposure": told}) + b"\n"
