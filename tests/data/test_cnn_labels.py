"""Labels of a small catalogue that goes through the real ingest; photos are shards made here."""

import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acebert.config import Settings, settings_from
from acebert.data.cnn_labels import PhotoLabels, label_photos, words_of
from acebert.data.features import Shard, write_shard, write_shard_list
from acebert.data.held_out import held_out, title_hashes
from acebert.data.ingest import ingest
from acebert.errors import UserError
from acebert.workdir import Stage

N = 40
DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")  # train, valid, test


def title(i: int) -> str:
    return f"{'Red' if i % 2 else 'Blue'} {'shirt' if i < 20 else 'shoe'} No. {i}"


def clicks() -> list[tuple[str, int, str]]:
    """Day, product and query of each click."""
    rows = [(DAYS[0], i, "cotton") for i in range(10) for _ in range(3)]
    rows += [(DAYS[0], i, "red cotton") for i in range(10)]
    rows += [(DAYS[0], 10, "silk")] * 2
    rows += [(DAYS[1], i, "plantedvalid") for i in range(N)]
    rows += [(DAYS[2], i, "plantedtest") for i in range(N)]
    return rows


def write_log(root: Path) -> tuple[str, str]:
    products = {
        "product_id": [f"p{i}" for i in range(N)],
        "title": [*map(title, range(N - 2)), "", ""],
        "category": ["shirts"] * 20 + ["shoes"] * (N - 21) + [None],
    }
    pq.write_table(pa.table(products), root / "products.parquet")
    rows = [
        {"query": q, "product_id": f"p{p}", "clicked": True, "timestamp": f"{d}T12:{n % 60:02}:00"}
        for n, (d, p, q) in enumerate(clicks())
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "impressions.parquet")
    return str(root / "products.parquet"), str(root / "impressions.parquet")


def crops(root: Path, pictures: list[int | None]) -> Stage:
    """A features stage with a plain JPEG a product, its colour by number; None: no photo."""
    root.mkdir()
    jpegs = [
        b""
        if k is None
        else cv2.imencode(".jpg", np.full((8, 8, 3), [k % 256, k // 256, 9], np.uint8))[1].tobytes()
        for k in pictures
    ]
    n = len(pictures)
    shard = Shard(
        np.arange(n, dtype=np.int32),
        np.array([k is not None for k in pictures]),
        np.zeros((n, 4), np.int32),
        None,
        jpegs,
    )
    write_shard_list(root, [write_shard(root, "part-0.arrow", shard)], 0, 8)
    return Stage("features", root, root.name, 0.0, False)


def options(workdir: Path, **cnn: object) -> Settings:
    small = {"tag_products": 2, "held_out": 0.3} | cnn
    return settings_from({"workdir": workdir, "cnn": small})


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    root = tmp_path_factory.mktemp("log")
    settings = settings_from(
        {
            "workdir": root / "work",
            "data": {"robot_same_click": 1000, "robot_clicks_per_minute": 1000},
        }
    )
    return ingest(settings, *write_log(root))


@pytest.fixture(scope="module")
def labels(ingested: Stage, tmp_path_factory: pytest.TempPathFactory) -> PhotoLabels:
    root = tmp_path_factory.mktemp("labels")
    return PhotoLabels(label_photos(options(root), ingested, crops(root / "c", [*range(N)])).path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "Nike Men's Blue T-Shirt, 2 for the Price of 1",
            ["nike", "men", "blue", "shirt", "price"],
        ),
        ("Kleid KLEID ｋｌｅｉｄ", ["kleid"]),
        ("红色连衣裙 夏", list("红色连衣裙夏")),
        ("36W x 32L a 5", []),
    ],
)
def test_words_are_those_that_tell_something(text: str, words: list[str]):
    assert words_of(text) == words


def test_titles_words_are_certain_and_clicked_ones_the_surer_the_more_clicks(labels: PhotoLabels):
    targets = labels.tag_targets(np.arange(N))
    of = {word: targets[:, i] for i, word in enumerate(labels.tags)}
    for i in range(N - 2):
        assert of["red"][i] == (1 if i % 2 else (1 / 2 if i < 10 else 0))  # one click's query
        assert of["shirt"][i] == (i < 20)
        assert of["cotton"][i] == pytest.approx(4 / 5 if i < 10 else 0)
    assert not targets[N - 2 :].any()
    assert "silk" not in of  # names one product
    np.testing.assert_array_equal(
        labels.named_in_title(np.array([0, 1]))[:, labels.tags.index("red")], [False, True]
    )


def test_words_of_validation_and_test_days_stay_out(labels: PhotoLabels, ingested: Stage):
    everything = pq.read_table(ingested.path / "queries.parquet")["text"].to_pylist()
    assert {"plantedvalid", "plantedtest", "cotton"} <= set(everything)
    assert "cotton" in labels.tags
    assert not {"plantedvalid", "plantedtest"} & set(labels.tags)


def test_tags_are_the_most_frequent_words_and_their_counts(
    ingested: Stage, labels: PhotoLabels, tmp_path: Path
):
    counted = (labels.tag_targets(np.arange(N)) > 0).sum(0)
    np.testing.assert_array_equal(labels.tag_products, counted)
    assert (np.diff(counted) <= 0).all()
    few = PhotoLabels(
        label_photos(options(tmp_path, tags=3), ingested, crops(tmp_path / "c", [*range(N)])).path
    )
    assert few.tags == labels.tags[:3]
    assert labels.words_per_product() == pytest.approx(
        labels.tag_targets(np.arange(N)).sum() / (N - 2)
    )


def test_categories_are_those_of_the_catalogue(labels: PhotoLabels):
    assert labels.categories == ["shirts", "shoes"]
    assert labels.category.tolist() == [0] * 20 + [1] * (N - 21) + [-1]


def test_titles_that_pre_training_holds_out_train_no_cnn(ingested: Stage, tmp_path: Path):
    values = options(tmp_path).model_dump() | {"pretrain": {"held_out": 0.3}}
    settings = settings_from(values)
    stage = label_photos(settings, ingested, crops(tmp_path / "c", [*range(N)]))
    unread = held_out(title_hashes(ingested.path), 0.3)
    labels = PhotoLabels(stage.path)
    assert 4 < unread.sum() < 20
    assert not unread[labels.train].any()
    assert len(labels.train) > 10
    assert len(set(labels.train) | set(labels.held_out) | set(np.flatnonzero(unread))) >= N - 1


def test_equal_photos_are_on_one_side_and_no_photo_or_label_on_none(
    ingested: Stage, tmp_path: Path
):
    pictures: list[int | None] = [i // 2 for i in range(N)]
    pictures[6] = None
    stage = label_photos(options(tmp_path, held_out=0.4), ingested, crops(tmp_path / "c", pictures))
    labels = PhotoLabels(stage.path)
    train, held_out = set(labels.train.tolist()), set(labels.held_out.tolist())
    assert train | held_out == set(range(N)) - {6, N - 1}  # the last has neither category nor word
    assert not train & held_out
    for i in range(0, N - 2, 2):
        if i != 6:
            assert (i in held_out) == (i + 1 in held_out)
    report = json.loads((stage.path / "report.json").read_text())
    assert (report["train"], report["held_out"]) == (len(train), len(held_out))


def test_about_the_share_asked_for_is_held_out_and_the_same_photos_always(
    ingested: Stage, tmp_path: Path
):
    from acebert.data.cnn_labels import _photos

    many = crops(tmp_path / "many", [*range(2000)])
    has_photo, drawn = _photos(many.path, 2000)
    assert has_photo.all()
    assert np.mean(drawn < 0.3) == pytest.approx(0.3, abs=0.04)
    np.testing.assert_array_equal(_photos(many.path, 2000)[1], drawn)


@pytest.mark.parametrize(
    ("cnn", "pictures", "words"),
    [
        ({"held_out": 1e-9}, [*range(N)], r"0 of them held out by --cnn\.held_out"),
        ({}, [None] * N, "0 products have a photo"),
    ],
)
def test_too_few_photos_are_refused(
    ingested: Stage, tmp_path: Path, cnn: dict, pictures: list, words: str
):
    with pytest.raises(UserError, match=words):
        label_photos(options(tmp_path, **cnn), ingested, crops(tmp_path / "c", pictures))
    assert not list((tmp_path / "cnn_labels").glob("*/stage.json"))


def test_a_catalogue_without_categories_and_words_is_refused(tmp_path: Path):
    products, log = write_log(tmp_path)
    table = pq.read_table(products).drop_columns("category")
    pq.write_table(table, products)
    settings = options(tmp_path / "w", tags=0)
    bare = ingest(settings, products, log)
    with pytest.raises(UserError, match=r"nothing to train the patch CNN on.*--cnn\.tags"):
        label_photos(settings, bare, crops(tmp_path / "c", [*range(N)]))
