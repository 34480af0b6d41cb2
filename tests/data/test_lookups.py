"""The mapped arrays against the Parquet files they stand for."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from acebert.config import settings_from
from acebert.data.demo import build_demo
from acebert.data.ingest import ingest
from acebert.data.lookups import Lookups


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demo = {"products": 60, "searches_per_day": 200, "days": 4, "image_side": 32}
    settings = settings_from({"workdir": tmp_path_factory.mktemp("work"), "demo": demo})
    made = build_demo(settings, processes=1)
    products, log = str(made.path / "products.parquet"), str(made.path / "impressions")
    return ingest(settings, products, log).path


def test_hot_lists_by_pair_and_by_product_are_the_tables(path: Path) -> None:
    lookups = Lookups.open(path)
    pairs = pq.read_table(path / "pairs.parquet")
    of_products = pq.read_table(path / "product_hot_lists.parquet")
    assert np.array_equal(lookups.pair_hot_list, pairs["hot_list"])
    assert np.array_equal(lookups.product_hot_lists[:, 0], of_products["train"])
    assert np.array_equal(lookups.product_hot_lists[:, 1], of_products["test"])


def test_every_hot_list_has_its_queries_in_their_order(path: Path) -> None:
    lists = pq.read_table(path / "hot_lists.parquet")["queries"].to_pylist()
    lookups = Lookups.open(path)
    assert len(lookups.hot_lists) == len(lists)
    assert [lookups.hot_lists[row].tolist() for row in range(len(lists))] == lists
    assert max(map(len, lists)) > 1


def test_clicked_products_and_counts_are_those_of_the_pairs(path: Path) -> None:
    pairs = pq.read_table(path / "pairs.parquet").to_pandas()
    lookups = Lookups.open(path)
    clicked = pairs.groupby("query")["product"].agg(lambda products: sorted(set(products)))
    queries = pq.read_metadata(path / "queries.parquet").num_rows
    assert len(lookups.clicked) == queries > len(clicked)
    for query in range(queries):
        assert lookups.clicked[query].tolist() == clicked.get(query, [])
    counts = pairs["product"].value_counts()
    assert lookups.product_pairs.tolist() == [
        counts.get(product, 0) for product in range(len(lookups.product_pairs))
    ]
