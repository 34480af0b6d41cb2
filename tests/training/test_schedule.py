import math

import pytest

from acebert.config import TrainSettings
from acebert.training.schedule import lr_factor, progress


def test_warm_up_is_linear_and_reaches_the_peak():
    settings = TrainSettings(warmup_steps=4, decay="constant")
    assert [lr_factor(settings, step, 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize(
    ("decay", "half"), [("linear", 0.5), ("cosine", 0.5 * (1 + math.cos(math.pi / 2)))]
)
def test_decay_passes_its_half_and_ends_at_zero(decay: str, half: float):
    settings = TrainSettings(warmup_steps=0, decay=decay)
    assert lr_factor(settings, 50, 0.5) == pytest.approx(half)
    assert lr_factor(settings, 100, 1.0) == pytest.approx(0)


def test_progress_is_by_whichever_budget_is_used_up_first():
    by_steps = TrainSettings()
    both = TrainSettings(max_minutes=2)
    assert progress(by_steps, 30, 100, seconds=1e9) == 0.3
    assert progress(both, 30, 100, seconds=60) == 0.5
    assert progress(both, 80, 100, seconds=60) == 0.8
    assert progress(both, 1, 100, seconds=300) == 1.0
