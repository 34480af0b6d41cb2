"""Seconds of each part of a step, without making a GPU wait."""

import time
from itertools import pairwise

import torch

PARTS = ("forward", "backward", "optimizer")


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

    def record(
        self, unit: str, count: int, waited: float, flops: float, peak: float
    ) -> dict[str, float]:
        """How fast the step was; on a GPU, the step before.

        `seconds_data` is the wait for the batch; `seconds_forward` (up to the loss),
        `seconds_backward` (with the all-reduce, which runs inside it, and with gradient caching's
        second forward) and `seconds_optimizer` are the parts of the step [s]. `<unit>_per_second`
        is `count` over their sum, `flops` the FLOP/s that this rank achieved, and `peak_share`
        what share this is of what its matrix products reach alone.

        Args:
            count: of the whole batch
            waited: for it [s]
            flops: of the step on this rank
            peak: `acebert.training.flops.matrix_peak`
        """
        timed = self.seconds()
        parts = {f"seconds_{name}": timed.get(name, float("nan")) for name in PARTS}
        total = waited + sum(parts.values())
        return {
            "seconds_data": waited,
            **parts,
            f"{unit}_per_second": count / total,
            "flops": flops / total,
            "peak_share": flops / total / peak,
        }


def _between(earlier: float | torch.cuda.Event, later: float | torch.cuda.Event) -> float:
    if isinstance(earlier, float) or isinstance(later, float):
        return float(later) - float(earlier)  # type: ignore[arg-type]
    later.synchronize()
    return earlier.elapsed_time(later) / 1e3
