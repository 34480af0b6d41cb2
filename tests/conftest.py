"""One Ray cluster for the whole session; the real catalogue where it is at hand."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the products of tests are too small to be shared
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_ADDRESS"] = "local"  # what a test starts joins no other Ray of the machine


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A real two-CPU Ray on this machine, started once."""
    from acebert.cluster import ray  # imported after acebert, which keeps Ray on 127.0.0.1

    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=300 * 2**20,
        include_dashboard=True,  # Ray Train asks it whether a killed trial's controller lives
        log_to_driver=True,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def two_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[list[dict[str, "Tensor"]]]:
    """What the module's `one_rank(case, rank)` returns on each of two gloo ranks, [case][rank]."""
    return _of_ranks(2, request.module, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def three_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[list[dict[str, "Tensor"]]]:
    """The same of three."""
    return _of_ranks(3, request.module, tmp_path_factory.mktemp("ranks"))


def _of_ranks(world: int, module: ModuleType, directory: Path) -> list[list[dict[str, "Tensor"]]]:
    from safetensors.torch import load_file

    import acebert

    assert module.__file__ is not None
    root = str(Path(acebert.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("one_rank.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(directory), module.__file__],
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        assert [rank.wait(timeout=500) for rank in ranks] == world * [0]
    finally:
        for rank in ranks:
            rank.kill()
    return [
        [load_file(directory / f"{rank}.{case}.safetensors") for rank in range(world)]
        for case in range(len(module.CASES))
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs privileges")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def fashion_small() -> Path:
    """2,000 real products with photos and their log (see README, 'Tests')."""
    root = os.environ.get("ACEBERT_TEST_DATA")
    if root is None:
        pytest.skip("the fashion catalogue is not distributed (ACEBERT_TEST_DATA says where it is)")
    return Path(root) / "fashion_small"
