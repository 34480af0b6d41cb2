"""Trials that are real fine-tunings: Ray Tune above Ray Train, a tiny demo catalogue."""

from pathlib import Path

import pytest

from acebert.config import Settings, load_settings
from acebert.errors import UserError
from acebert.sweep.space import Space
from acebert.sweep.training import prepare

TINY = [
    *["--recipe", "twinbert_tiny", "--demo.products", "120", "--demo.searches_per_day", "300"],
    *["--demo.days", "4", "--model.width", "32", "--model.heads", "2", "--model.layers", "1"],
    *["--text.vocab_size", "400", "--train.batch_size", "32", "--train.validate_every", "4"],
    *["--train.precision", "fp32", "--train.valid_products", "100", "--train.max_steps", "8"],
    *["--train.threads_per_worker", "1", "--eval.bootstrap", "0"],
]


def tiny(workdir: Path, *more: str) -> Settings:
    return load_settings([*TINY, "--workdir", str(workdir), *more])


def test_more_partitions_than_batches_are_refused_before_anything_is_built(tmp_path: Path):
    base = tiny(tmp_path)
    space = Space(vary={"plan.partitions": [1, 10_000]})
    with pytest.raises(UserError, match=r"partitions=10000.*a partition needs at least one: 1 to"):
        prepare(base, space)
    ends = {"low": 1, "high": 10_000}
    searched = Space(vary={"plan.partitions": ends}, search="optuna", points=2)
    with pytest.raises(UserError, match=r"partitions=10000.*a partition needs at least one"):
        prepare(base, searched)
    assert not (tmp_path / "tokens").exists()


def test_values_that_make_the_same_partitions_are_one_point(tmp_path: Path, ray_cluster: None):
    base = tiny(tmp_path)
    space = Space(vary={"plan.batches_per_partition": [1, 1000, 5000]}, seeds=(0, 1))
    trials = prepare(base, space).trials
    assert [(t.point["plan.batches_per_partition"], t.seed) for t in trials] == [
        *((1, 0), (1, 1)),
        *((1000, 0), (1000, 1)),
    ]
    plans = [path.name for path in (tmp_path / "plan").glob("[!.]*")]
    assert len(plans) == 4
