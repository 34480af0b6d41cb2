"""One copy of the image features a node: fetched from the work directory once, shared by all.

    store = open_features(settings.image, features.path)

Shards lie in the work directory, which on a cluster is a network file system. Training reads them
at random, 0.2 MB a product, which such a file system serves slowly and bills. `image.feature_cache`
copies them to the node's own disk, or to its memory (a tmpfs: the pages are shared by all workers
of the node and are nobody's anonymous memory). The first process that needs them copies under a
file lock, the others wait; the copy is made aside, checked and renamed, and a later job finds it by
the stage's digest. Copies are not removed by themselves: they are the nodes', not the job's.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from acebert.config import ImageSettings, Settings
from acebert.data.features import (
    SHARDS_FILE,
    FeatureStore,
    ShardEntry,
    check_shards,
    read_shard_list,
)
from acebert.errors import UserError
from acebert.workdir import is_disk_full

log = logging.getLogger(__name__)

STREAMS = 8  # files copied at a time: one stream does not fill a network file system's bandwidth
SAY_EVERY = 10.0
CGROUP = Path("/sys/fs/cgroup")
SPARE = 1 << 30  # bytes of the disk or memory that a copy leaves free


def open_features(image: ImageSettings, directory: Path) -> FeatureStore:
    """The features of a stage, read from where `image.feature_cache` says.

    Raises:
        UserError: features that are damaged, or a copy that does not fit.
    """
    place = _place(image)
    return FeatureStore(directory if place is None else local_copy(directory, place))


def without_copy(settings: Settings) -> Settings:
    """`settings` for a process that reads little of the features: it makes no copy of them all for
    its node."""
    image = settings.image.model_copy(update={"feature_cache": "none"})
    return settings.model_copy(update={"image": image})


def _place(image: ImageSettings) -> Path | None:
    """The directory of this node's copies."""
    if image.feature_cache in ("none", "device"):  # device: read once, from wherever they are
        return None
    if image.feature_cache_dir is not None:
        return image.feature_cache_dir.expanduser().absolute()
    fast = Path("/dev/shm") if image.feature_cache == "node_memory" else Path(tempfile.gettempdir())
    return fast / f"acebert-{os.getuid()}"


def free_memory() -> int:
    """Bytes of memory that this node, or the container that this process is in, has left."""
    rooms = [psutil.virtual_memory().available]
    with suppress(OSError, ValueError):  # no cgroup of the second version, or "max": no limit
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        rooms.append(limit - used + int(stat["inactive_file"]))
    return min(rooms)


def local_copy(directory: Path, place: Path) -> Path:
    """`place`/features-<digest>, a whole copy of the stage in `directory`; made if it is not there.

    Raises:
        UserError: the stage is damaged; the copy does not fit; `place` cannot be written.
    """
    shards = read_shard_list(directory)["shards"]
    copy = place / f"features-{directory.name}"
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(place / f".{copy.name}.lock")
        _acquire(lock)
    except OSError as error:
        raise UserError(
            f"--image.feature_cache_dir {place}: cannot be written ({error.strerror})"
        ) from error
    try:
        if not _is_whole(copy, shards):
            _fetch(directory, copy, shards)
    finally:
        lock.release()
    return copy


def _acquire(lock: FileLock) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("features: another process of this node fetches them, waiting")
        lock.acquire()


def _is_whole(copy: Path, shards: list[ShardEntry]) -> bool:
    """Whether every file is there in its size; else what is there is removed."""
    if not copy.is_dir():
        return False
    try:
        check_shards(copy, shards)
    except UserError as error:
        log.warning("features: the node's copy is fetched again: %s", error)
        shutil.rmtree(copy)
        return False
    return True


def _fetch(directory: Path, copy: Path, shards: list[ShardEntry]) -> None:
    check_shards(directory, shards)
    aside = copy.with_name(f".{copy.name}.partial")
    aside.mkdir(exist_ok=True)  # whole files that a process left that died here are kept
    lacking = [shard for shard in shards if not _is_there(aside, shard)]
    total = sum(shard["bytes"] for shard in lacking)
    free = shutil.disk_usage(copy.parent).free
    if _is_in_memory(copy.parent):  # its size is a limit, and no promise
        free = min(free, free_memory())
    if total + SPARE > free:
        copies = ", ".join(str(path) for path in sorted(copy.parent.glob("features-*")))
        raise UserError(
            f"--image.feature_cache: {total / 1e9:.1f} GB of features do not fit in {copy.parent}, "
            f"which has {free / 1e9:.1f} GB free. Remove copies that no job needs (there are: "
            f"{copies or 'none'}), or choose another --image.feature_cache_dir or no cache"
        )
    start = time.perf_counter()

    def fetch(shard: ShardEntry) -> None:
        half = aside / f".{shard['file']}"
        shutil.copyfile(directory / shard["file"], half)
        half.rename(aside / shard["file"])

    try:
        with ThreadPoolExecutor(STREAMS) as pool:
            for _ in _progress(pool.map(fetch, lacking), lacking, total):
                pass
        shutil.copyfile(directory / SHARDS_FILE, aside / SHARDS_FILE)
    except OSError as error:
        if not is_disk_full(error):
            raise
        shutil.rmtree(aside)
        raise UserError(
            f"--image.feature_cache: {copy.parent} was filled up while {total / 1e9:.1f} GB of "
            "features were copied there"
        ) from error
    check_shards(aside, shards)
    aside.rename(copy)
    seconds = time.perf_counter() - start
    log.info("features: %.2f GB copied to %s in %.1f s", total / 1e9, copy, seconds)


def _is_in_memory(directory: Path) -> bool:
    """Whether it lies in a tmpfs."""
    mounts = psutil.disk_partitions(all=True)
    above = [m for m in mounts if directory.resolve().is_relative_to(m.mountpoint)]
    return max(above, key=lambda m: len(m.mountpoint)).fstype == "tmpfs"


def _is_there(directory: Path, shard: ShardEntry) -> bool:
    file = directory / shard["file"]
    return file.is_file() and file.stat().st_size == shard["bytes"]


def _progress(copied: Iterator[None], shards: list[ShardEntry], total: int) -> Iterator[None]:
    done, last = 0, time.monotonic()
    for shard, _ in zip(shards, copied, strict=True):
        done += shard["bytes"]
        if time.monotonic() - last > SAY_EVERY:
            last = time.monotonic()
            log.info("features: %.1f of %.1f GB fetched", done / 1e9, total / 1e9)
        yield
