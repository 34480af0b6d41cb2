"""Which stages a refresh deletes."""

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from acebert.errors import UserError
from acebert.serving.bundle import publish, published
from acebert.serving.leases import EXPIRES_SECONDS, Lease, held
from acebert.serving.old_days import remove_old_days
from acebert.workdir import lock_file, run_stage

STAGES = ("ingest", "tokens", "features", "embed", "bundle")


@pytest.fixture
def days(tmp_path: Path) -> list[list[Path]]:
    """Stages of five catalogues [day][stage], the first one's by a training."""
    made = []
    for day in range(5):
        key = {"day": day} | ({"held_out": "nothing"} if day else {})
        stages = [run_stage(tmp_path, "ingest", key, lambda out: None)]
        for name in STAGES[1:]:
            key = {"day": day, "ingest": stages[0].digest}
            stages.append(run_stage(tmp_path, name, key, lambda out: (out / "x").write_text("x")))
        made.append([stage.path for stage in stages])
        os.utime(stages[0].path / "stage.json", (day, day))
    return made


def there(days: list[list[Path]]) -> list[bool]:
    """Of which days all stages are there; of the others none is."""
    found = [{path.is_dir() for path in day} for day in days]
    assert all(len(some) == 1 for some in found)
    return [some.pop() for some in found]


def test_the_newest_days_what_is_published_and_what_trainings_made_stay(
    tmp_path: Path, days: list[list[Path]]
) -> None:
    publish(tmp_path, days[4][-1])
    publish(tmp_path, days[1][-1], arm="control")
    gone = remove_old_days(tmp_path, keep=2)
    assert there(days) == [True, True, False, True, True]
    assert set(gone) == set(days[2])
    publish(tmp_path, days[4][-1], arm="control")
    remove_old_days(tmp_path, keep=1)
    assert there(days) == [True, False, False, False, True]
    assert not [path for path in tmp_path.glob("*/.*") if path.suffix != ".lock"]


def test_what_a_process_left_that_died_while_it_built_a_stage_goes_and_what_is_built_now_stays(
    tmp_path: Path, days: list[list[Path]]
) -> None:
    publish(tmp_path, days[4][-1])
    left, built = (tmp_path / "embed" / f".{name * 16}.partial" for name in "ab")
    for path in (left, built):
        path.mkdir()
        (path / "x").write_text("x")
    with FileLock(lock_file(tmp_path, "embed", "b" * 16)):
        remove_old_days(tmp_path, keep=5)
        assert not left.exists()
        assert (built / "x").exists()
    assert there(days) == [True] * 5


def test_what_the_settings_pin_or_a_replica_holds_stays_until_the_lease_expires(
    tmp_path: Path, days: list[list[Path]]
) -> None:
    publish(tmp_path, days[4][-1])
    Lease(tmp_path).hold({days[2][-1]})
    for _ in range(3):
        remove_old_days(tmp_path, keep=1, pinned=days[1][-1])
        assert there(days) == [True, True, True, False, True]
    (lease,) = (tmp_path / "serving" / "in_use").iterdir()
    long_ago = lease.stat().st_mtime - EXPIRES_SECONDS - 60
    os.utime(lease, (long_ago, long_ago))
    remove_old_days(tmp_path, keep=1)
    assert there(days) == [True, False, False, False, True]
    assert not lease.exists()


def test_a_replica_holds_what_it_said_last_until_it_stops(tmp_path: Path) -> None:
    one, other = Lease(tmp_path), Lease(tmp_path)
    one.hold([tmp_path / "a", tmp_path / "b"])
    other.hold([tmp_path / "c"])
    one.hold([tmp_path / "b"])
    assert held(tmp_path) == {tmp_path / "b", tmp_path / "c"}
    other.end()
    assert held(tmp_path) == {tmp_path / "b"}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_pointer_that_cannot_be_read_is_named_and_nothing_is_deleted_for_it(
    tmp_path: Path, days: list[list[Path]], content: str
) -> None:
    publish(tmp_path, days[4][-1])
    publish(tmp_path, days[2][-1], arm="new")
    pointer = tmp_path / "serving" / "arm-new.json"
    pointer.write_text(content)
    with pytest.raises(UserError, match=r"arm-new\.json"):
        published(tmp_path, "new")
    assert remove_old_days(tmp_path, keep=1) == []
    assert there(days) == [True] * 5
    publish(tmp_path, days[2][-1], arm="new")
    assert published(tmp_path, "new") == days[2][-1]


def test_a_removal_that_was_killed_is_finished_by_the_next(
    tmp_path: Path, days: list[list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, days[4][-1])

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_old_days(tmp_path, keep=1)
    remove_old_days(tmp_path, keep=1)
    assert there(days) == [True, False, False, False, True]
    assert not [path for path in tmp_path.glob("*/.*") if path.suffix != ".lock"]
    assert json.loads((days[0][1] / "stage.json").read_text())["name"] == "tokens"
