"""What a step says of itself."""

import shutil
import time

import numpy as np
import pytest
import torch

from acebert.config import Settings
from acebert.training.finetune import new_model
from acebert.training.finetuner import SPEED, Finetuner
from acebert.training.flops import step_flops
from acebert.training.pairs import PairBatches, StagePaths
from acebert.training.step_timer import StepTimer, parts_between

CPU = torch.device("cpu")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def gradient(
    settings: Settings, paths: StagePaths, step: int, device: torch.device = CPU
) -> torch.Tensor:
    """Of the encoders in `step`, all parameters in one, unclipped, always of the same weights."""
    unclipped = settings.train.model_copy(update={"max_grad_norm": 1e9})
    settings = settings.model_copy(update={"train": unclipped})
    tuner = Finetuner(settings, new_model(settings, paths), device, rank=0, world=1)
    seen: list[torch.Tensor] = []

    def keep(*_: object) -> None:
        grads = (p.grad if p.grad is not None else 0 * p for p in tuner.model.parameters())
        seen.extend(grad.detach().flatten().clone() for grad in grads)

    tuner.optimizer.register_step_pre_hook(keep)
    batch = PairBatches(settings, paths, rank=0, world_size=1).batch(0)
    tuner.encoder_step(batch.to(device), step, share=0.0)
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
@pytest.mark.parametrize("photos", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_encoders_have_the_plain_ones_gradients(
    settings: Settings, paths: StagePaths, photos: bool
) -> None:
    model = settings.model.model_copy(update={"patches": photos, "pixels": photos})
    plain = settings.model_copy(update={"model": model})
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


def test_what_is_marked_twice_is_one_part_and_nothing_between_the_marks_is_lost() -> None:
    marks = [("data", 1.0), ("forward", 2.0), ("backward", 4.0), ("optimizer", 5.0)]
    domain_step_and_gap = [("optimizer", 5.5), ("data", 5.75)]
    parts = parts_between([*marks, *domain_step_and_gap])
    assert parts == {"forward": 1.0, "backward": 2.0, "optimizer": 1.5, "data": 0.25}


@on_a_gpu
def test_a_gpus_parts_sum_up_to_the_time_from_start_to_start(
    settings: Settings, paths: StagePaths
) -> None:
    gpu = torch.device("cuda")
    tuner = Finetuner(settings, new_model(settings, paths), gpu, rank=0, world=1)
    batches = PairBatches(settings, paths, 0, 1, gpu)
    records, wall = [], time.perf_counter()
    for step, batch in enumerate(batches.stream(0, 6)):
        if step == 4:
            tuner.timer.forget()  # as a validation does
        metrics, v_q, v_p = tuner.encoder_step(batch.to(gpu), step, share=0.0)
        tuner.domain_step(v_q, v_p)
        records.append({name: float(metrics[name]) for name in SPEED})
    wall = time.perf_counter() - wall
    timed = [record for record in records if not np.isnan(record["flops"])]
    assert [step for step, record in enumerate(records) if record not in timed] == [0, 4]
    sums = [sum(r[name] for name in SPEED if name.startswith("seconds_")) for r in timed]
    assert sum(sums) < wall
    W = settings.train.batch_size
    assert [W / r["pairs_per_second"] for r in timed] == pytest.approx(sums)


@on_a_gpu
def test_a_gpu_has_the_gradients_of_a_cpu(settings: Settings, paths: StagePaths) -> None:
    on_gpu = gradient(settings, paths, step=0, device=torch.device("cuda")).cpu()
    assert torch.cosine_similarity(on_gpu, gradient(settings, paths, step=0), dim=0) > 0.9999


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
