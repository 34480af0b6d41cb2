"""What a step says of itself."""

import time

import pytest
import torch

from acebert.config import Settings
from acebert.training.finetune import new_model
from acebert.training.finetuner import SPEED, Finetuner
from acebert.training.flops import step_flops
from acebert.training.pairs import PairBatches, StagePaths
from acebert.training.step_timer import StepTimer

CPU = torch.device("cpu")


def test_a_steps_record_says_where_its_time_went(settings: Settings, paths: StagePaths) -> None:
    tuner = Finetuner(settings, new_model(settings, paths), CPU, rank=0, world=1)
    batch = PairBatches(settings, paths, rank=0, world_size=1).batch(0)
    batch.waited = 0.5
    before = time.perf_counter()
    metrics, _, _ = tuner.encoder_step(batch, step=0, share=0.0)
    whole = 0.5 + time.perf_counter() - before
    said = {name: float(metrics[name]) for name in SPEED}
    parts = [said[name] for name in SPEED if name.startswith("seconds_")]
    assert said["seconds_data"] == 0.5
    assert min(parts) > 0
    assert sum(parts) <= whole
    assert settings.train.batch_size / said["pairs_per_second"] == pytest.approx(sum(parts))
    work = step_flops(tuner.model, batch, world=1)
    assert said["flops"] * sum(parts) == pytest.approx(work, rel=1e-4)
    assert said["peak_share"] == pytest.approx(said["flops"] / tuner.peak, rel=1e-4)


def test_marks_part_a_step_and_a_start_forgets_the_one_before() -> None:
    timer = StepTimer(CPU)
    assert timer.seconds() == {}
    for pause in (0.0, 0.02):
        timer.start()
        time.sleep(pause)
        timer.mark("forward")
        timer.mark("backward")
    assert list(timer.seconds()) == ["forward", "backward"]
    assert timer.seconds()["forward"] >= 0.02
    assert timer.seconds()["backward"] > 0
