"""Which bundle a service of these settings is to serve."""

import json
import logging
import time
from pathlib import Path

from acebert.config import Settings
from acebert.errors import UserError
from acebert.serving.bundle import published
from acebert.serving.query_encoder import product_side_version

log = logging.getLogger(__name__)

ASK_SECONDS = 10.0  # between two questions to MLflow's registry


class WantedBundle:
    """`wanted()`: the bundle to serve now.

    `serve.bundle`; else the newest bundle of the model that `serve.model` names, a directory or an
    address in MLflow's registry; else the one that was published last. Where the registry fails
    later, or its alias goes to a model without a bundle, the last answer stands.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: Path | None = None
        self._asked = 0.0

    def __call__(self) -> Path:
        """
        Raises:
            UserError: there is none.
        """
        serve, workdir = self._settings.serve, self._settings.workdir
        if serve.bundle or serve.model is None:
            return serve.bundle or published(workdir)
        if self._known is None or time.monotonic() - self._asked > ASK_SECONDS:
            try:
                self._known = _newest(workdir, serve.model, self._product_side(serve.model))
            except UserError as error:
                if self._known is None:
                    raise
                log.warning("goes on with %s: %s", self._known, error)
            self._asked = time.monotonic()
        return self._known

    def _product_side(self, model: str) -> str:
        if model.startswith("models:/"):
            from acebert.tracking import registered_product_side  # takes seconds

            return registered_product_side(self._settings, model)
        return product_side_version(Path(model))


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
