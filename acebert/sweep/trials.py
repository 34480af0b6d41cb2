"""Trials on Ray Tune: which run when, and what became of each.

    run_trials(space, base, trials, known, objective, on_start, on_end, at_once=1, storage=…)

* A trial is a function trainable that calls `objective(settings)`. Its process is a driver: it
  needs no CPU, stays on this node (where MLflow's sqlite is), and launches workers of its own.
* A grid and a random search know their trials beforehand, so that those done before are left out.
  Optuna is told of them instead, and its sampler goes on from there.
* A trial that fails is noted with its reason; the others go on.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.repeater import TRIAL_INDEX

from acebert.config import Settings, settings_from
from acebert.data.inputs import as_first_seen, seen
from acebert.errors import UserError, reason_of
from acebert.sweep.space import Space, Trial, drawn, tune_domains
from acebert.tracking import server_environment

log = logging.getLogger(__name__)

Objective = Callable[[Settings], dict[str, Any]]
"""Trains by these settings and returns what came out, the space's metric among it. It runs in the
trial's process, where `ray.tune.report` takes validations on the way (with `step`, for ASHA)."""

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    trial: Trial
    status: Status
    """stopped: by ASHA, at its last validation"""
    result: dict[str, Any]
    """what the objective returned; of other trials, the last validation"""
    seconds: float
    """from the start of the trial to its end"""
    reason: str | None = None
    """why it failed"""


def run_trials(
    space: Space,
    base: Settings,
    trials: Sequence[Trial] | None,
    known: Sequence[Outcome],
    objective: Objective,
    on_start: Callable[[Trial], None],
    on_end: Callable[[Outcome], None],
    *,
    at_once: int,
    storage: Path,
) -> None:
    """Run trials until all have ended; `on_start` and `on_end` are called in this process.

    Args:
        trials: to run; None: as many as are left of `space.points`, chosen by Optuna.
        known: what became of earlier trials; Optuna learns from it.
        at_once: trials that run at the same time.
        storage: directory for Tune's own files, which nothing here reads again.

    Raises:
        KeyboardInterrupt: Ctrl-C; what still runs ends with this process.
    """
    tree = base.model_dump()
    directory = os.getcwd()  # relative paths in the settings start here

    def run_one(
        config: dict[str, Any],
        environment: dict[str, str],
        inputs: dict[str, Any],
        train: Objective,
    ) -> None:
        os.chdir(directory)
        # A cluster's workers have their own; and this one holds no GPU, if its node has some.
        os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
        try:
            with as_first_seen(inputs):
                result = train(_trial_of(config, space).settings(settings_from(tree)))
        except Exception as error:
            # Reported, not raised: a raise costs the process, and the next trial its start.
            if not isinstance(error, UserError):
                log.exception("sweep: a trial failed")
            tune.report({space.metric: math.nan, "failed": reason_of(error)})
        else:
            tune.report({**result, "returned": True})

    here = f"node:{ray.util.get_node_ip_address()}"
    listed = {} if trials is None else {"trial": tune.grid_search([vars(t) for t in trials])}
    left = len(space.seeds) * ((space.points or 0) - len(points_tried(known)))
    tuner = tune.Tuner(
        tune.with_resources(
            # Tune keeps what it is given until Python ends; DuckDB, which `objective` imports, says
            # then that it was leaked. Of parameters it keeps references.
            tune.with_parameters(
                run_one, environment=server_environment(), inputs=seen(), train=objective
            ),
            tune.PlacementGroupFactory([{here: 0.001}]),
        ),
        param_space=listed,
        tune_config=tune.TuneConfig(
            metric=space.metric,
            mode="max",
            search_alg=_optuna(space, base, known) if trials is None else None,
            num_samples=left if trials is None else 1,
            scheduler=_asha(space),
            max_concurrent_trials=at_once,
            reuse_actors=space.asha is None,  # a stopped trial's actor cannot be used again
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(storage),
            verbose=0,
            callbacks=[_Watcher(space, on_start, on_end)],
        ),
    )
    # Ctrl-C is ours: Tune would swallow it and return as if all were done.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # A trial that ASHA stops is inside Ray Train's `fit`, which nothing interrupts: its workers go
    # on, on CPUs that the next trial waits for, until its process is killed. Tune's default: 600 s.
    os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its reports, which verbose=0 does not silence
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are in the outcomes
    tuner.fit()


def _trial_of(config: dict[str, Any], space: Space) -> Trial:
    if "trial" in config:
        return Trial(**config["trial"])
    return Trial(drawn(space, config["point"]), space.seeds[config.get(TRIAL_INDEX, 0)])


def _asha(space: Space) -> ASHAScheduler | None:
    if space.asha is None:
        return None
    return ASHAScheduler(
        time_attr="step",
        grace_period=space.asha.first_rung,
        reduction_factor=space.asha.reduction,
        max_t=10**9,  # a trial's own settings end it: stopped at its last step, it would be lost
    )


def points_tried(known: Sequence[Outcome]) -> list[list[Outcome]]:
    """Outcomes of each point."""
    points: dict[str, list[Outcome]] = {}
    for outcome in known:
        points.setdefault(repr(outcome.trial.point), []).append(outcome)
    return list(points.values())


def _optuna(space: Space, base: Settings, known: Sequence[Outcome]) -> Any:
    """Optuna's TPE sampler; with several seeds it is told each point's mean.

    What was tried before are its first observations. Its seed moves on with their number, or it
    would draw the same first points once more.
    """
    import optuna
    from ray.tune.search import Repeater
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    done = points_tried(known)
    tried, rewards = [], []
    for outcomes in done:
        ended = [o for o in outcomes if o.status in ("finished", "stopped")]
        values = [o.result[space.metric] for o in ended if space.metric in o.result]
        if values:
            tried.append({f"point/{k}": v for k, v in outcomes[0].trial.point.items()})
            rewards.append(sum(values) / len(values))
    domains = OptunaSearch.convert_search_space({"point": tune_domains(space)})
    search = OptunaSearch(
        space=domains,
        metric=space.metric,
        mode="max",
        points_to_evaluate=tried or None,
        evaluated_rewards=rewards or None,
        seed=base.seed + len(done),
    )
    return search if len(space.seeds) == 1 else Repeater(search, repeat=len(space.seeds))


class _Watcher(tune.Callback):
    """Tells of starts and ends, in the process that runs the sweep."""

    def __init__(
        self, space: Space, on_start: Callable[[Trial], None], on_end: Callable[[Outcome], None]
    ) -> None:
        self.space, self.on_start, self.on_end = space, on_start, on_end

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        self.on_start(_trial_of(trial.config, self.space))

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        last = trial.last_result
        if "failed" in last:
            self._end(trial, "failed", last["failed"])
        else:
            self._end(trial, "finished" if last.get("returned") else "stopped")

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        self._end(trial, "failed", _reason(trial))

    def _end(self, trial: TuneTrial, status: Status, reason: str | None = None) -> None:
        last = {k: v for k, v in trial.last_result.items() if k not in NO_RESULT}
        last = {} if status == "failed" else last
        seconds = float(trial.last_result.get("time_total_s", 0.0))
        self.on_end(Outcome(_trial_of(trial.config, self.space), status, last, seconds, reason))


def _reason(trial: TuneTrial) -> str:
    """Of an error that Tune wrote to this machine's disk: as an object where the trial's process
    met it, else, of Tune or of a callback, as text alone."""
    if trial.pickled_error_file is None:
        return Path(trial.error_file).read_text().strip().splitlines()[-1]
    error = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    if isinstance(error, RayActorError):
        return "its process died (killed, or out of memory)"
    return reason_of(error)


NO_RESULT = {
    *("config", "date", "done", "experiment_tag", "hostname", "iterations_since_restore"),
    *(
        "failed",
        "node_ip",
        "pid",
        "returned",
        "time_since_restore",
        "time_this_iter_s",
        "time_total_s",
    ),
    *("timestamp", "training_iteration", "trial_id", "checkpoint_dir_name", "checkpoint_path"),
}
"""keys that Ray Tune adds to a result, and our own marks"""
