"""One Ray cluster for the whole session; the real catalogue where it is at hand."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A real two-CPU Ray on this machine, started once."""
    from acebert.cluster import ray  # imported after acebert, which keeps Ray on 127.0.0.1

    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        log_to_driver=True,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def fashion_small() -> Path:
    """2,000 real products with photos and their log (see README, 'Tests')."""
    root = Path(os.environ.get("ACEBERT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / "fashion_small"
    if not path.is_dir():
        pytest.skip(f"the fashion catalogue is not at {root} (set ACEBERT_TEST_DATA)")
    return path
