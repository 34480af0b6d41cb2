"""The mapped arrays against the Parquet files they stand for."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
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


INGEST_ON_A_DISK_THAT_FILLS_UP = """
import os, sys
from pathlib import Path
from acebert.config import settings_from
from acebert.data import ingest
from acebert.errors import UserError

disk, products, log = sys.argv[1:]
write_lookups = ingest.write_lookups

def late(con, out):
    free = os.statvfs(disk)
    with open(Path(disk) / "others", "wb") as file:  # but for the first and last page of a file
        os.posix_fallocate(file.fileno(), 0, (free.f_bavail - 2) * free.f_frsize)
    write_lookups(con, out)

ingest.write_lookups = late
try:
    ingest.ingest(settings_from({"workdir": Path(disk) / "work"}), products, log)
except UserError as error:
    print("USER ERROR", error)
"""


def test_a_disk_that_is_full_when_the_arrays_are_made_is_said(
    tmp_path: Path, small_disk: Path
) -> None:
    ids = [str(i) for i in range(5_000)]
    pq.write_table(pa.table({"product_id": ids, "title": ids}), tmp_path / "products.parquet")
    days = [f"2026-01-0{1 + max(0, i - 4_997)}" for i in range(5_000)]
    clicks = {"query": ids, "product_id": ids, "clicked": [True] * 5_000, "timestamp": days}
    pq.write_table(pa.table(clicks), tmp_path / "log.parquet")
    files = [str(tmp_path / "products.parquet"), str(tmp_path / "log.parquet")]
    done = subprocess.run(
        [sys.executable, "-c", INGEST_ON_A_DISK_THAT_FILLS_UP, str(small_disk), *files],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "USER ERROR ingest: the disk under" in done.stdout, (
        done.returncode,
        done.stderr[-3000:],
    )
    assert not list(small_disk.rglob("*.npy"))
