import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from acebert.config import Settings
from acebert.errors import UserError
from acebert.training.finetune import new_model, read_state, write_state
from acebert.training.finetuner import Finetuner
from acebert.training.loop import Progress, run
from acebert.training.pairs import PairBatches, StagePaths

CPU = torch.device("cpu")


def train(settings: Settings, paths: StagePaths, save=lambda *_: None, resume=None):
    model = new_model(settings, paths)
    state = run(settings, paths, model, device=CPU, rank=0, world=1, save=save, resume=resume)
    return model, state


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
    with_domain = [int(row["step"]) for row in state.history if "domain_loss" in row]
    assert with_domain == list(range(3, state.step + 1, 3))


def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_weights(
    settings, paths, tmp_path: Path
):
    whole, state = train(settings, paths)
    kept: list[Path] = []

    def save(tuner: Finetuner, progress: Progress, is_best: bool) -> None:
        if progress.step == 10:
            write_state(tmp_path, tuner, progress)
            kept.append(tmp_path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, paths, save)
    assert kept
    resumed, again = train(settings, paths, resume=read_state(tmp_path, CPU))
    assert again.step == state.step > 10
    assert not changed(whole.state_dict(), resumed.state_dict())
    assert [r["loss"] for r in again.history] == [r["loss"] for r in state.history]
    assert [r["recall_100"] for r in again.validations] == [
        r["recall_100"] for r in state.validations
    ]


def test_training_lowers_the_loss_and_finds_more_than_chance(settings, paths):
    _, state = train(settings, paths)
    losses = [row["loss"] for row in state.history]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    corpus = settings.train.valid_products
    assert state.validations[-1]["recall_100"] > 100 / max(corpus, 120)


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


def test_ranks_together_see_the_batch_that_one_process_sees(settings, paths):
    whole = PairBatches(settings, paths, rank=0, world_size=1).batch(7)
    halves = [PairBatches(settings, paths, rank=r, world_size=2).batch(7) for r in (0, 1)]
    W = settings.train.batch_size
    for side in ("query", "product"):
        rows = [
            row[mask].tolist()
            for half in halves
            for row, mask in zip(
                getattr(half, side).input_ids, getattr(half, side).attention_mask, strict=True
            )
        ]
        one = getattr(whole, side)
        assert rows == [
            row[mask].tolist() for row, mask in zip(one.input_ids, one.attention_mask, strict=True)
        ]
    stacked = torch.cat([half.query_mask for half in halves])
    assert stacked.shape == (W, W)
    assert torch.equal(stacked, whole.query_mask)
    pixels = torch.cat([half.image.pixels for half in halves])
    assert torch.equal(pixels, whole.image.pixels)
