"""Learning rate: linear warm-up, then linear, cosine or constant decay to the end of the budget.

The budget is steps, minutes, or both; progress is the larger of the two shares used, so a run
that is cut by the clock still ends at a small learning rate.
"""

import math

from acebert.config import CNNSettings, DistillSettings, PretrainSettings, TrainSettings

Schedule = TrainSettings | PretrainSettings | CNNSettings | DistillSettings


def progress(settings: Schedule, step: int, total_steps: int, seconds: float) -> float:
    """Share of the budget that is used, 0 to 1."""
    share = step / max(1, total_steps)
    if settings.max_minutes is not None:
        share = max(share, seconds / (60 * settings.max_minutes))
    return min(1.0, share)


def lr_factor(settings: Schedule, step: int, share: float) -> float:
    """Factor on the peak learning rate at `step` (from 0) with `share` of the budget used."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.decay == "linear":
        return warm * (1 - share)
    if settings.decay == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * share))
    return warm
