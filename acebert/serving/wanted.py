"""Which bundle a service of these settings is to serve."""

import json
import logging
import os
import threading
import time
from pathlib import Path

from acebert.config import Settings
from acebert.errors import UserError
from acebert.serving.bundle import published
from acebert.serving.query_encoder import product_side_version

log = logging.getLogger(__name__)

ASK_SECONDS = 10.0  # between two questions to MLflow's registry
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""of a service, unless its environment says otherwise: MLflow's own are minutes"""


class WantedBundle:
    """`wanted()`: the bundle to serve now.

    `serve.bundle`; else the newest bundle of the model that `serve.model` names, a directory or an
    address in MLflow's registry; else the one that was published last. Of a model the last answer
    is given at once, and asked for anew in the background: where the registry is away, or its alias
    goes to a model without a bundle, it stands. Safe for many threads.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: Path | None = None
        self._side: tuple[int | None, str] | None = None
        """of a directory: when its weights were written, and their version"""
        self._why_not: str | None = None
        self._asked = 0.0
        self._asking = threading.Lock()

    def __call__(self) -> Path:
        """
        Raises:
            UserError: there is none, or there was none some seconds ago.
        """
        serve, workdir = self._settings.serve, self._settings.workdir
        if serve.bundle or serve.model is None:
            return serve.bundle or published(workdir)
        if self._known is None:
            with self._asking:
                if self._known is None and (self._why_not is None or self._is_old()):
                    self._ask(serve.model)
            if self._known is None:
                raise UserError(self._why_not)
        elif self._is_old() and self._asking.acquire(blocking=False):
            threading.Thread(target=self._ask_again, args=(serve.model,), daemon=True).start()
        return self._known

    def _is_old(self) -> bool:
        return time.monotonic() - self._asked > ASK_SECONDS

    def _ask_again(self, model: str) -> None:
        try:
            self._ask(model)
        finally:
            self._asking.release()

    def _ask(self, model: str) -> None:
        try:
            self._known = _newest(self._settings.workdir, model, self._product_side(model))
        except UserError as error:
            self._why_not = str(error)
            if self._known is not None:
                log.warning("goes on with %s: %s", self._known, error)
        finally:
            self._asked = time.monotonic()

    def _product_side(self, model: str) -> str:
        if model.startswith("models:/"):
            from acebert.tracking import registered_product_side  # takes seconds

            for name, value in IMPATIENT.items():
                os.environ.setdefault(name, value)
            return registered_product_side(self._settings, model)
        weights = Path(model) / "model.safetensors"
        written = weights.stat().st_mtime_ns if weights.is_file() else None
        if self._side is None or self._side[0] != written:  # else it would be read every 10 s
            self._side = written, product_side_version(Path(model))
        return self._side[1]


def _newest(workdir: Path, model: str, version: str) -> Path:
    """The bundle of a model's product side that was made last."""
    made = {}
    for path in (workdir / "bundle").glob("[!.]*/bundle.json"):
        info = json.loads(path.read_text())
        if info["version"] == version:
            made[path.parent] = info["made"]["bundle"]
    if not made:
        raise UserError(
            f"--serve.model {model}: no bundle of it (version {version}) in {workdir}; `python "
            f"ray_jobs/publish.py --model {model} --workdir {workdir}` makes one"
        )
    return max(made, key=lambda path: made[path])
