"""The node's copy against the stage it was made from."""

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from acebert.config import ImageSettings
from acebert.data import feature_cache
from acebert.data.feature_cache import local_copy, open_features
from acebert.data.features import FeatureStore, Shard, write_shard, write_shard_list
from acebert.errors import UserError

N, D1, S = 60, 8, 14


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    directory = tmp_path / "features" / "0123456789abcdef"
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    entries = []
    for first in range(0, N, 20):
        shard = Shard(
            np.arange(first, first + 20, dtype=np.int32),
            np.ones(20, bool),
            np.zeros((20, 4), np.int32),
            rng.normal(size=(20, 16, D1)).astype(np.float16),
            rng.integers(0, 256, (20, S, S, 3)).astype(np.uint8),
        )
        entries.append(write_shard(directory, f"part-{first}.arrow", shard))
    write_shard_list(directory, entries, patch_dim=D1, pixel_side=S)
    return directory


@pytest.mark.parametrize("cache", ["node_disk", "node_memory"])
def test_a_copy_reads_as_the_stage_does(stage: Path, tmp_path: Path, cache: str) -> None:
    image = ImageSettings(feature_cache=cache, feature_cache_dir=tmp_path / "node")  # type: ignore[arg-type]
    plain, cached = open_features(ImageSettings(), stage), open_features(image, stage)
    assert plain.directory == stage
    assert cached.directory == tmp_path / "node" / f"features-{stage.name}"
    rows = np.random.default_rng(1).integers(0, N, 100)
    np.testing.assert_array_equal(cached.patches(rows), plain.patches(rows))
    np.testing.assert_array_equal(cached.pixels(rows), plain.pixels(rows))
    np.testing.assert_array_equal(cached.has_image(rows), plain.has_image(rows))


def test_node_memory_lies_in_a_tmpfs(stage: Path) -> None:
    place = feature_cache._place(ImageSettings(feature_cache="node_memory"))
    assert place is not None
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    assert dict(mounts)[str(place.parent)] == "tmpfs"


def test_a_copy_is_fetched_once_and_reused_after_that(stage: Path, tmp_path: Path) -> None:
    copy = local_copy(stage, tmp_path / "node")
    made = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert set(made) == {path.name for path in stage.iterdir()}
    local_copy(stage, tmp_path / "node")
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == made


def _fetch(stage: Path, place: Path, barrier: "multiprocessing.synchronize.Barrier") -> None:
    barrier.wait()
    copy = local_copy(stage, place)
    (place / f"inode-{os.getpid()}").write_text(str((copy / "part-0.arrow").stat().st_ino))


def test_processes_of_a_node_that_come_at_once_share_one_copy(stage: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, place = context.Barrier(3), tmp_path / "node"
    place.mkdir()
    workers = [context.Process(target=_fetch, args=(stage, place, barrier)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    inodes = [path.read_text() for path in place.glob("inode-*")]
    assert len(inodes) == 3
    assert len(set(inodes)) == 1


def test_a_fetch_that_was_killed_is_no_copy_and_the_next_one_goes_on_with_its_files(
    stage: Path, tmp_path: Path
) -> None:
    place = tmp_path / "node"
    aside = place / f".features-{stage.name}.partial"

    def slow() -> None:
        copyfile = feature_cache.shutil.copyfile

        def one_then_hang(source: Path, target: Path) -> Path:
            if source.name != "part-0.arrow":
                time.sleep(60)
            return copyfile(source, target)

        feature_cache.shutil.copyfile = one_then_hang  # type: ignore[assignment]
        local_copy(stage, place)

    worker = multiprocessing.get_context("fork").Process(target=slow)
    worker.start()
    until = time.monotonic() + 30
    while not (aside / "part-0.arrow").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    fetched = (aside / "part-0.arrow").stat().st_ino
    copy = local_copy(stage, place)
    assert not aside.exists()
    assert {path.name for path in copy.iterdir()} == {path.name for path in stage.iterdir()}
    assert (copy / "part-0.arrow").stat().st_ino == fetched  # what was whole is not fetched again
    FeatureStore(copy)


def test_a_damaged_copy_is_fetched_again(stage: Path, tmp_path: Path) -> None:
    copy = local_copy(stage, tmp_path / "node")
    (copy / "part-20.arrow").write_bytes(b"cut off")
    np.testing.assert_array_equal(
        FeatureStore(local_copy(stage, tmp_path / "node")).patches(np.arange(N)),
        FeatureStore(stage).patches(np.arange(N)),
    )


def test_a_damaged_stage_is_not_copied(stage: Path, tmp_path: Path) -> None:
    (stage / "part-20.arrow").unlink()
    with pytest.raises(UserError, match=r"part-20\.arrow: missing"):
        local_copy(stage, tmp_path / "node")
    assert not list((tmp_path / "node").glob("features-*"))


def test_a_copy_that_does_not_fit_is_refused_with_the_sizes(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_copy(stage, tmp_path / "node")
    other = stage.rename(stage.with_name("another"))
    monkeypatch.setattr(feature_cache, "SPARE", 1 << 60)
    with pytest.raises(UserError, match=r"GB of features do not fit in .*features-01234"):
        local_copy(other, tmp_path / "node")


@pytest.fixture
def in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_a_copy_in_memory_has_the_room_of_its_container_and_not_of_the_tmpfs(
    stage: Path, tmp_path: Path, in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroup = tmp_path / "cgroup"
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("3000000000\n")
    (cgroup / "memory.current").write_text("2600000000\n")
    (cgroup / "memory.stat").write_text("anon 2300000000\ninactive_file 300000000\n")
    monkeypatch.setattr(feature_cache, "CGROUP", cgroup)
    assert feature_cache.free_memory() == 700_000_000
    with pytest.raises(UserError, match=r"do not fit in /dev/shm/\S+, which has 0\.7 GB free"):
        local_copy(stage, in_memory)
    local_copy(stage, tmp_path / "node")  # a disk has nothing to do with it
    (cgroup / "memory.max").write_text("max\n")
    local_copy(stage, in_memory)


def test_a_disk_that_fills_up_during_the_copy_is_named_and_cleaned(
    stage: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may take the room that was there before."""
    monkeypatch.setattr(feature_cache, "SPARE", 0)
    copyfile = feature_cache.shutil.copyfile

    def beside_another(source: Path, target: Path) -> Path:
        with suppress(OSError), (small_disk / "another").open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
        return copyfile(source, target)

    monkeypatch.setattr(feature_cache.shutil, "copyfile", beside_another)
    with pytest.raises(UserError, match=r"feature_cache: \S+/node was filled up while"):
        local_copy(stage, small_disk / "node")
    left = {path.suffix for path in (small_disk / "node").iterdir()}
    assert left == {".lock"}


def test_a_place_that_cannot_be_written_is_named(stage: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"feature_cache_dir .*file/node: cannot be written"):
        local_copy(stage, tmp_path / "file" / "node")
