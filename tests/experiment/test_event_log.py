import ast
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from acebert.experiment import event_log
from acebert.experiment.event_log import (
    Action,
    EventLog,
    Exposure,
    collect,
    compact,
    forget,
    tend,
    unchanging,
    user_key,
)

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def exposure(name: str, at: datetime = NOW) -> Exposure:
    versions = {"a": "model"}
    products = ["p1", "p2"]
    return Exposure(
        name, at, "test", "a", "0" * 32, "red shoe", products, "dealt", "split", versions
    )


def read(directory: Path, kind: str, column: str = "search_id") -> list[object]:
    files = sorted((directory / kind).rglob("*.parquet"))
    return [value for file in files for value in pq.read_table(file)[column].to_pylist()]


def test_events_come_back_from_parquet_as_they_were_by_day(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    tomorrow = NOW + timedelta(days=1)
    bought = Action("s1", tomorrow, "purchase", "p2", 12.5)
    log.append([exposure("s1"), exposure("s2", tomorrow), bought])
    assert log.flush() == 3
    assert log.flush() == 0
    assert sorted(path.name for path in (tmp_path / "exposure").iterdir()) == [
        "2026-03-01",
        "2026-03-02",
    ]
    assert sorted(map(str, read(tmp_path, "exposure"))) == ["s1", "s2"]
    (file,) = (tmp_path / "action").rglob("*.parquet")
    assert pq.read_table(file).to_pylist() == [vars(bought)]
    first = next((tmp_path / "exposure" / "2026-03-01").iterdir())
    searched = vars(exposure("s1")) | {"versions": [("a", "model")]}  # as Arrow tells a map
    assert pq.read_table(first).to_pylist() == [searched]
    log.flush()
    assert list((tmp_path / "hot").iterdir()) == []


def killed(log: EventLog) -> None:
    """The kernel closes a dead process's files, and so unlocks them."""
    assert log._current is not None
    os.close(log._current._fd)


def test_events_are_moved_some_at_a_time_into_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "MOVED", 4)
    monkeypatch.setattr(event_log, "ROWS", 4)
    for how in ("flush", "collect"):
        log = EventLog(tmp_path / how)
        log.append([exposure(f"s{i}") for i in range(10)])
        if how == "collect":
            killed(log)
            assert collect(tmp_path / how) == 10
        else:
            assert log.flush() == 10
        (file,) = (tmp_path / how / "exposure").rglob("*.parquet")
        groups = pq.read_metadata(file)
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        assert sizes == [4, 4, 2]
        assert read(tmp_path / how, "exposure") == [f"s{i}" for i in range(10)]


def test_what_a_living_replica_has_is_not_collected(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append([exposure("s1")])
    assert _collect_elsewhere(tmp_path) == 0
    log.append([exposure("s2")])
    assert log.flush() == 2


def _collect_elsewhere(directory: Path) -> int:
    """In another process, as another replica or a report does."""
    code = (
        "import sys; from pathlib import Path; from acebert.experiment.event_log import collect\n"
    )
    code += "print(collect(Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(directory)]
    return int(subprocess.check_output(command, text=True))


def test_events_are_appended_while_others_are_written_to_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, writer = EventLog(tmp_path), pq.ParquetWriter
    log.append([exposure("s1")])

    def slow(*arguments: object, **options: object) -> object:
        appended = threading.Thread(target=log.append, args=([exposure("s2")],))
        appended.start()
        appended.join(10)
        assert not appended.is_alive()
        return writer(*arguments, **options)

    monkeypatch.setattr(event_log.pq, "ParquetWriter", slow)
    assert log.flush() == 1
    monkeypatch.undo()
    log.flush()
    assert set(read(tmp_path, "exposure")) == {"s1", "s2"}


@pytest.mark.parametrize("how", ["no text", "no event", "no JSON", "another column's type"])
def test_a_hot_file_that_cannot_be_read_is_set_aside_and_the_others_collected(
    tmp_path: Path, how: str
) -> None:
    for name in ("a", "b"):
        log = EventLog(tmp_path)
        log.append([exposure(f"{name}{i}") for i in range(200)])
        killed(log)
        (path,) = set((tmp_path / "hot").iterdir()) - {tmp_path / "hot" / "a.jsonl"}
        path.rename(tmp_path / "hot" / f"{name}.jsonl")
    broken = tmp_path / "hot" / "a.jsonl"
    lines = broken.read_bytes().splitlines(keepends=True)
    lines[7] = {
        "no text": bytes([255, 0]) * 100 + b"\n",
        "no event": b"7\n",
        "no JSON": lines[7][:-9] + b"\n",
        "another column's type": lines[7].replace(b'"red shoe"', b"[8]"),
    }[how]
    broken.write_bytes(b"".join(lines))
    assert collect(tmp_path) == 200
    assert sorted(map(str, read(tmp_path, "exposure"))) == sorted(f"b{i}" for i in range(200))
    assert [path.name for path in (tmp_path / "hot").iterdir()] == ["a.broken"]


WRITER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from acebert.experiment.event_log import EventLog, Exposure
log = EventLog(Path(sys.argv[1]))
for i in range(1_000_000):
    event = Exposure(f"s{i}", datetime.now(UTC), "test", "a", "u", "q", ["p"], "d", "split", {})
    log.append([event])
    print(f"s{i}", flush=True)
    if i % 40 == 39:
        log.flush()
"""


def test_kill_9_at_any_time_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    for run in range(3):
        directory = tmp_path / str(run)
        command = [sys.executable, "-c", WRITER, str(directory)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        acknowledged = {process.stdout.readline().strip() for _ in range(100 + 37 * run)}
        os.kill(process.pid, signal.SIGKILL)
        acknowledged |= {line.strip() for line in process.stdout if line.endswith("\n")}
        process.wait()
        collect(directory)
        assert acknowledged <= set(read(directory, "exposure"))
        assert list((directory / "hot").iterdir()) == []


def test_what_could_not_be_collected_is_collected_the_next_time(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append([exposure("s1")])
    killed(log)
    (tmp_path / "exposure").write_bytes(b"in the way, as a full disk is")
    with pytest.raises(OSError, match="exposure"):
        collect(tmp_path)
    (tmp_path / "exposure").unlink()
    assert collect(tmp_path) == 1
    assert read(tmp_path, "exposure") == ["s1"]


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """To a file of 0600: as another user, where this one is root."""
    os.seteuid(65534) if os.geteuid() == 0 else path.chmod(0)
    try:
        yield
    finally:
        os.seteuid(os.getuid())


def test_what_may_not_be_opened_is_passed_by_with_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with tempfile.TemporaryDirectory() as name:  # which others may enter, unlike tmp_path
        directory = Path(name)
        directory.chmod(0o755)
        log = EventLog(directory)
        log.append([exposure("s1")])
        killed(log)
        (hot,) = (directory / "hot").iterdir()
        with without_rights(hot):
            assert collect(directory) == 0
        hot.chmod(0o600)
        assert f"{hot}: what is in it is not read: Permission denied" in caplog.text
        assert collect(directory) == 1


def test_a_log_that_is_deleted_beneath_a_replica_loses_nothing_that_was_not_moved_yet(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "events"
    log = EventLog(directory)
    log.append([exposure("s1")])
    shutil.rmtree(directory)
    log.append([exposure("s2")])
    assert log.flush() == 2
    log.append([exposure("s3")])
    assert log.flush() == 1
    assert sorted(map(str, read(directory, "exposure"))) == ["s1", "s2", "s3"]


def test_a_line_that_a_kill_left_without_its_end_is_no_event(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append([exposure("s1")])
    (path,) = (tmp_path / "hot").iterdir()
    with path.open("ab") as file:
        file.write(path.read_bytes()[:-1])
    killed(log)
    assert collect(tmp_path) == 1
    assert read(tmp_path, "exposure") == ["s1"]


def test_a_kill_between_rename_and_deletion_leaves_events_twice_and_none_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path)
    log.append([exposure("s1")])
    moved = Path.replace

    def replaced(path: Path, target: Path) -> None:
        moved(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", replaced)
    with pytest.raises(KeyboardInterrupt):
        log.flush()
    monkeypatch.undo()
    log.flush()
    assert read(tmp_path, "exposure") == ["s1", "s1"]


def test_a_half_written_file_has_no_name_that_readers_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path)
    log.append([exposure("s1")])

    def half(file: object, *_: object, **options: object) -> None:
        file.write(b"PAR1 and then")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(event_log.pq, "ParquetWriter", half)
        with pytest.raises(KeyboardInterrupt):
            log.flush()
    assert read(tmp_path, "exposure") == []
    log.flush()
    assert read(tmp_path, "exposure") == ["s1"]


FULL_DISK = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
from acebert.experiment import event_log
directory = Path(sys.argv[1])
log = event_log.EventLog(directory)
now, nobody = datetime.now(UTC), {}
events = [
    event_log.Exposure(f"s{i}", now, "test", "a", f"{i}", "q", [], "d", "split", nobody)
    for i in range(5000)
]
log.append(events)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # a file's end, as that of a disk
for _ in range(3):
    try:
        log.flush()
        sys.exit("it was written")
    except OSError:
        pass
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
for _ in range(3):
    try:
        event_log.user_key(directory, "u")
        sys.exit("the salt was written")
    except OSError:
        pass
print(sorted(path.name for path in directory.rglob("*") if path.is_file()))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert log.flush() == len(events)
"""


def test_a_disk_that_is_full_is_not_filled_further_by_each_try(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    left = ast.literal_eval(done.stdout)
    assert [name for name in left if not name.endswith(".jsonl")] == []


def test_a_half_written_file_of_a_process_that_was_killed_goes_when_nobody_writes_it_any_more(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "exposure" / f"{datetime.now(UTC):%Y-%m-%d}"
    folder.mkdir(parents=True)
    for name, age in (("left", 4000), ("new", 10)):
        path = folder / f".{name}.parquet.partial"
        path.write_bytes(b"PAR1 and then")
        os.utime(path, (time.time() - age,) * 2)
    forget(tmp_path, 10)
    assert [path.name for path in folder.iterdir()] == [".new.parquet.partial"]


def test_days_are_deleted_when_they_are_too_old(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    now = datetime.now(UTC)
    log.append([exposure(f"s{days}", now - timedelta(days=days)) for days in (0, 5, 20)])
    log.flush()
    forget(tmp_path, 10)
    assert sorted(map(str, read(tmp_path, "exposure"))) == ["s0", "s5"]


def test_what_was_set_aside_ages_out_too(tmp_path: Path) -> None:
    (tmp_path / "hot").mkdir()
    now = datetime.now(UTC).timestamp()
    for name, days in (("old.broken", 12), ("new.broken", 10), ("old.new", 1)):
        (tmp_path / "hot" / name).write_bytes(b"no event")
        os.utime(tmp_path / "hot" / name, (now, now - days * 24 * 3600))
    forget(tmp_path, 10)
    assert [path.name for path in (tmp_path / "hot").iterdir()] == ["new.broken"]


def test_what_a_dead_replica_left_ages_out_though_nobody_logs_any_more(tmp_path: Path) -> None:
    log, now = EventLog(tmp_path), datetime.now(UTC)
    log.append([exposure(f"s{days}", now - timedelta(days=days)) for days in (5, 20)])
    killed(log)
    tend(tmp_path, 10)
    assert read(tmp_path, "exposure") == ["s5"]
    assert list((tmp_path / "hot").iterdir()) == []
    tend(tmp_path / "no log", 10)
    assert not (tmp_path / "no log").exists()


def test_who_reads_the_log_keeps_its_files(tmp_path: Path) -> None:
    log, now = EventLog(tmp_path), datetime.now(UTC)
    for days in (20, 1, 1):
        log.append([exposure(f"s{days}", now - timedelta(days=days))])
        log.flush()
    log.flush()
    files = sorted(tmp_path.glob("exposure/*/*.parquet"))
    compacting = threading.Thread(target=compact, args=(tmp_path,))
    with unchanging(tmp_path):
        forget(tmp_path, 10)
        compacting.start()
        compacting.join(1)
        assert compacting.is_alive()
        assert sorted(tmp_path.glob("exposure/*/*.parquet")) == files
    compacting.join(60)
    forget(tmp_path, 10)
    assert len(list(tmp_path.glob("exposure/*/*.parquet"))) == 1


FORGETTER = """
import sys
from pathlib import Path
from acebert.experiment.event_log import forget
print("ready", flush=True)
sys.stdin.readline()
for _ in range(50):
    forget(Path(sys.argv[1]), 10)
"""


def test_several_processes_may_delete_the_same_days_at_once(tmp_path: Path) -> None:
    for days in range(20, 80):
        folder = tmp_path / "exposure" / f"{datetime.now(UTC) - timedelta(days=days):%Y-%m-%d}"
        folder.mkdir(parents=True)
        for i in range(20):
            (folder / f"{i}.parquet").touch()
    command = [sys.executable, "-c", FORGETTER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [subprocess.Popen(command, text=True, **pipes) for _ in range(3)]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 3
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(120) for process in started] == [0, 0, 0]
    assert list((tmp_path / "exposure").iterdir()) == []


def test_on_a_full_disk_an_event_is_in_the_log_whole_or_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    taken = done.stdout.split()
    assert taken[-1] == "s99"
    assert 1 < len(taken) < 100
    assert read(tmp_path, "exposure") == taken


FILLER = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
from acebert.experiment.event_log import EventLog, Exposure
log, now = EventLog(Path(sys.argv[1])), datetime.now(UTC)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # a file's end, as that of a disk
for i in range(100):
    if i == 99:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    try:
        log.append([Exposure(f"s{i}", now, "test", "a", "u", "q", ["p"], "d", "split", {})])
        print(f"s{i}")
    except OSError:
        pass
log.flush()
"""


def test_days_that_are_over_become_one_file_with_the_same_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "ROWS", 3)
    now, log = datetime.now(UTC), EventLog(tmp_path)
    for i in range(10):
        log.append([exposure(f"s{i}", now - timedelta(days=i % 2))])
        log.append([Action(f"s{i}", now - timedelta(days=i % 2), "click", "p", None)])
        log.flush()
    before = {kind: read(tmp_path, kind) for kind in ("exposure", "action")}
    assert compact(tmp_path) == 2 * 5
    yesterday = f"{now - timedelta(days=1):%Y-%m-%d}"
    for kind, ids in before.items():
        assert sorted(map(str, read(tmp_path, kind))) == sorted(map(str, ids))
        assert len(list((tmp_path / kind / yesterday).iterdir())) == 1
    log.append([exposure("late", now - timedelta(days=1))])
    log.flush()
    assert compact(tmp_path) == 2
    assert sorted(map(str, read(tmp_path, "exposure"))) == sorted([*before["exposure"], "late"])
    assert compact(tmp_path) == 0


def test_a_day_with_a_broken_file_stays_as_it_is_and_the_others_become_one_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog(tmp_path)
    for name in ("a", "b"):
        log.append([exposure(f"{name}{day}", NOW + timedelta(days=day)) for day in range(2)])
        log.flush()
    log.flush()
    broken, whole = sorted((tmp_path / "exposure").iterdir())
    (broken / "broken.parquet").write_bytes(b"PAR1 and then")
    assert compact(tmp_path) == 2
    assert len(list(broken.iterdir())) == 3  # nothing half-written either
    assert len(list(whole.iterdir())) == 1
    assert f"{broken}: not made one file" in caplog.text
    assert "broken.parquet" in caplog.text


def test_users_are_hashed_by_a_salt_of_the_logs_own_that_outlives_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = user_key(tmp_path / "a", "user-1")
    assert key != user_key(tmp_path / "b", "user-1")
    assert key != user_key(tmp_path / "a", "user-2")
    monkeypatch.setattr(event_log, "_SALTS", {})
    assert key == user_key(tmp_path / "a", "user-1")
    assert stat.S_IMODE((tmp_path / "a" / "user_salt").stat().st_mode) == 0o600
