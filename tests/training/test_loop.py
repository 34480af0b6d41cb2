import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.errors import UserError
from acebert.training.checkpoint import Checkpoints, Progress, load_progress, load_tensors
from acebert.training.finetune import new_model
from acebert.training.finetuner import SPEED, Finetuner
from acebert.training.loop import run
from acebert.training.pairs import PairBatches, StagePaths
from acebert.training.steps import Rank
from acebert.training.validation import ValidationSample

CPU = torch.device("cpu")


def train(settings: Settings, paths: StagePaths, save=lambda *_: None, resume=None, device=CPU):
    model = new_model(settings, paths)
    state = run(settings, paths, model, Rank(0, 1, device, save, resume and (lambda: resume)))
    return model, state


def stopped_at_14(
    settings: Settings, paths: StagePaths, folder: Path, device: torch.device = CPU
) -> tuple[dict[str, Any], Progress]:
    """What a run that was stopped after its 14th step goes on from."""
    checkpoints = Checkpoints(folder, {}, keep=1)

    def save(tensors: Mapping[str, Any], progress: Progress) -> None:
        checkpoints.save(tensors, progress)
        if progress.step == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, paths, save, device=device)
    checkpoints.wait()
    at = checkpoints.newest()
    assert at is not None
    return load_tensors(at, device), load_progress(at)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_encoder_and_domain_steps_update_their_own_side_and_k_is_honoured(settings, paths):
    settings = settings.model_copy(
        update={"adversary": settings.adversary.model_copy(update={"k": 3})}
    )
    tuner = Finetuner(settings, new_model(settings, paths), CPU, rank=0, world=1)
    batches = PairBatches(settings, paths, rank=0, world_size=1)

    encoder, domain = (copy.deepcopy(m.state_dict()) for m in (tuner.model, tuner.domain))
    _, v_q, v_p = tuner.encoder_step(batches.batch(0), step=0, share=0.0)
    assert changed(encoder, tuner.model.state_dict())
    assert not changed(domain, tuner.domain.state_dict())

    encoder = copy.deepcopy(tuner.model.state_dict())
    tuner.domain_step(v_q, v_p)
    assert not changed(encoder, tuner.model.state_dict())
    assert changed(domain, tuner.domain.state_dict()) == set(domain)

    _, state = train(settings, paths)
    with_domain = [r["step"] for r in state.history.to_pylist() if r["domain_loss"] is not None]
    assert with_domain == list(range(3, state.step + 1, 3))


@pytest.mark.parametrize("k", [1, 3])
def test_a_run_resumed_between_validations_ends_with_the_same_weights(
    settings: Settings, paths: StagePaths, tmp_path: Path, k: int
):
    settings = settings.model_copy(
        update={
            "adversary": settings.adversary.model_copy(update={"k": k}),
            "train": settings.train.model_copy(update={"checkpoint_every": 7}),
        }
    )
    whole, state = train(settings, paths)
    resume = stopped_at_14(settings, paths, tmp_path)
    resumed, again = train(settings, paths, resume=resume)
    assert again.step == state.step > 14
    assert not changed(whole.state_dict(), resumed.state_dict())
    assert again.history.drop(["seconds", *SPEED]).equals(state.history.drop(["seconds", *SPEED]))
    assert without_clock(again) == without_clock(state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(
    settings: Settings, paths: StagePaths, tmp_path: Path
):
    """Its sums are not in the same order twice."""
    gpu = torch.device("cuda")
    often = settings.train.model_copy(update={"checkpoint_every": 7})
    settings = settings.model_copy(update={"train": often})
    _, state = train(settings, paths, device=gpu)
    resume = stopped_at_14(settings, paths, tmp_path, device=gpu)
    _, again = train(settings, paths, resume=resume, device=gpu)
    assert again.step == state.step > 14
    np.testing.assert_allclose(again.history["loss"], state.history["loss"], rtol=1e-2)


def without_clock(state: Progress) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in state.validations]


def test_a_run_that_had_stopped_early_stays_stopped_when_it_is_resumed(
    settings: Settings, paths: StagePaths
):
    frozen = settings.train.model_copy(update={"lr": 1e-12, "patience": 2})
    settings = settings.model_copy(update={"train": frozen})
    saved: list[tuple[dict[str, Any], Progress]] = []
    train(settings, paths, lambda tensors, progress: saved.append((dict(tensors), progress)))
    _, again = train(settings, paths, resume=saved[-1])
    assert again.step == saved[-1][1].step == 15


def test_training_lowers_the_loss_and_ranks_better_than_any_of_50_random_encoders(settings, paths):
    _, state = train(settings, paths)
    losses = state.history["loss"].to_pylist()
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    sample, rng = ValidationSample.draw(settings, paths), np.random.default_rng(0)

    def vectors(n: int) -> NDArray[np.float32]:
        return rng.standard_normal((n, 16), np.float32)

    sizes = len(sample.queries), len(sample.products)
    random = [sample.measure(*map(vectors, sizes)) for _ in range(50)]
    for metric in ("gauc", "recall_100"):
        assert state.validations[-1][metric] > max(measured[metric] for measured in random)


@pytest.mark.parametrize(
    ("products", "metric", "other"),
    [(120, "recall_100", "gauc"), (120, "gauc", "recall_100"), (100, "gauc", "recall_100")],
)
def test_patience_counts_from_the_best_validation_of_the_metric_that_says_something(
    products: int,
    metric: str,
    other: str,
    settings: Settings,
    paths: StagePaths,
    monkeypatch: pytest.MonkeyPatch,
):
    """Of 100 products Recall@100 is always 1, whatever train.valid_metric asks for."""
    measured = iter([0.5, 0.6, 0.5, 0.7, 0.7, 0.6, 0.9])

    def measure(*_: object) -> dict[str, float]:
        return {metric: next(measured), other: 1.0}

    monkeypatch.setattr(ValidationSample, "measure", measure)
    asked = {"valid_metric": metric if products > 100 else "recall_100"}
    own = {"validate_every": 2, "patience": 2, "valid_products": products, **asked}
    train_settings = settings.train.model_copy(update=own)
    _, state = train(settings.model_copy(update={"train": train_settings}), paths)
    assert [row[metric] for row in state.validations] == [0.5, 0.6, 0.5, 0.7, 0.7, 0.6]
    assert (state.step, state.best_step, state.best) == (12, 8, 0.7)


def test_patience_stops_a_run_that_does_not_improve(settings, paths):
    frozen = settings.train.model_copy(update={"lr": 1e-12, "patience": 2})
    settings = settings.model_copy(update={"train": frozen})
    _, state = train(settings, paths)
    assert [row["step"] for row in state.validations] == [5, 10, 15]


def test_a_run_that_diverges_is_stopped_with_what_to_do(settings, paths):
    wild = settings.train.model_copy(update={"lr": 1e30, "warmup_steps": 0})
    settings = settings.model_copy(update={"train": wild})
    with pytest.raises(UserError, match=r"not finite.*--train\.lr"):
        train(settings, paths)


def test_lines_of_a_trial_name_it_for_another_may_run_beside_it(
    settings, paths, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="acebert")
    short = settings.train.model_copy(update={"max_steps": 5})
    own = {"parent_run": "0" * 32, "run_name": "gamma=20 seed=1"}
    trial = settings.tracking.model_copy(update=own)
    train(settings.model_copy(update={"train": short, "tracking": trial}), paths)
    lines = [line for line in caplog.messages if "step" in line]
    assert lines
    assert all(line.startswith("finetune gamma=20 seed=1: ") for line in lines)
