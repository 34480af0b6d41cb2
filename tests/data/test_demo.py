"""The demo catalogue: the schema users bring, the same bytes again, and clicks worth learning."""

import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acebert.config import DemoSettings, Settings, settings_from
from acebert.data.demo import build_demo
from acebert.data.demo_catalogue import BRANDS, KINDS, LINES, catalogue
from acebert.data.demo_log import NOISE, engine, impressions, liking
from acebert.data.demo_pictures import COLOURS
from acebert.data.image import BrokenImage, decode

SMALL = {"products": 1100, "searches_per_day": 1500, "days": 4, "image_side": 64}


def settings_for(workdir: Path, **demo: int) -> Settings:
    return settings_from({"workdir": str(workdir), "demo": SMALL | demo})


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.parquet"))
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(settings_for(tmp_path_factory.mktemp("demo")), processes=1).path


@pytest.fixture(scope="module")
def rows(demo: Path) -> list[dict[str, Any]]:
    return pq.read_table(demo / "products.parquet").to_pylist()


@pytest.fixture(scope="module")
def log(demo: Path) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.sql(f"CREATE VIEW i AS SELECT * FROM '{demo}/impressions/*.parquet'")
    connection.sql(f"CREATE VIEW p AS SELECT * FROM '{demo}/products.parquet'")
    return connection


def test_the_same_settings_give_the_same_bytes_on_one_process_and_on_two(
    demo: Path, tmp_path: Path
) -> None:
    again = build_demo(settings_for(tmp_path), processes=2)
    assert not again.reused
    assert digests(again.path) == digests(demo)


def test_another_seed_gives_another_catalogue_and_log(demo: Path, tmp_path: Path) -> None:
    other = digests(build_demo(settings_for(tmp_path, seed=1), processes=1).path)
    assert all(other[name] != digest for name, digest in digests(demo).items())


def test_it_is_built_once(demo: Path) -> None:
    workdir = demo.parents[1]
    assert build_demo(settings_for(workdir)).reused


def test_files_have_the_columns_of_the_input_schema(demo: Path) -> None:
    products = pq.read_schema(demo / "products.parquet")
    assert dict(zip(products.names, products.types, strict=True)) == {
        "product_id": pa.string(),
        "title": pa.string(),
        "category": pa.string(),
        "category_path": pa.string(),
        "price": pa.float32(),
        "listed_at": pa.timestamp("ms"),
        "image": pa.binary(),
    }
    names = [path.name for path in sorted((demo / "impressions").iterdir())]
    assert names == [f"2026-01-{day:02d}.parquet" for day in range(1, 5)]
    shown = pq.read_schema(demo / "impressions" / names[0])
    assert dict(zip(shown.names, shown.types, strict=True)) == {
        "search_id": pa.string(),
        "user_id": pa.string(),
        "timestamp": pa.timestamp("ms"),
        "query": pa.dictionary(pa.int32(), pa.string()),
        "product_id": pa.string(),
        "position": pa.int8(),
        "clicked": pa.bool_(),
        "purchased": pa.bool_(),
    }
    assert pq.read_schema(demo / "boxes.parquet").names == ["product_id", "x0", "y0", "x1", "y1"]


def test_each_photo_has_its_box_within_it(demo: Path, rows: list[dict[str, Any]]) -> None:
    boxes = {row["product_id"]: row for row in pq.read_table(demo / "boxes.parquet").to_pylist()}
    assert set(boxes) == {row["product_id"] for row in rows if row["image"] is not None}
    sizes = set()
    for row in rows[:300]:
        try:
            image = decode(row["image"] or b"", 1)
        except BrokenImage:
            continue
        box = boxes[row["product_id"]]
        assert 0 <= box["x0"] < box["x1"] <= image.shape[1]
        assert 0 <= box["y0"] < box["y1"] <= image.shape[0]
        sizes.add(image.shape)
    assert sizes == {(64, 64, 3), (64, 48, 3)}


def test_the_catalogue_has_the_faults_that_real_ones_have(rows: list[dict[str, Any]]) -> None:
    missing = sum(row["image"] is None for row in rows)
    reasons = []
    for row in rows:
        if row["image"] is not None:
            try:
                decode(row["image"], 1)
            except BrokenImage as error:
                reasons.append(error.reason)
    assert 0 < missing < 0.05 * len(rows)
    assert len(reasons) == 2  # one in 500
    assert set(reasons) <= {"truncated", "not an image"}
    assert 0 < sum(row["category"] is None for row in rows) < 0.06 * len(rows)
    assert 0 < sum(row["title"] == "" for row in rows) < 0.03 * len(rows)
    assert len({row["product_id"] for row in rows}) == len(rows)


def test_half_of_the_titles_do_not_say_the_colour(rows: list[dict[str, Any]]) -> None:
    words = {colour.capitalize() for colour in COLOURS}
    said = np.mean([bool(words & set(row["title"].split())) for row in rows])
    assert 0.44 < said < 0.56


def test_a_title_says_nothing_but_the_merchants_words(rows: list[dict[str, Any]]) -> None:
    known = {word for kind in KINDS.values() for name in kind.title_words for word in name.split()}
    known |= set(BRANDS) | set(LINES) | {word.capitalize() for word in COLOURS}
    known |= {"Striped", "Checked", "Dotted"}
    assert {word for row in rows for word in row["title"].split()} <= known


def test_the_colour_that_a_title_says_is_in_the_photo(
    demo: Path, rows: list[dict[str, Any]]
) -> None:
    """Of two titled colours, the photos' median pixels in the box are nearer to their own."""
    boxes = {row["product_id"]: row for row in pq.read_table(demo / "boxes.parquet").to_pylist()}
    right = []
    for row in rows:
        said = [c for c in ("red", "blue", "yellow", "green") if c.capitalize() in row["title"]]
        if not said or row["category"] not in ("Shirt", "Mug", "Bag", "Trousers"):
            continue
        try:
            image = decode(row["image"] or b"", 1)
        except BrokenImage:
            continue
        box = boxes[row["product_id"]]
        pixels = image[box["y0"] : box["y1"], box["x0"] : box["x1"]].reshape(-1, 3).astype(int)
        vivid = pixels[np.ptp(pixels, axis=1) > 60]
        distance = {
            colour: np.linalg.norm(np.median(vivid, axis=0) - COLOURS[colour])
            for colour in ("red", "blue", "yellow", "green")
        }
        right.append(min(distance, key=lambda name: distance[name]) == said[0])
    assert len(right) > 30
    assert np.mean(right) > 0.9


def test_every_day_has_its_searches_within_it(log: duckdb.DuckDBPyConnection) -> None:
    days = log.sql(
        "SELECT CAST(left(search_id, 10) AS DATE) d, count(DISTINCT search_id), "
        "bool_and(CAST(timestamp AS DATE) = CAST(left(search_id, 10) AS DATE)) "
        "FROM i GROUP BY d ORDER BY d"
    ).fetchall()
    assert [str(row[0]) for row in days] == [f"2026-01-{day:02d}" for day in range(1, 5)]
    assert all(count == 1500 and within for _, count, within in days)


def test_a_search_shows_up_to_sixteen_products_each_once_from_the_first_position_on(
    log: duckdb.DuckDBPyConnection,
) -> None:
    wrong = log.sql(
        "SELECT search_id FROM i GROUP BY search_id HAVING count(*) > 16 "
        "OR count(DISTINCT product_id) < count(*) OR min(position) <> 1 "
        "OR max(position) <> count(*) OR count(DISTINCT query) > 1 OR count(DISTINCT user_id) > 1"
    ).fetchall()
    assert wrong == []


def test_nothing_is_shown_before_it_is_listed_and_new_products_are(
    log: duckdb.DuckDBPyConnection,
) -> None:
    early, new = log.sql(
        "SELECT count(*) FILTER (timestamp < listed_at), "
        "count(DISTINCT product_id) FILTER (listed_at >= '2026-01-03') "
        "FROM i JOIN p USING (product_id)"
    ).fetchall()[0]
    assert early == 0
    assert new > 10


def test_clicks_fall_with_the_position_also_among_equally_good_products() -> None:
    """Per position, clicks over the sum of liking is P(look): the product cancels out."""
    settings = DemoSettings(searches_per_day=8000)
    looks = _looks(settings)
    assert looks[0] > 1.25 * looks[1] > 1.25 * looks[5]
    np.testing.assert_allclose(looks[:8], np.arange(1, 9) ** -0.5, rtol=0.12)


def _looks(settings: DemoSettings) -> np.ndarray:
    cat = catalogue(settings)
    table = impressions(settings, 2, 0).to_pydict()
    clicks, likings = np.zeros(16), np.zeros(16)
    words = {word: i for i, kind in enumerate(KINDS.values()) for word in kind.query_words}
    for i, query in enumerate(table["query"]):
        if query in words and table["user_id"][i] != "robot":  # a type is asked, nothing else
            asked = np.array([[words[query], -1, -1, -1]])
            like = liking(cat, asked, np.array([[int(table["product_id"][i][1:])]]))[0, 0]
            clicks[table["position"][i] - 1] += table["clicked"][i]
            likings[table["position"][i] - 1] += like + NOISE
    return clicks / likings


def test_shoppers_click_the_colour_they_asked_for_also_where_no_title_says_it(
    log: duckdb.DuckDBPyConnection,
) -> None:
    cat = catalogue(DemoSettings(**SMALL))
    names = list(COLOURS)
    ctr: dict[bool, list[bool]] = {True: [], False: []}
    for query, product, clicked in log.sql(
        "SELECT query, product_id, clicked FROM i WHERE user_id <> 'robot'"
    ).fetchall():
        asked = [colour for colour in names if colour in query.split()]
        row = int(product[1:])
        if asked and not cat.says_colour[row]:
            ctr[names[cat.colour[row]] == asked[0]].append(clicked)
    assert np.mean(ctr[True]) > 5 * np.mean(ctr[False])


def test_every_day_brings_queries_that_were_never_seen(log: duckdb.DuckDBPyConnection) -> None:
    shares = log.sql(
        "WITH first AS (SELECT query, min(left(search_id, 10)) d FROM i GROUP BY query) "
        "SELECT count(DISTINCT search_id) FILTER (left(search_id, 10) = d) "
        "/ count(DISTINCT search_id) FROM i JOIN first USING (query) "
        "GROUP BY left(search_id, 10) ORDER BY left(search_id, 10)"
    ).fetchall()
    assert shares[0][0] == 1
    assert all(0.03 < share < 0.6 for (share,) in shares[1:])


def test_a_few_searches_dominate(log: duckdb.DuckDBPyConnection) -> None:
    counts = log.sql(
        "SELECT count(DISTINCT search_id) n FROM i GROUP BY query ORDER BY n DESC"
    ).fetchnumpy()["n"]
    assert counts[: len(counts) // 10].sum() > 0.4 * counts.sum()
    assert (counts == 1).sum() > 0.2 * len(counts)


def test_there_is_a_robot_to_filter_and_only_one(log: duckdb.DuckDBPyConnection) -> None:
    busy = log.sql(
        "SELECT DISTINCT user_id FROM i WHERE clicked "
        "GROUP BY user_id, time_bucket(INTERVAL 1 MINUTE, timestamp) HAVING count(*) > 30"
    ).fetchall()
    assert busy == [("robot",)]


@pytest.mark.parametrize("products", [20, 21])
def test_the_smallest_demo_works(tmp_path: Path, products: int) -> None:
    settings = settings_for(tmp_path, products=products, searches_per_day=1, days=3, image_side=32)
    stage = build_demo(settings)
    assert pq.read_metadata(stage.path / "products.parquet").num_rows == products
    assert len(list((stage.path / "impressions").iterdir())) == 3


def test_the_engine_never_makes_an_array_as_large_as_the_catalogue() -> None:
    """What a block of searches allocates, once a day's lists are there."""
    peaks = []
    for products in (2_000, 400_000):
        settings = DemoSettings(products=products, searches_per_day=300)
        engine(settings, 0)
        tracemalloc.start()
        impressions(settings, 0, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
