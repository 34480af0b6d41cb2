"""The trials' runs in MLflow: children of the sweep's run, named alike, ended whatever happens.

Fine-tuning opens a trial's run itself. What only the sweep can do is done here: end the run of a
trial that was stopped or died, and give a run to a trial whose model was there already.
"""

from dataclasses import replace
from typing import Any

from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from acebert.config import Settings
from acebert.sweep.trials import Outcome
from acebert.tracking import DIGEST_TAG, MODEL_TAG, Run, start_run

GROUPS = {
    "best": ("gauc", "recall_100", "best_step"),
    "plan": ("partitions", "batches_per_partition", "hard_share"),
    "test": ("test_gauc", "test_recall_100"),
}


class Children:
    """Runs of the trials of one sweep."""

    def __init__(self, parent: Run, sweep: str, table: str) -> None:
        """`sweep` is the sweep's digest, `table` the tag that all its trials carry."""
        self.parent, self.sweep, self.table = parent, sweep, table
        self.experiment = parent.client.get_run(parent.run_id).info.experiment_id

    def adopt(self, settings: Settings) -> Settings:
        """`settings` for trials: their runs are children; none becomes a registered model."""
        own = {"parent_run": self.parent.run_id, "tag": self.table, "register_as": None}
        return settings.model_copy(update={"tracking": settings.tracking.model_copy(update=own)})

    def end(self, name: str | None = None, *, stopped: bool = False) -> list[str]:
        """End what is still running, of one trial or of all; the digests of what was trained. The
        process of a `stopped` trial may have taken its end for a failure."""
        wanted = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.parent.run_id}'"
        wanted += f" AND attributes.status {'!=' if stopped else '='} "
        wanted += "'FINISHED'" if stopped else "'RUNNING'"
        runs = self.parent.client.search_runs([self.experiment], wanted)
        found = [run for run in runs if name in (None, run.info.run_name)]
        for run in found:
            self.parent.client.set_terminated(run.info.run_id, "KILLED")
        return [run.data.tags[DIGEST_TAG] for run in found]

    def note(self, outcome: Outcome, base: Settings) -> Outcome:
        """Log a finished trial's numbers in its run, which is then the outcome's `mlflow_run`.

        A trial that found its model trained gets a run of its own here, for the run that trained
        the model may belong to another sweep, or be another server's.
        """
        trained_by = outcome.result.get("mlflow_run")
        if trained_by is None:
            return outcome
        run = Run(self.parent.client, trained_by)
        if not self._is_child(trained_by):
            digest = f"{self.sweep}-{outcome.trial.digest}"
            tags = {"acebert.trained_by": trained_by}
            if "model" in outcome.result:
                tags[MODEL_TAG] = outcome.result["model"]
            with start_run(outcome.trial.settings(base), "trial", digest, tags=tags) as run:
                pass
        run.log_metrics(run_metrics(outcome.result))
        return replace(outcome, result={**outcome.result, "mlflow_run": run.run_id})

    def _is_child(self, run_id: str) -> bool:
        """Whether this sweep has the run: not another sweep or server, and it is not deleted."""
        try:
            run = self.parent.client.get_run(run_id)
        except MlflowException:
            return False
        parent = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
        is_there = run.info.lifecycle_stage == LifecycleStage.ACTIVE
        return is_there and parent == self.parent.run_id


def run_metrics(result: dict[str, Any]) -> dict[str, float]:
    """A result's numbers by the names they have in MLflow: best/gauc, plan/hard_share, …"""
    return {
        f"{group}/{name.removeprefix('test_')}": float(result[name])
        for group, names in GROUPS.items()
        for name in names
        if name in result
    }
