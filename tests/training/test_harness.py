"""What becomes of a training whose ranks fail: toy workers in a real Ray Train."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from acebert.config import Settings, load_settings
from acebert.errors import UserError
from acebert.training.harness import trained_stage
from acebert.training.steps import Rank


def alone(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    if rank.rank == 1:
        raise UserError("the disk of this node is too small")
    dist.barrier()


def dies(settings: Settings, config: dict[str, Any], rank: Rank) -> None:
    os._exit(1)


def nothing(*_: Any) -> None:
    raise AssertionError("there is nothing to export")


def settings_with(workdir: Path, *more: str) -> Settings:
    return load_settings(["--workdir", str(workdir), "--train.cpus_per_worker", "0.4", *more])


@pytest.mark.slow
def test_what_one_rank_meets_alone_ends_the_training_with_its_message(
    tmp_path: Path, ray_cluster: None
) -> None:
    """The others wait for it in a collective, for hours by themselves."""
    settings = settings_with(tmp_path, "--train.num_workers", "2")
    start = time.monotonic()
    with pytest.raises(UserError, match="the disk of this node is too small"):
        trained_stage(settings, "toy", {"of": "alone"}, alone, {}, nothing, "data")
    assert time.monotonic() - start < 300


@pytest.mark.slow
def test_deaths_that_leave_no_checkpoint_end_it_with_their_number(
    tmp_path: Path, ray_cluster: None
) -> None:
    settings = settings_with(tmp_path, "--train.max_failures", "0")
    with pytest.raises(UserError, match=r"toy-\w+: workers died 1 times before the first check"):
        trained_stage(settings, "toy", {"of": "deaths"}, dies, {}, nothing, "data")
