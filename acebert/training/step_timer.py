"""Seconds of each part of a step, without making a GPU wait."""

import time
from itertools import pairwise

import torch


class StepTimer:
    """Marks between the parts of a step.

    On a GPU the marks are events in its queue, and `seconds` tells of the step before the last
    `start`: those events have happened, so that nobody waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._before = self._marks

    def start(self) -> None:
        """A step begins."""
        self._before, self._marks = self._marks, []
        self.mark("start")

    def mark(self, part: str) -> None:
        """The part of the step named so is done."""
        if not self._cuda:
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def seconds(self) -> dict[str, float]:
        """Of each part [s]; empty where no step has been timed yet."""
        marks = self._before if self._cuda else self._marks
        return {name: _between(earlier, later) for (_, earlier), (name, later) in pairwise(marks)}


def _between(earlier: float | torch.cuda.Event, later: float | torch.cuda.Event) -> float:
    if isinstance(earlier, float) or isinstance(later, float):
        return float(later) - float(earlier)  # type: ignore[arg-type]
    later.synchronize()
    return earlier.elapsed_time(later) / 1e3
