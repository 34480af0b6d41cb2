"""The stage on a real Ray, over products files made here in ingest's shape."""

import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from acebert import cluster
from acebert.config import Settings, settings_from
from acebert.data import preprocess as module
from acebert.data.features import FeatureStore
from acebert.data.image import BrokenImage, crop_resize, decode, find_roi
from acebert.data.inputs import as_first_seen
from acebert.data.photos import PhotoStorage, Rows
from acebert.data.preprocess import preprocess
from acebert.errors import UserError
from acebert.workdir import Stage

pytestmark = pytest.mark.usefixtures("ray_cluster")

SCHEMA = pa.schema(
    {
        "product": pa.int32(),
        "product_id": pa.string(),
        "title": pa.string(),
        "image": pa.binary(),
        "image_uri": pa.string(),
    }
)


@pytest.fixture
def by_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few photos there are."""
    monkeypatch.setattr(module, "FEW_PHOTOS", -1)


def photo(seed: int, width: int = 80, height: int = 100) -> bytes:
    """A coloured rectangle off the centre of a white photo, as JPEG."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 255, np.uint8)
    x, y = rng.integers(5, 25, 2)
    image[y : y + 50, x : x + 40] = rng.integers(0, 200, (50, 40, 1)) * rng.random(3)
    return cv2.imencode(".jpg", image)[1].tobytes()


def ingested(
    root: Path, photos: list[bytes | None], uris: list[str | None] | None = None, group: int = 1000
) -> Stage:
    (root / "products").mkdir(parents=True)
    n = len(photos)
    columns = {
        "product": range(n),
        "product_id": [f"p{i}" for i in range(n)],
        "title": ["a title"] * n,
        "image": photos,
        "image_uri": uris or [None] * n,
    }
    table = pa.table({k: list(v) for k, v in columns.items()}, schema=SCHEMA)
    pq.write_table(table, root / "products" / "part-00000.parquet", row_group_size=group)
    return Stage("ingest", root, root.name, 0.0, False)


def settings(workdir: Path, **sections: dict[str, Any]) -> Settings:
    image = {"cnn": "resnet18", "cnn_weights": "random", "cnn_side": 128, "pixel_side": 56}
    image |= sections.pop("image", {})
    return settings_from({"workdir": workdir, "image": image, **sections})


@pytest.mark.usefixtures("by_actors")
def test_features_are_those_of_the_photos_and_reused_when_asked_again(tmp_path: Path) -> None:
    from acebert.data.patches import PatchCNN

    photos = [photo(seed) for seed in range(6)]
    options = settings(tmp_path)
    stage = preprocess(options, ingested(tmp_path / "in", photos))
    store = FeatureStore(stage.path)
    rows = np.array([4, 0, 5])
    cnn = PatchCNN("resnet18", "random", 128)
    for row, patches, pixels, box in zip(
        rows, store.patches(rows), store.pixels(rows), store.rois(rows), strict=True
    ):
        image = decode(photos[row], 50)
        roi, found = find_roi(image)
        assert found
        assert tuple(box) == roi
        np.testing.assert_array_equal(pixels, crop_resize(image, roi, 56))
        expected = cnn(crop_resize(image, roi, 128)[None])[0].astype(float)
        assert np.abs(patches - expected).mean() < 0.02 * np.abs(expected).mean()
    report = json.loads((stage.path / "report.json").read_text())
    assert (report["photos"], report["rois_found"], report["broken"]) == (6, 6, 0)
    assert "random" in report["cnn_weights"]
    assert cv2.imread(str(stage.path / "grid.png")) is not None
    again = preprocess(options, ingested(tmp_path / "more" / "in", photos))
    assert again.reused
    assert again.path == stage.path


def test_broken_and_missing_photos_are_counted_listed_and_masked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = photo(0)
    bomb = cv2.imencode(".png", np.zeros((2000, 2000, 3), np.uint8))[1].tobytes()
    photos = [good, None, good[: len(good) // 2], b"no image", bomb, b"", photo(1)]
    options = settings(tmp_path, image={"max_megapixels": 1.0}, data={"max_bad_share": 0.8})
    with caplog.at_level(logging.INFO):
        stage = preprocess(options, ingested(tmp_path / "in", photos))
    report = json.loads((stage.path / "report.json").read_text())
    assert (report["products"], report["photos"], report["missing"]) == (7, 6, 1)
    reasons = {"truncated": 1, "not an image": 1, "too large": 1, "empty": 1}
    assert report["broken_by_reason"] == reasons
    listed = pq.read_table(stage.path / "broken_images.parquet").to_pylist()
    assert {(row["product_id"], row["reason"]) for row in listed} == {
        ("p2", "truncated"),
        ("p3", "not an image"),
        ("p4", "too large"),
        ("p5", "empty"),
    }
    store = FeatureStore(stage.path)
    everything = np.arange(7)
    mask = store.has_image(everything)
    assert mask.tolist() == [True, False, False, False, False, False, True]
    assert not store.patches(everything)[~mask].any()
    assert not store.pixels(everything)[~mask].any()
    assert store.patches(everything)[mask].any(axis=(1, 2)).all()
    assert "4 broken" in caplog.text


@pytest.mark.usefixtures("by_actors")
def test_too_many_broken_photos_stop_the_stage_and_leave_nothing(tmp_path: Path) -> None:
    photos = [photo(0), b"no image", photo(1), b"no image"]
    with pytest.raises(UserError, match=r"2 of 4 photos.*not an image: 2.*p1, p3.*max_bad_share"):
        preprocess(settings(tmp_path / "w"), ingested(tmp_path / "in", photos))
    assert not [path for path in (tmp_path / "w" / "features").iterdir() if path.is_dir()]


def test_actors_and_this_process_make_the_same_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = [photo(0), None, b"no image", *(photo(seed) for seed in range(1, 40))]
    stages = []
    for few in (-1, 1_000):
        monkeypatch.setattr(module, "FEW_PHOTOS", few)
        source = ingested(tmp_path / "in" / str(few), photos, group=9)
        stages.append(preprocess(settings(tmp_path / str(few)), source))
    by_actors, here = (FeatureStore(stage.path) for stage in stages)
    rows = np.arange(len(photos))
    np.testing.assert_array_equal(by_actors.has_image(rows), here.has_image(rows))
    np.testing.assert_array_equal(by_actors.pixels(rows), here.pixels(rows))
    np.testing.assert_allclose(by_actors.patches(rows), here.patches(rows), atol=0.02, rtol=0.02)
    counted = [json.loads((stage.path / "report.json").read_text()) for stage in stages]
    for report in counted:
        del report["images_per_second"]
    assert counted[0] == counted[1]


@pytest.mark.usefixtures("by_actors")
def test_one_run_of_rows_or_many_give_the_same_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = [photo(seed) for seed in range(40)]
    one = FeatureStore(preprocess(settings(tmp_path / "1"), ingested(tmp_path / "a", photos)).path)
    monkeypatch.setattr(module, "MIN_ROWS", 3)
    stage = preprocess(settings(tmp_path / "2"), ingested(tmp_path / "b", photos, group=9))
    many = FeatureStore(stage.path)
    assert len(list(stage.path.glob("part-*.arrow"))) == 9  # 4 row groups of 9 in halves, and 4
    rows = np.arange(40)
    np.testing.assert_array_equal(many.pixels(rows), one.pixels(rows))
    np.testing.assert_array_equal(many.rois(rows), one.rois(rows))
    difference = np.abs(many.patches(rows).astype(float) - one.patches(rows))
    assert difference.mean() < 0.01 * np.abs(one.patches(rows)).mean()  # bf16


def test_jpeg_pixels_are_close_to_raw_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    smooth = [
        cv2.resize(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8), (90, 90)) for _ in "abcd"
    ]
    photos = [cv2.imencode(".png", image)[1].tobytes() for image in smooth] + [None]
    no_cnn = {"patches": False}
    stages = {
        kind: preprocess(
            settings(tmp_path / kind, model=no_cnn, image={"pixel_format": kind, "roi": False}),
            ingested(tmp_path / f"in-{kind}", photos),
        )
        for kind in ("raw", "jpeg")
    }
    rows = np.array([3, 4, 1])
    raw, jpeg = (FeatureStore(stage.path).pixels(rows) for stage in stages.values())
    assert jpeg.dtype == np.uint8
    assert not jpeg[1].any()
    mse = np.mean((raw.astype(float) - jpeg) ** 2)
    assert 10 * np.log10(255**2 / mse) > 30  # PSNR [dB]


def test_only_what_the_model_reads_is_stored_and_keyed(tmp_path: Path) -> None:
    source = ingested(tmp_path / "in", [photo(0), photo(1)])
    patches = preprocess(settings(tmp_path, model={"pixels": False}), source)
    store = FeatureStore(patches.path)
    assert (store.patch_dim, store.pixel_side) == (512, 0)
    other_pixels = settings(tmp_path, model={"pixels": False}, image={"pixel_side": 112})
    assert preprocess(other_pixels, source).reused
    pixels = preprocess(settings(tmp_path, model={"patches": False}), source)
    store = FeatureStore(pixels.path)
    assert (store.patch_dim, store.pixel_side) == (0, 56)
    with open(next(pixels.path.glob("part-*.arrow")), "rb") as file:
        assert "patches" not in ipc.open_file(file).schema.names
    with pytest.raises(ValueError, match="neither patches nor pixels"):
        preprocess(settings(tmp_path, model={"patches": False, "pixels": False}), source)


def test_the_paper_mode_shows_pixels_of_the_whole_photo(tmp_path: Path) -> None:
    data = photo(3)
    options = settings(tmp_path, image={"pixel_source": "photo"})
    store = FeatureStore(preprocess(options, ingested(tmp_path / "in", [data])).path)
    image = decode(data, 50)
    expected = crop_resize(image, (0, 0, image.shape[1], image.shape[0]), 56)
    np.testing.assert_array_equal(store.pixels(np.array([0]))[0], expected)


def test_photos_behind_addresses_are_read_from_the_catalogues_directory_alone(
    tmp_path: Path,
) -> None:
    shop = tmp_path / "shop"
    (shop / "img").mkdir(parents=True)
    (shop / "img" / "a b.jpg").write_bytes(photo(0))
    (tmp_path / "secret.jpg").write_bytes(photo(1))
    (shop / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    uris: list[str | None] = [
        "img/a b.jpg",
        (shop / "img" / "a b.jpg").as_uri(),
        str(shop / "img" / "a b.jpg"),
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        (tmp_path / "secret.jpg").as_uri(),
        "link.jpg",
        "http://127.0.0.1:1/a.jpg",
        "s3://other/a.jpg",
        "img/none.jpg",
        "img",
    ]
    source = ingested(tmp_path / "in", [None] * len(uris), uris)
    data = {
        "products": str(shop / "products.parquet"),
        "impressions": str(shop),
        "max_bad_share": 0.9,
    }
    stage = preprocess(settings(tmp_path, data=data, model={"patches": False}), source)
    assert FeatureStore(stage.path).has_image(np.arange(11)).tolist() == [True] * 3 + [False] * 8
    report = json.loads((stage.path / "report.json").read_text())
    assert report["broken_by_reason"] == {"outside the catalogue": 6, "not found": 2}


def test_a_photo_that_is_replaced_under_its_address_makes_new_features(tmp_path: Path) -> None:
    shop = tmp_path / "shop"
    shop.mkdir()
    uris: list[str | None] = ["a.jpg", None, (shop / "b.jpg").as_uri()]
    for name in ("a.jpg", "b.jpg"):
        (shop / name).write_bytes(photo(0))
    source = ingested(tmp_path / "ingest" / "in", [None] * 3, uris)
    data = {"products": str(shop / "products.parquet"), "impressions": str(shop)}
    options = settings(tmp_path, data=data, model={"patches": False})
    first = preprocess(options, source)
    assert preprocess(options, source).reused
    for name in ("a.jpg", "b.jpg"):
        with as_first_seen():
            preprocess(options, source)
            (shop / name).write_bytes(photo(1))
            assert preprocess(options, source).reused  # in one job
        again = preprocess(options, source)
        assert not again.reused
    before, now = (FeatureStore(stage.path).pixels(np.array([0, 2])) for stage in (first, again))
    assert (before != now).any(axis=(1, 2, 3)).all()
    (shop / "a.jpg").write_bytes(photo(2))
    third = preprocess(options, source)
    assert json.loads((third.path / "report.json").read_text())["photos_as_before"] == 1


@pytest.mark.parametrize("few", [-1, 1_000], ids=["actors", "here"])
def test_another_log_of_the_same_photos_takes_the_features_of_the_stage_that_has_most_of_them(
    few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none that other settings made; what is taken is what would be computed."""
    monkeypatch.setattr(module, "FEW_PHOTOS", few)
    photos = [photo(seed) for seed in range(6)]
    of = {
        name: ingested(tmp_path / "ingest" / name, pictures)
        for name, pictures in {
            "two": photos[:2],
            "five": [*photos[:4], photo(9)],
            "all": photos,
        }.items()
    }
    options = settings(tmp_path, model={"patches": False})
    preprocess(settings(tmp_path, image={"pixel_side": 42}, model={"patches": False}), of["all"])
    reports = {}
    for name in ("five", "two", "all"):
        stage = preprocess(options, of[name])
        reports[name] = json.loads((stage.path / "report.json").read_text())["photos_as_before"]
    assert reports == {"five": 0, "two": 2, "all": 4}
    scratch = preprocess(settings(tmp_path / "w", model={"patches": False}), of["all"])
    assert json.loads((scratch.path / "report.json").read_text())["photos_as_before"] == 0
    rows = np.arange(6)
    taken, computed = (FeatureStore(s.path) for s in (stage, scratch))
    np.testing.assert_array_equal(taken.pixels(rows), computed.pixels(rows))
    np.testing.assert_array_equal(taken.rois(rows), computed.rois(rows))


def test_photos_in_a_bucket_are_said_to_be_known_by_address_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())  # no LocalFileSystem
    monkeypatch.setattr("acebert.data.photos._storage", lambda _: (bucket, "bucket/shop"))
    storage = PhotoStorage("s3://bucket/shop/products.parquet", 10**6)
    rows = ingested(tmp_path / "rows", [photo(0)]).path / "products"
    files = ingested(tmp_path / "files", [None], ["a.jpg"]).path / "products"
    with caplog.at_level(logging.INFO):
        assert storage.fingerprint(rows) is None
        assert not caplog.messages
        assert storage.fingerprint(files) is None
    assert "bucket/shop is not noticed" in caplog.text


@pytest.mark.parametrize(
    "uri",
    ["mock://other/a.jpg", "/etc/passwd", "file:///etc/passwd", "../../other/a.jpg", "a\0.jpg"],
)
def test_a_catalogue_on_the_local_disk_never_opens_what_is_elsewhere(
    uri: str, tmp_path: Path
) -> None:
    storage = PhotoStorage(str(tmp_path / "products.parquet"), max_bytes=1000)
    with pytest.raises(BrokenImage) as error:
        storage.fetch(uri)
    assert error.value.reason == "outside the catalogue"


def test_on_hdfs_only_what_lies_below_the_catalogue_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its paths begin with a slash, and the whole cluster is one tree."""
    for name in ("user/shop/photos", "user/other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jpg").write_bytes(b"photo")
    cluster = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr("acebert.data.photos._storage", lambda _: (cluster, "/user/shop"))
    storage = PhotoStorage("hdfs://node:8020/user/shop/products.parquet", 10**6)
    for uri in ("photos/a.jpg", "hdfs://node:8020/user/shop/photos/a.jpg"):
        assert storage.fetch(uri) == b"photo"
    for uri in ("../other/a.jpg", "/user/other/a.jpg", "hdfs://node:8020/user/other/a.jpg"):
        with pytest.raises(BrokenImage) as error:
            storage.fetch(uri)
        assert error.value.reason == "outside the catalogue"


@pytest.mark.parametrize(
    "uri", ["http://[abc/x.jpg", "file://[x/y.jpg", "http://℀.com/x.jpg", "x" * 5000, "//[", ""]
)
def test_an_address_that_is_none_is_a_broken_photo(uri: str, tmp_path: Path) -> None:
    with pytest.raises(BrokenImage):
        PhotoStorage(str(tmp_path / "products.parquet"), max_bytes=1000).fetch(uri)


def test_a_file_larger_than_any_photo_may_be_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x" * 1001)
    with pytest.raises(BrokenImage) as error:
        PhotoStorage(str(tmp_path), max_bytes=1000).fetch("a.jpg")
    assert error.value.reason == "too large"


def test_runs_cover_every_row_once_within_their_row_groups(tmp_path: Path) -> None:
    source = ingested(tmp_path / "in", [None] * 1234, group=500)
    spec = module.crop_spec(settings(tmp_path))
    for workers in (1, 2, 64):
        runs = module.plan_runs(source.path / "products", spec, workers)
        seen = [
            500 * run.row_group + row
            for run in runs
            for row in range(run.start, run.start + run.count)
        ]
        assert seen == list(range(1234))
        assert max(run.count for run in runs) * spec.row_bytes <= module.MAX_BYTES


FULL_DISK = """
from pathlib import Path
from acebert.config import settings_from
from acebert.data import preprocess as module
from acebert.data.preprocess import preprocess
from acebert.errors import UserError
from acebert.workdir import Stage
import ray  # after acebert, which keeps it on 127.0.0.1
module.FEW_PHOTOS = -1
ray.init(address="local", num_cpus=2, num_gpus={gpus}, object_store_memory=200 * 2**20,
         include_dashboard=False)
image = {{"cnn": "resnet18", "cnn_weights": "random", "cnn_side": 128, "pixel_side": 224}}
settings = settings_from({{"workdir": {workdir!r}, "image": image}})
try:
    stage = preprocess(settings, Stage("ingest", Path({source!r}), "x", 0.0, False))
    print("DONE", stage.path)
except UserError as error:
    print("USER ERROR", error)
"""


def run_alone(tmp_path: Path, source: Stage, workdir: Path, gpus: int = 0) -> str:
    """The stage in a process and on a Ray of its own; what it printed."""
    script = tmp_path / "alone.py"
    script.write_text(
        textwrap.dedent(FULL_DISK.format(workdir=str(workdir), source=str(source.path), gpus=gpus))
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    return done.stdout + done.stderr[-3000:]


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs privileges")
    try:
        source = ingested(tmp_path / "in", [photo(seed) for seed in range(30)])
        said = run_alone(tmp_path, source, disk)
        left = [path for path in disk.rglob("*") if path.suffix == ".arrow"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "USER ERROR features: the disk under" in said
    assert not left


@pytest.mark.slow
def test_a_cluster_with_gpus_decodes_in_tasks_and_gives_the_same_features(tmp_path: Path) -> None:
    """Ray is told of a GPU that torch does not see: the route is the GPU's, the CNN on the CPU."""
    photos = [photo(seed) for seed in range(30)] + [None]
    source = ingested(tmp_path / "in", photos, group=10)
    said = run_alone(tmp_path, source, tmp_path / "gpu", gpus=1)
    assert "DONE" in said, said
    path = Path(said.split("DONE ")[1].split("\n")[0])
    here = preprocess(settings(tmp_path / "cpu", image={"pixel_side": 224}), source)
    ours, theirs = FeatureStore(here.path), FeatureStore(path)
    rows = np.arange(31)
    np.testing.assert_array_equal(theirs.has_image(rows), ours.has_image(rows))
    np.testing.assert_array_equal(theirs.pixels(rows), ours.pixels(rows))
    difference = np.abs(theirs.patches(rows).astype(float) - ours.patches(rows))
    assert difference.mean() < 0.01 * np.abs(ours.patches(rows)).mean()


@pytest.mark.slow
def test_the_real_catalogue_goes_through(tmp_path: Path, fashion_small: Path) -> None:
    table = pq.read_table(fashion_small / "products.parquet").slice(0, 400)
    images = table["image"].to_pylist()
    stage = preprocess(settings(tmp_path), ingested(tmp_path / "in", images))
    report = json.loads((stage.path / "report.json").read_text())
    assert report["missing"] == sum(image is None for image in images)
    assert report["rois_found"] >= 0.95 * report["photos"]
    assert report["clipped_to_fp16"] == 0


def test_rows_of_a_photo_storage_come_in_order(tmp_path: Path) -> None:
    photos = [photo(0), None, b"x"]
    source = ingested(tmp_path / "in", photos)
    path = str(source.path / "products" / "part-00000.parquet")
    read = list(PhotoStorage(None, 10**6).read(Rows(path, 0, 1, 2)))
    assert [(p.product, p.product_id, p.data) for p in read] == [(1, "p1", None), (2, "p2", b"x")]


@pytest.mark.usefixtures("by_actors")
def test_a_cluster_that_grows_on_demand_is_asked_for_the_trainings_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(cluster, "request_resources", lambda bundles: asked.append(bundles))
    stage = ingested(tmp_path / "in", [photo(i) for i in range(3)])
    train = {"wait_minutes": 0.01, "num_workers": 2, "cpus_per_worker": 30}
    made = preprocess(settings(tmp_path / "out", train=train), stage)
    assert asked == [[{"CPU": 30.0}] * 2, []]
    assert json.loads((made.path / "report.json").read_text())["products"] == 3
