"""A sweep: prepare what trials share, run them, keep what became of them, say which is best.

    directory = sweep(settings, "fig5_partitions", read_space(path))

`<workdir>/sweep/<name>-<digest>/` holds `space.yaml`, `trials/` (a record each), `trials.parquet`,
`best.yaml`, `sweep.png`, `report.txt`. Started again, a sweep runs what has not ended yet: trials
that were cut off go on from their checkpoints, those that failed are tried once more.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock

from acebert.cluster import connect
from acebert.config import HOW_IT_RUNS, Settings
from acebert.evaluation import embed
from acebert.evaluation.evaluate import evaluation_key
from acebert.evaluation.tables import read_metrics
from acebert.pipeline import evaluate_stage
from acebert.sweep import training
from acebert.sweep.children import Children
from acebert.sweep.figure import sweep_figure
from acebert.sweep.placement import place
from acebert.sweep.records import Records
from acebert.sweep.results import (
    METRICS,
    best,
    best_trial,
    table_text,
    values,
    write_recipe,
    write_table,
)
from acebert.sweep.space import Space, Trial, check_space, with_leaves
from acebert.sweep.training import Prepared
from acebert.sweep.trials import Objective, Outcome, points_tried, run_trials
from acebert.tracking import Run, log_model, start_run
from acebert.workdir import digest_of

log = logging.getLogger(__name__)

VERSION = 1
REPORT = "report.txt"  # written last: all is done, and the run in MLflow has ended
SEARCHED = ".searched"
"""marks that the search has chosen its points"""
TEST_KEY = "test_key"
"""in a finished trial's result: digest of how its numbers of the test day were made"""
NO_PART_OF_IT: Any = {
    **dict.fromkeys(("recipe", "workdir", "tracking", "eval"), True),
    **dict.fromkeys(("distill", "serve", "experiment"), True),
    "data": {"memory_limit"},
    "image": {"feature_cache", "feature_cache_dir"},
    "train": set(HOW_IT_RUNS),
}
"""of the settings: what changes nothing that a trial trains"""


def sweep(
    settings: Settings,
    name: str,
    space: Space,
    *,
    evaluate: bool = False,
    prepare: Callable[[Settings, Space], Prepared] = training.prepare,
    train: Objective = training.train,
) -> Path:
    """Run a sweep to its end; its directory.

    Args:
        settings: what all trials have in common.
        name: of the sweep; the tag `table` of its trials' runs, unless `tracking.tag` is set.
        evaluate: measure every finished trial on the test day too, after all choices are made.
        prepare, train: what a trial is, and what comes before the first one.

    Raises:
        UserError: the space asks for what is not there, before anything runs.
    """
    check_space(space, settings)
    with_leaves(settings, {"tracking.tag": settings.tracking.tag or name})  # may refuse the name
    connect()
    at_once, base = place(settings, space.trials_at_once, "trials_at_once")
    ready = prepare(settings, space)  # what they share may take the whole cluster
    key = {
        "version": VERSION,
        "space": space.model_dump(exclude={"trials_at_once"}),
        "settings": settings.model_dump(mode="json", exclude=NO_PART_OF_IT),
        "shared": ready.identity,
    }
    digest = digest_of(key)
    directory = settings.workdir / "sweep" / f"{name}-{digest}"
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / ".lock"):
        records = Records(directory / "trials")
        one = _Sweep(settings, base, name, digest, space, directory, records)
        if one.is_done(ready.trials, evaluate):
            log.info("sweep: reused %s", directory)
            print(table_text(space, one.records.ended()))
            return directory
        one.run(ready.trials, train, at_once, evaluate)
    return directory


@dataclass
class _Sweep:
    settings: Settings
    base: Settings
    """the settings with each worker's place in the cluster"""
    name: str
    digest: str
    space: Space
    directory: Path
    records: Records

    def is_done(self, trials: list[Trial], evaluate: bool) -> bool:
        finished = [o for o in self.records.ended() if o.status == "finished"]
        tested = not evaluate or all(self._is_tested(o) for o in finished)
        written = (self.directory / REPORT).exists() and tested
        return written and not self._to_do(trials) and not self._points_left()

    def _is_tested(self, outcome: Outcome) -> bool:
        """Whether the trial's numbers of the test day are there, and are what they would be if it
        were evaluated now."""
        if outcome.result.get(TEST_KEY) != self._test_key():
            return False
        return (Path(outcome.result["test_row"]) / "metrics.json").is_file()

    def _test_key(self) -> str:
        return digest_of(
            [embed.VERSION, evaluation_key(self.settings), self.settings.eval.dimensions]
        )

    def run(self, trials: list[Trial], train: Objective, at_once: int, evaluate: bool) -> None:
        (self.directory / REPORT).unlink(missing_ok=True)
        tracking = self.base.tracking
        untagged = tracking.model_copy(update={"tag": None})  # the table is of trials alone
        with start_run(
            self.base.model_copy(update={"tracking": untagged}),
            "sweep",
            self.digest,
            name=f"sweep {self.name}",
            first_step=len(self.records.ended()),  # it goes on, if only to evaluate
        ) as run:
            children = Children(run, self.digest, tracking.tag or self.name)
            children.end()  # of a try that was killed
            try:
                self._run_trials(trials, train, at_once, children)
            finally:
                children.end()
            for outcome in self.records.ended():
                if outcome.status == "stopped":  # for good: a failed one goes on from its own
                    for digest in children.end(outcome.trial.name, stopped=True):
                        checkpoints = self.base.workdir / "train" / f"finetune-{digest}"
                        shutil.rmtree(checkpoints, ignore_errors=True)
            self._write_tables()  # they hold whatever becomes of the evaluation
            if evaluate:
                self._evaluate(children)
            text = self._write(run)
        if any(o.status == "failed" for o in self.records.ended()):
            run.client.set_terminated(run.run_id, "FAILED")  # it goes on when started again
        (self.directory / REPORT).write_text(text)

    def _to_do(self, trials: list[Trial]) -> list[Trial]:
        """Of these and of all that were ever started, with all their seeds: what has not ended,
        failed, or lost its model since."""
        started = [outcome.trial for outcome in self.records.all.values()]
        siblings = [Trial(t.point, seed) for t in started for seed in self.space.seeds]
        wanted = {trial.digest: trial for trial in [*trials, *siblings]}
        done = {o.trial.digest for o in self.records.ended() if _holds(o)}
        return [trial for digest, trial in wanted.items() if digest not in done]

    def _points_left(self) -> int:
        """Points that Optuna has still to choose: none once it was done, for it may choose a point
        twice, of few values it has to."""
        if self.space.search != "optuna" or (self.directory / SEARCHED).exists():
            return 0
        assert self.space.points is not None
        return self.space.points - len(points_tried(list(self.records.all.values())))

    def _run_trials(
        self, trials: list[Trial], train: Objective, at_once: int, children: Children
    ) -> None:
        base = children.adopt(self.base)
        total = (self.space.points or 0) * len(self.space.seeds)
        total = total if self.space.search == "optuna" else len(trials)

        def on_start(trial: Trial) -> None:
            self.records.put(Outcome(trial, "running", {}, 0.0))
            log.info("sweep: %s starts", trial.name)

        def on_end(outcome: Outcome) -> None:
            children.end(outcome.trial.name)
            self.records.put(children.note(outcome, base))
            self._say(outcome, total, at_once)

        for listed in (self._to_do(trials), None):
            if listed or (listed is None and self._points_left()):
                run_trials(
                    self.space,
                    base,
                    listed,
                    self.records.ended(),
                    train,
                    on_start,
                    on_end,
                    at_once=at_once,
                    storage=self.directory / "tune",
                )
        (self.directory / SEARCHED).touch()

    def _say(self, outcome: Outcome, total: int, at_once: int) -> None:
        """The table so far, and how long the rest will take."""
        ended = self.records.ended()
        spent = [o.seconds for o in ended if not o.result.get("reused")]
        left = ""
        if len(ended) < total:  # the whole table comes at the end
            if spent:
                minutes = float(np.mean(spent)) * (total - len(ended)) / at_once / 60
                left = f", about {minutes:.0f} min left"
            left += f"\n{table_text(self.space, ended)}"
        log.info(
            "sweep: %s %s, %d of %d trials ended%s",
            outcome.trial.name,
            "was trained before" if outcome.result.get("reused") else outcome.status,
            len(ended),
            total,
            left,
        )

    def _evaluate(self, children: Children) -> None:
        """GAUC and Recall@100 on the test day; which point is best is decided without them."""
        ended = self.records.ended()
        to_do = [o for o in ended if o.status == "finished" and not self._is_tested(o)]
        for i, outcome in enumerate(to_do, 1):
            log.info("sweep: evaluates %d of %d, %s", i, len(to_do), outcome.trial.name)
            below = {"tag": None, "parent_run": outcome.result.get("mlflow_run")}
            tracking = self.base.tracking.model_copy(update=below)
            base = self.base.model_copy(update={"tracking": tracking})
            settings = outcome.trial.settings(base)
            _, row = evaluate_stage(settings, Path(outcome.result["model"]))
            overall = read_metrics(row.path)["overall"]
            test = {
                f"test_{name}": overall[name] for name in METRICS if overall.get(name) is not None
            }
            others = {k: v for k, v in outcome.result.items() if not k.startswith("test_")}
            result = {**others, **test, "test_row": str(row.path), TEST_KEY: self._test_key()}
            noted = children.note(replace(outcome, result=result), children.adopt(self.base))
            self.records.put(noted)

    def _write_tables(self) -> None:
        outcomes = self.records.ended()
        space = self.space.model_dump(mode="json")
        (self.directory / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
        write_table(self.space, outcomes, self.directory / "trials.parquet")
        winners = best(self.space, outcomes)
        if winners is not None:
            path = self.directory / "best.yaml"
            write_recipe(self.name, self.space, winners, self.settings, path)

    def _write(self, run: Run) -> str:
        """Everything but the report, which is returned."""
        outcomes = self.records.ended()
        text = table_text(self.space, outcomes)
        print(text)
        self._write_tables()
        winners = best(self.space, outcomes)
        if winners is not None:
            run.log_metrics(
                {
                    f"best/{m}": float(np.mean(values(winners, m)))
                    for m in METRICS
                    if m in winners[0].result
                }
            )
            winner = best_trial(self.space, winners)
            if "model" in winner.result:
                log_model(winner.trial.settings(self.base), run, Path(winner.result["model"]))
        try:
            sweep_figure(self.name, self.space, outcomes, self.directory / "sweep.png")
        except Exception:  # whatever was varied: the rest says all that the figure does
            log.exception("sweep: the figure could not be drawn")
        for artifact in sorted(self.directory.glob("*.*")):
            if artifact.is_file() and not artifact.name.startswith("."):
                run.log_artifact(artifact)
        run.client.log_text(run.run_id, text, REPORT)
        return text


def _holds(ended: Outcome) -> bool:
    """Whether a trial that has ended need not run again."""
    if ended.status == "finished" and "model" in ended.result:
        return Path(ended.result["model"]).is_dir()
    return ended.status != "failed"
