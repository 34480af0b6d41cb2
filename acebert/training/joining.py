"""Workers that join each other in a process group, and start again where that fails.

Ray Train 2.60 starts a group anew after a failed start, but not after every one: a worker that dies
while the others wait for it leaves them an error of torch's, which ends the training; and the group
that failed keeps its placement, so that the next one may wait for it for ever. Apart from the
harness, for Ray Train's controller imports this module, and no model.
"""

import logging
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

log = logging.getLogger(__name__)


class JoiningBackend(_TorchBackend):
    """Counts, in Ray Train's controller, the starts in a row that failed."""

    def __init__(self) -> None:
        self._failed = 0

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """
        Args:
            worker_group: Ray Train's WorkerGroup.
            backend_config: JoiningConfig.

        Raises:
            WorkerGroupStartupFailedError: the workers did not join; Ray Train starts others.
            RuntimeError: the same, `max_failures` + 1 times in a row; the training ends. (After an
                actor's death, a RayError, Ray Train would start others without an end.)
        """
        try:
            super().on_start(worker_group, backend_config)
        except RayError as error:
            worker_group.shutdown()  # gives its placement back
            self._failed += 1
            told = "workers failed while they joined each other"
            reason = str(error).strip().rpartition("\n")[2]
            if self._failed > backend_config.max_failures:
                raise RuntimeError(f"{told}, {self._failed} times in a row: {reason}") from error
            log.warning("%s, others are started: %s", told, reason)
            raise WorkerGroupStartupFailedError(told) from error
        self._failed = 0


@dataclass
class JoiningConfig(TorchConfig):
    """`TorchConfig` with the number of failed starts in a row that the training outlives."""

    max_failures: int = 0

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return JoiningBackend
