"""A toy in place of fine-tuning: its best point is known, it costs nothing, and it makes MLflow
runs as fine-tuning does."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from acebert.config import Settings, load_settings
from acebert.errors import UserError
from acebert.sweep.space import Space, trials_of
from acebert.sweep.training import Prepared

BEST = 20.0


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return load_settings(["--recipe", "acebert_tiny", "--workdir", str(tmp_path / "work")])


@dataclass(frozen=True)
class Toy:
    """What `sweep` takes in place of fine-tuning, and what was called."""

    train: Callable[[Settings], dict[str, Any]]
    prepare: Callable[[Settings, Space], Prepared]
    calls: Callable[[Settings], list[tuple[float, int]]]
    best: float = BEST

    @property
    def parts(self) -> dict[str, Any]:
        return {"prepare": self.prepare, "train": self.train}


@pytest.fixture
def toy() -> Toy:
    return Toy(make_toy(), prepare, calls)


def prepare(base: Settings, space: Space) -> Prepared:
    return Prepared("toy", [] if space.search == "optuna" else trials_of(space, base))


def make_toy() -> Callable[[Settings], dict[str, Any]]:
    """recall_100 is best at loss.gamma = 20. γ = 1 kills the process, 2 and 3 raise, and so on;
    while `workdir`/slow exists, a trial takes a minute."""

    def train(settings: Settings) -> dict[str, Any]:  # nested: pickled by value
        import time

        from acebert.tracking import start_run
        from acebert.workdir import digest_of

        gamma = settings.loss.gamma
        with (settings.workdir / "calls.txt").open("a") as calls:
            calls.write(f"{gamma} {settings.seed}\n")
        key = digest_of([gamma, settings.seed])
        with start_run(settings, "finetune", key) as run:
            if gamma == 1:
                os._exit(1)
            if gamma == 2:
                raise UserError("no such luck")
            if gamma == 3:
                raise RuntimeError("line one\nline two")
            if (settings.workdir / "slow").exists():
                (settings.workdir / "waits").touch()
                time.sleep(60)
            away = math.log(gamma / BEST)
            recall = 0.5 - 0.05 * away**2 + 0.001 * (settings.seed % 2)
            return {"recall_100": recall, "gauc": 0.5, "mlflow_run": run.run_id, "step": 1}

    return train


def calls(settings: Settings) -> list[tuple[float, int]]:
    """(γ, seed) of every trial that was ever started, in order."""
    lines = (settings.workdir / "calls.txt").read_text().splitlines()
    return [(float(gamma), int(seed)) for gamma, seed in (line.split() for line in lines)]
