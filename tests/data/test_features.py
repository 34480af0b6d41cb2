"""The store against plain arrays in memory."""

import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from acebert.data.features import FeatureStore, Shard, write_shard, write_shard_list
from acebert.errors import UserError

N, D1, S = 50, 24, 14


@pytest.fixture
def truth() -> Shard:
    rng = np.random.default_rng(0)
    has_image = rng.random(N) < 0.8
    mask = has_image[:, None]
    return Shard(
        product=np.arange(N, dtype=np.int32),
        has_image=has_image,
        roi=rng.integers(0, 99, (N, 4)).astype(np.int32) * mask,
        patches=rng.normal(size=(N, 16, D1)).astype(np.float16) * mask[:, :, None],
        pixels=rng.integers(0, 256, (N, S, S, 3)).astype(np.uint8) * mask[:, :, None, None],
    )


def write(truth: Shard, out: Path, n_shards: int = 7) -> None:
    """Shards of unequal sizes, written in an arbitrary order, as tasks finish."""
    rng = np.random.default_rng(1)
    cuts = np.sort(np.random.default_rng(2).choice(np.arange(1, N), n_shards - 1, replace=False))
    entries = []
    parts = np.split(np.arange(N), cuts)
    for number in rng.permutation(n_shards):
        rows = parts[number]
        assert truth.patches is not None
        assert isinstance(truth.pixels, np.ndarray)
        part = Shard(
            truth.product[rows],
            truth.has_image[rows],
            truth.roi[rows],
            truth.patches[rows],
            truth.pixels[rows],
        )
        entries.append(write_shard(out, f"part-{number}.arrow", part))
    write_shard_list(out, entries, patch_dim=D1, pixel_side=S)


def test_gathers_equal_plain_indexing_in_any_order_with_repeats(
    truth: Shard, tmp_path: Path
) -> None:
    write(truth, tmp_path)
    store = FeatureStore(tmp_path)
    assert (store.n_products, store.patch_dim, store.pixel_side) == (N, D1, S)
    rng = np.random.default_rng(3)
    for size in (1, 8, 200):
        rows = rng.integers(0, N, size)
        np.testing.assert_array_equal(store.has_image(rows), truth.has_image[rows])
        np.testing.assert_array_equal(store.rois(rows), truth.roi[rows])
        np.testing.assert_array_equal(store.patches(rows), truth.patches[rows])  # type: ignore[index]
        np.testing.assert_array_equal(store.pixels(rows), truth.pixels[rows])  # type: ignore[index]


def test_an_empty_gather_has_the_right_shape(truth: Shard, tmp_path: Path) -> None:
    write(truth, tmp_path)
    store = FeatureStore(tmp_path)
    none = np.array([], np.int64)
    assert store.patches(none).shape == (0, 16, D1)
    assert store.pixels(none).shape == (0, S, S, 3)


def test_shards_are_views_of_the_mapped_file(truth: Shard, tmp_path: Path) -> None:
    write(truth, tmp_path, n_shards=1)
    store = FeatureStore(tmp_path)
    view = store._columns(0)["patches"]
    assert not view.flags.writeable
    assert not view.flags.owndata
    lo = view.__array_interface__["data"][0]
    ranges = [
        [int(x, 16) for x in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "part-0.arrow" in line
    ]
    assert any(start <= lo and lo + view.nbytes <= end for start, end in ranges)


def test_opening_takes_no_memory_for_features(tmp_path: Path) -> None:
    n = 2000
    part = Shard(
        np.arange(n, dtype=np.int32),
        np.ones(n, bool),
        np.zeros((n, 4), np.int32),
        np.ones((n, 16, 2048), np.float16),
        None,
    )
    entry = write_shard(tmp_path, "part-0.arrow", part)
    write_shard_list(tmp_path, [entry], patch_dim=2048, pixel_side=0)

    def anonymous() -> int:  # kB
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])

    del part
    before = anonymous()
    store = FeatureStore(tmp_path)
    for start in range(0, n, 100):
        store.patches(np.arange(start, start + 100))
    assert entry["bytes"] > 128e6
    assert anonymous() - before < 20_000


@pytest.mark.slow
def test_a_batch_of_384_takes_milliseconds(tmp_path: Path) -> None:
    entries = []
    for number in range(20):
        product = np.arange(number * 500, (number + 1) * 500, dtype=np.int32)
        entries.append(
            write_shard(
                tmp_path,
                f"part-{number:02d}.arrow",
                Shard(
                    product,
                    np.ones(500, bool),
                    np.zeros((500, 4), np.int32),
                    np.ones((500, 16, 512), np.float16),
                    np.ones((500, 112, 112, 3), np.uint8),
                ),
            )
        )
    write_shard_list(tmp_path, entries, patch_dim=512, pixel_side=112)
    store = FeatureStore(tmp_path)
    rng = np.random.default_rng(0)
    best = np.inf
    for _ in range(10):
        rows = rng.integers(0, store.n_products, 384)
        start = time.perf_counter()
        store.patches(rows), store.pixels(rows)
        best = min(best, time.perf_counter() - start)
    assert best < 0.05


def test_a_truncated_shard_is_named(truth: Shard, tmp_path: Path) -> None:
    write(truth, tmp_path)
    path = tmp_path / "part-3.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"part-3\.arrow.*bytes"):
        FeatureStore(tmp_path)


def test_a_shard_of_other_bytes_is_named(truth: Shard, tmp_path: Path) -> None:
    write(truth, tmp_path)
    path = tmp_path / "part-3.arrow"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(UserError, match=r"part-3\.arrow: not a whole shard"):
        FeatureStore(tmp_path).rois(np.arange(N))


def test_a_missing_shard_is_named(truth: Shard, tmp_path: Path) -> None:
    write(truth, tmp_path)
    (tmp_path / "part-2.arrow").unlink()
    with pytest.raises(UserError, match=r"part-2\.arrow: missing"):
        FeatureStore(tmp_path)


def test_a_product_that_no_shard_has_is_named(truth: Shard, tmp_path: Path) -> None:
    write(truth, tmp_path)
    listed = tmp_path / "shards.json"
    contents = json.loads(listed.read_text())
    lost = contents["shards"].pop(2)
    listed.write_text(json.dumps(contents))
    with pytest.raises(UserError, match=f"no shard has product {lost['first']}"):
        FeatureStore(tmp_path)


def test_a_store_keeps_nothing_a_product(tmp_path: Path) -> None:
    """What it holds is the list of shards, at 100 products and at 1,000,000 in as many shards."""

    def held(rows: int) -> int:
        directory = tmp_path / str(rows)
        directory.mkdir()
        entries = []
        for number in range(4):
            product = np.arange(number * rows, (number + 1) * rows, dtype=np.int32)
            shard = Shard(product, np.ones(rows, bool), np.zeros((rows, 4), np.int32), None, None)
            entries.append(write_shard(directory, f"part-{number}.arrow", shard))
        write_shard_list(directory, entries, patch_dim=0, pixel_side=0)
        tracemalloc.start()
        store = FeatureStore(directory)
        assert store.has_image(np.arange(0, 4 * rows, 4 * rows // 10)).all()  # all shards
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size

    held(10)  # imports and caches of the first use
    assert held(250_000) < held(25) + 10_000


def test_a_directory_without_features_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image features"):
        FeatureStore(tmp_path)


def test_what_is_not_stored_cannot_be_asked_for(truth: Shard, tmp_path: Path) -> None:
    truth.pixels = None
    entry = write_shard(tmp_path, "part-0.arrow", truth)
    write_shard_list(tmp_path, [entry], patch_dim=D1, pixel_side=0)
    store = FeatureStore(tmp_path)
    assert store.pixel_side == 0
    with pytest.raises(UserError, match="no pixels stored"):
        store.pixels(np.arange(3))
