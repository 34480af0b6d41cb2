"""Seconds of each part of a step, without making a GPU wait."""

import time
from collections.abc import Sequence
from itertools import pairwise

import torch

PARTS = ("data", "forward", "backward", "optimizer")


class StepTimer:
    """Marks between the parts of a step.

    On a GPU the marks are events in its queue, and `seconds` tells of the step before the last
    `start`: the GPU has its successor's work queued while the host waits for those events. The
    host's own clock would count twice there: it waits while the GPU still computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._before = self._marks

    def start(self) -> None:
        """A step begins."""
        self._before, self._marks = self._marks, []
        self.mark("data")

    def forget(self) -> None:
        """What comes now, a validation, is no part of a step."""
        self._marks = []

    def mark(self, part: str) -> None:
        """The part of the step named so is done; one that is marked twice is the sum."""
        if not self._cuda:
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def seconds(self) -> dict[str, float]:
        """Of each part [s]; empty where no step has been timed yet. On a GPU `data` is among them:
        what lies between a step and the start of the next."""
        if not self._cuda:
            return parts_between(self._marks)
        return parts_between([*self._before, self._marks[0]] if self._before else [])

    def record(
        self, unit: str, count: int, waited: float, flops: float, peak: float
    ) -> dict[str, float]:
        """How fast the step was; on a GPU, the step before.

        `seconds_data` is the wait for the batch, on a GPU with the copy to it; `seconds_forward`
        (up to the loss), `seconds_backward` (with the all-reduce, which runs inside it, and with
        gradient caching's second forward) and `seconds_optimizer` are the parts of the step [s].
        `<unit>_per_second` is `count` over their sum, `flops` the FLOP/s that this rank achieved,
        `peak` those that its matrix products reach alone, and `peak_share` the one of the other.

        Args:
            count: of the whole batch
            waited: for it, on the host [s]
            flops: of the step on this rank
            peak: `acebert.training.flops.matrix_peak`
        """
        timed = self.seconds()
        if not self._cuda:
            timed["data"] = waited
        parts = {f"seconds_{name}": timed.get(name, float("nan")) for name in PARTS}
        total = sum(parts.values())
        return {
            **parts,
            f"{unit}_per_second": count / total,
            "flops": flops / total,
            "peak": peak,
            "peak_share": flops / total / peak,
        }


def parts_between(marks: Sequence[tuple[str, float | torch.cuda.Event]]) -> dict[str, float]:
    """Of each part [s], by the name of the mark that ends it."""
    parts: dict[str, float] = {}
    for (_, earlier), (name, later) in pairwise(marks):
        parts[name] = parts.get(name, 0.0) + _between(earlier, later)
    return parts


def _between(earlier: float | torch.cuda.Event, later: float | torch.cuda.Event) -> float:
    if isinstance(earlier, float) or isinstance(later, float):
        return float(later) - float(earlier)  # type: ignore[arg-type]
    later.synchronize()
    return earlier.elapsed_time(later) / 1e3
