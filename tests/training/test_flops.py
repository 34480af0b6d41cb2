"""Counted work against PyTorch's own counter; what a step's record says."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acebert.config import ModelSettings
from acebert.models.dual import DualEncoder
from acebert.models.encoder import CEBertConfig, ImageInputs, TextInputs, load_backbone
from acebert.models.pretraining import PretrainInputs, start_pretraining
from acebert.training.flops import matrix_peak, pretraining_flops, tower_flops

B, L, d = 3, 7, 12


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("sizes", [{}, {"patch_dim": 24}, {"patch_dim": 24, "pixel_side": 14}])
def test_flops_are_those_that_pytorch_counts(pooling: Any, sizes: dict[str, int]) -> None:
    """Rows of one length with a photo each: nothing is padding."""
    settings = ModelSettings(
        backbone=None, layers=3, width=32, heads=4, embedding_dim=d, dropout=0.0, pooling=pooling
    )
    tower = DualEncoder.new(settings, vocab_size=50, sep_token_id=3, **sizes).tower
    text = TextInputs(
        torch.randint(4, 50, (B, L)),
        torch.ones(B, L, dtype=torch.bool),
        torch.zeros(B, L, dtype=torch.long),
    )
    image = None
    if sizes:
        image = ImageInputs(
            torch.ones(B, dtype=torch.bool),
            torch.rand(B, 16, 24),
            torch.zeros(B, 14, 14, 3, dtype=torch.uint8),
        )
    with FlopCounterMode(display=False) as counter:
        tower(text, image).sum().backward()
    counted = tower_flops(tower.encoder.config, d, np.full(B, L), np.full(B, image is not None))
    assert counted == counter.get_total_flops()


@pytest.mark.parametrize("sizes", [{}, {"patch_dim": 24}, {"patch_dim": 24, "pixel_side": 14}])
def test_flops_of_pre_training_are_those_that_pytorch_counts(sizes: dict[str, int]) -> None:
    """Rows of one length with a photo each: nothing is padding."""
    shape = {"layers": 3, "width": 32, "heads": 4, "vocab_size": 50, **sizes}
    encoder = load_backbone(None, dropout=0.0, sep_token_id=3, **shape)
    model = start_pretraining(encoder, None)
    words, patches = (
        torch.tensor([0, 0, 2]),
        torch.tensor([0, 1] if sizes else [], dtype=torch.long),
    )
    image = ImageInputs(
        torch.ones(B, dtype=torch.bool),
        torch.rand(B, 16, 24),
        torch.zeros(B, 14, 14, 3, dtype=torch.uint8),
    )
    inputs = PretrainInputs(
        TextInputs(
            torch.randint(4, 50, (B, L)),
            torch.ones(B, L, dtype=torch.bool),
            torch.zeros(B, L, dtype=torch.long),
        ),
        image if sizes else None,
        torch.arange(B),
        torch.full((B,), bool(sizes)),
        torch.zeros(B, 16, dtype=torch.bool),
        words,
        torch.arange(len(words)),
        patches,
        torch.arange(len(patches)),
    )
    with FlopCounterMode(display=False) as counter:
        outputs = model(inputs)
        of = (outputs.words, outputs.patches, outputs.match)
        sum(x.sum() for x in of if x is not None).backward()
    counted = pretraining_flops(
        model.config, np.full(B, L), np.full(B, bool(sizes)), len(words), len(patches)
    )
    assert counted == counter.get_total_flops()


def test_padding_and_rows_without_a_photo_are_no_work() -> None:
    config = CEBertConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, patch_dim=24, pixel_side=14
    )
    one, two = np.array([7]), np.array([7, 3])
    none, photo = np.array([False]), np.array([True])
    short = tower_flops(config, d, np.array([3]), none)
    assert tower_flops(config, d, two, np.array([False, False])) == pytest.approx(
        tower_flops(config, d, one, none) + short
    )
    assert tower_flops(config, d, one, photo) > 3 * tower_flops(config, d, one, none)


def test_the_matrix_peak_is_its_products_work_by_the_seconds_of_the_fastest_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = CEBertConfig(hidden_size=32, intermediate_size=128)
    counts = []

    def timed(work: Callable[[], None]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_total_flops())
        return 0.5 if len(counts) == 2 else 2.0

    monkeypatch.setattr("acebert.training.flops._cpu_seconds", timed)
    peak = matrix_peak(config, 11, torch.device("cpu"), torch.float32)
    assert peak == counts[0] / 0.5 > 0
