"""What a step says of itself."""

import shutil
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


def gradient(settings: Settings, paths: StagePaths, step: int) -> torch.Tensor:
    """Of the encoders in `step`, all parameters in one, unclipped, always of the same weights."""
    unclipped = settings.train.model_copy(update={"max_grad_norm": 1e9})
    settings = settings.model_copy(update={"train": unclipped})
    tuner = Finetuner(settings, new_model(settings, paths), CPU, rank=0, world=1)
    seen: list[torch.Tensor] = []

    def keep(*_: object) -> None:
        grads = (p.grad if p.grad is not None else 0 * p for p in tuner.model.parameters())
        seen.extend(grad.detach().flatten().clone() for grad in grads)

    tuner.optimizer.register_step_pre_hook(keep)
    tuner.encoder_step(PairBatches(settings, paths, rank=0, world_size=1).batch(0), step, share=0.0)
    return torch.cat(seen)


def with_adversary(settings: Settings, **leaves: object) -> Settings:
    adversary = settings.adversary.model_copy(update=leaves)
    return settings.model_copy(update={"adversary": adversary})


def test_the_ramp_raises_the_adversarys_weight_linearly(
    settings: Settings, paths: StagePaths
) -> None:
    off = gradient(with_adversary(settings, form="off"), paths, step=2)
    full = gradient(with_adversary(settings, form="minimax", weight=200.0), paths, step=2)
    ramped = with_adversary(settings, form="minimax", weight=200.0, ramp_steps=4)
    at_three_quarters = gradient(ramped, paths, step=2)
    torch.testing.assert_close(at_three_quarters, off + 3 / 4 * (full - off), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient(ramped, paths, step=9), full)
    assert (full - off).abs().max() > 1e-2


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_encoders_have_the_plain_ones_gradients(
    settings: Settings, paths: StagePaths
) -> None:
    text = settings.model.model_copy(update={"patches": False, "pixels": False})
    plain = settings.model_copy(update={"model": text})
    train = settings.train.model_copy(update={"compile": True})
    compiled = gradient(plain.model_copy(update={"train": train}), paths, step=0)
    torch.testing.assert_close(compiled, gradient(plain, paths, step=0), rtol=1e-4, atol=1e-5)


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


def test_bf16_has_the_gradients_of_fp32_but_for_its_rounding(
    settings: Settings, paths: StagePaths
) -> None:
    """A bf16 number has 8 bits, so that a product is wrong by up to 0.4 %, and it goes through
    dozens. A gradient that forgets a part of the graph points elsewhere."""
    exact, rounded = (
        gradient(
            settings.model_copy(
                update={"train": settings.train.model_copy(update={"precision": precision})}
            ),
            paths,
            step=0,
        )
        for precision in ("fp32", "bf16")
    )
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.999
    torch.testing.assert_close(rounded.norm(), exact.norm(), rtol=0.02, atol=0.0)
