"""Training on Ray Train, whatever is trained: workers, restarts, checkpoints, MLflow.

    stage = trained_stage(settings, "finetune", key, worker, config, export, ingested.digest)

`worker(settings, config, rank)` is a module's function that trains one rank: it starts from
`rank.resume`, calls `rank.save(tensors, progress)` on all ranks at the same steps, and returns when
it is done. After any death Ray Train starts all ranks again, and they go on from the newest whole
checkpoint; a job that was stopped does the same when it is started again.

* A step reaches MLflow when a checkpoint holds it, from the thread that wrote that; the actor drops
  what the run has already (`acebert.tracking.MetricsActor`). So no step is there twice or missing.
* An error in our code is tried again like a death, for the survivors of a node that fell silent
  report one too. It is raised when it has come again before a new checkpoint, and nobody died.
* A UserError inside a worker is returned, not raised: Ray Train would restart what cannot succeed.
  One that a rank meets alone is raised, for the others wait for that rank: Ray Train stops them,
  and the ranks that it starts next return the message.
* `train.max_failures` counts deaths without a new checkpoint: a long run may die more often.
"""

import gc
import logging
import math
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.train
import torch
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from acebert.cluster import bring_workers, cores_here, node_resources, room_for
from acebert.config import Settings, settings_from
from acebert.errors import AgreedError, UserError, reason_of
from acebert.job import set_up_logging
from acebert.training.checkpoint import (
    Checkpoints,
    Progress,
    begun_otherwise,
    code_identity,
    load_progress,
    load_tensors,
)
from acebert.training.joining import JoiningConfig
from acebert.training.steps import Rank, of_rank_zero
from acebert.workdir import Stage, digest_of, run_stage

if TYPE_CHECKING:
    from acebert.tracking import Run

log = logging.getLogger(__name__)

DEATHS = WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError, RayActorError
MLFLOW_SECONDS = 60.0
MLFLOW_PAUSES = 1.0, 5.0, 20.0  # before the last steps are sent again
NODES_SECONDS = 5.0
COLLECTIVE_SECONDS = 4 * 3600  # a node that joins late first copies the features to its disk


Worker = Callable[[Settings, dict[str, Any], Rank], None]
Export = Callable[[Checkpoints, "Run", Path], None]


def trained_stage(
    settings: Settings,
    stage: str,
    key: dict[str, Any],
    worker: Worker,
    config: dict[str, Any],
    export: Export,
    data: str,
    *,
    name: str | None = None,
) -> Stage:
    """Run `worker` on `train.num_workers` ranks to its end, and make a stage of what it trained.

    Args:
        settings: `train` says how many workers with what, and how often to save
        stage: the stage's name
        key: the stage's key, by which checkpoints lie apart; one of other code is refused
        worker: see the module's docstring
        config: handed to each worker; has to pickle
        export: writes the stage's directory; the newest checkpoint is the last
        data: the digest of what it learns from
        name: of the MLflow run, which takes `history` as train/… and `validations` as valid/…

    Raises:
        UserError: the cluster lacks what is asked for, a checkpoint is of other code, the disk is
            full, or what the worker raised.
    """
    digest = digest_of(key)
    directory = settings.workdir / "train" / f"{stage}-{digest}"

    def build(out: Path) -> None:
        # MLflow: a second no worker needs
        from acebert.tracking import DATA_TAG, metrics_actor, start_run

        identity = {"key": dict(key), "code": code_identity()}
        kept = settings.train.checkpoints_kept
        checkpoints = Checkpoints(directory / "checkpoints", identity, kept)
        newest = checkpoints.newest()  # refuses before anything is started
        step = load_progress(newest).step if newest else 0
        if not newest and settings.tracking.parent_run is None:  # a sweep has many side by side
            for other in begun_otherwise(directory, stage, key):
                log.warning("%s: begins anew in %s, not from %s", stage, directory, other)
        tags = {DATA_TAG: data}
        with start_run(settings, stage, digest, name=name, tags=tags, first_step=step) as mlrun:
            with metrics_actor(settings) as actor:
                _train(settings, checkpoints, newest, identity, worker, config, mlrun, actor)
            export(checkpoints, mlrun, out)

    built = run_stage(settings.workdir, stage, key, build)
    shutil.rmtree(directory, ignore_errors=True)  # its checkpoints
    return built


def _train(
    settings: Settings,
    checkpoints: Checkpoints,
    newest: Path | None,
    identity: dict[str, Any],
    worker: Worker,
    config: dict[str, Any],
    mlrun: "Run",
    actor: Any,
) -> None:
    directory = checkpoints.directory.parent
    gc.collect()
    torch.cuda.empty_cache()  # what this process measured another model with
    cpus, use_gpu = _resources(settings)
    # Ray Train looks at its workers this often (its default: 2 s); a start and an end wait for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if len(node_resources()) == 1:  # it warns of nodes that are taken away: a process, and a line
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    train = settings.train
    workers = (train.min_workers, train.num_workers) if train.min_workers else train.num_workers
    each = "1 GPU" if use_gpu else f"{cpus:g} CPUs"
    log.info(
        "%s: workers: %d, each %s, %s", directory.name, train.num_workers, each, train.precision
    )
    bundle = {"CPU": cpus, **({"GPU": 1} if use_gpu else {})}
    loop = {
        "settings": settings.model_dump(mode="json"),
        "worker": worker,
        "config": config,
        "directory": checkpoints.directory,
        "identity": identity,
        "actor": actor,
        "mlflow_run": mlrun.run_id,
    }
    trainer = TorchTrainer(
        _run_rank,  # type: ignore[arg-type]
        # As bytes, or Ray Train's controller imports torch and transformers to unpickle it, for
        # seconds in which no worker starts.
        train_loop_config={"loop": ray.cloudpickle.dumps(loop)},
        torch_config=JoiningConfig(timeout_s=COLLECTIVE_SECONDS, max_failures=train.max_failures),
        scaling_config=ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # Train V2's; the checker sees V1's
            use_gpu=use_gpu,
            resources_per_worker=bundle,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # Train V2's
            name=directory.name,
            storage_path=str(directory.parent),
            failure_config=FailureConfig(max_failures=train.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    with _nodes_watched(bundle, train.num_workers, train.min_workers or train.num_workers):
        message = _fit(trainer, checkpoints, newest, train.max_failures)
    if message is not None:
        raise UserError(message)
    last = checkpoints.newest()
    if last is not None:
        _send_the_rest(_mlflow_sender(actor, mlrun.run_id), load_progress(last))


def _fit(
    trainer: TorchTrainer, checkpoints: Checkpoints, before: Path | None, max_failures: int
) -> str | None:
    """Train to the end, again and again while deaths leave a newer checkpoint than `before`; the
    message of a UserError inside, if there was one.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        UserError: workers died `max_failures` + 1 times without a new checkpoint.
        ControllerError: they failed to join each other so many times in a row.
    """
    told = _told_by_a_rank(checkpoints.directory)
    while True:
        told.unlink(missing_ok=True)
        try:
            with _ray_by_address(), _ctrl_c_as_elsewhere():
                result: Any = trainer.fit()  # Train V2's Result; the annotation names V1's
            return result.return_value
        except WorkerGroupError as error:
            if message := _message_in(told):
                return message
            failures = error.worker_failures.values()
            newest = checkpoints.newest()
            if newest == before:
                if not any(isinstance(failure, DEATHS) for failure in failures):
                    raise
                stage = checkpoints.directory.parent.name.partition("-")[0]
                part = "train.micro_batch" if stage == "finetune" else f"{stage}.batch_size"
                where = f"after {newest.name}" if newest else "before the first checkpoint"
                raise UserError(
                    f"{checkpoints.directory.parent.name}: workers died {max_failures + 1} times "
                    f"{where} (--train.max_failures {max_failures}): {_first_line(failures)}. "
                    "Start the job again, it goes on from there; workers that are killed for "
                    f"memory need a smaller --{part}"
                ) from error
            log.warning("workers died, goes on from %s: %s", newest, _first_line(failures))
            before = newest


@contextmanager
def _ctrl_c_as_elsewhere() -> Iterator[None]:
    """Ray Train answers Ctrl-C, when its workers have ended, by ending the process without a word,
    and goes on to do so after the training.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if current_thread() is main_thread():  # Ray Train leaves signals alone in another
            signal.signal(signal.SIGINT, before)


def _told_by_a_rank(directory: Path) -> Path:
    """The file that takes the message of a UserError which one rank met alone."""
    return directory.parent / "error.txt"


def _message_in(told: Path) -> str:
    """Empty where there is none, or where the disk had no room for it."""
    return told.read_text() if told.exists() else ""


def _first_line(failures: Collection[Exception]) -> str:
    """Of a death, where there is one: the others lost a rank that they waited for."""
    told = min(failures, key=lambda failure: not isinstance(failure, DEATHS))
    return str(told).strip().partition("\n")[0]


@contextmanager
def _nodes_watched(bundle: dict[str, float], workers: int, least: int) -> Iterator[None]:
    """Says when the nodes that are left have no room for `workers` times `bundle` any more.

    Ray Train waits for a place without a word, for as long as it takes.
    """
    done = Event()

    def watch() -> None:
        before = workers
        while not done.wait(NODES_SECONDS):
            room = min(workers, room_for(bundle))
            if room < before:
                what = "goes on with fewer" if room >= least else "waits for a node"
                log.warning("the nodes have room for %d of %d workers: %s", room, workers, what)
            elif room > before:
                log.info("the nodes have room for %d of %d workers again", room, workers)
            before = room

    thread = Thread(target=watch, name="nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _ray_by_address() -> Iterator[None]:
    """Tells the actors of Ray Train which Ray they belong to.

    Its clean-up asks the state API about the controller, in a process that knows the cluster by
    RAY_ADDRESS or else looks for one on the machine. Where there are two it takes the other one or
    none, and a killed trial's workers would keep their CPUs.
    """
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


def _resources(settings: Settings) -> tuple[float, bool]:
    """CPUs a worker, and whether each takes a GPU; refuses what the cluster does not give, or not
    within `train.wait_minutes`."""
    train = settings.train
    least = train.min_workers or train.num_workers
    bring_workers(train)
    nodes = node_resources()
    gpus = sum(node.get("GPU", 0) for node in nodes)
    use_gpu = gpus > 0 if train.use_gpu is None else train.use_gpu
    if use_gpu and gpus < least:
        raise UserError(
            f"--train.num_workers {least}: the cluster has {gpus:.0f} GPUs. Ask for fewer "
            "workers, or train on CPUs with --train.use_gpu false. If it grows on demand, say how "
            "long to wait for them: --train.wait_minutes"
        )
    if not any(node.get("CPU", 0) > 0 for node in nodes):
        raise UserError(
            "the cluster has no CPUs for workers. If it grows on demand, say how long to wait for "
            "them: --train.wait_minutes"
        )
    places = [
        (node["CPU"], node.get("GPU", 0) if use_gpu else math.inf)
        for node in nodes
        if node.get("CPU", 0) > 0
    ]

    def fitting(share: float) -> int:
        return sum(int(min(cpus / share + 1e-9, gpus)) for cpus, gpus in places)

    if train.cpus_per_worker:
        if fitting(train.cpus_per_worker) < least:
            raise UserError(
                f"--train.cpus_per_worker {train.cpus_per_worker}: {least} workers of these do not "
                f"fit the cluster's nodes, which have {[cpus for cpus, _ in places]} CPUs"
            )
        return train.cpus_per_worker, use_gpu
    # The largest share of a node at which all workers find a place; a tenth is Ray's own.
    shares = sorted(
        (0.9 * cpus / k for cpus, _ in places for k in range(1, train.num_workers + 1)),
        reverse=True,
    )
    share = next((s for s in shares if fitting(s / 0.9) >= train.num_workers), shares[-1])
    return math.floor(100 * share) / 100, use_gpu


def _run_rank(given: dict[str, bytes]) -> str | None:
    """One rank, inside Ray Train. Returns the message of a UserError."""
    loop: dict[str, Any] = ray.cloudpickle.loads(given["loop"])
    told = _told_by_a_rank(loop["directory"])
    if message := _message_in(told):
        return message
    logging.getLogger().handlers.clear()  # Ray Train's: no time of day, and a line for each report
    set_up_logging()
    settings = settings_from(loop["settings"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    # It takes the first GPU of a node where none was asked for.
    device = ray.train.torch.get_device() if ray.get_gpu_ids() else torch.device("cpu")
    if device.type == "cpu":
        cores = cores_here() // context.get_local_world_size()
        torch.set_num_threads(settings.train.threads_per_worker or max(1, cores))
    checkpoints = Checkpoints(loop["directory"], loop["identity"], settings.train.checkpoints_kept)
    send = _in_the_background(_mlflow_sender(loop["actor"], loop["mlflow_run"]))
    path = broadcast_from_rank_zero(checkpoints.newest() if rank == 0 else None)
    is_trial = settings.tracking.parent_run is not None
    if path is not None:
        progress = load_progress(path)
        # A sweep that was stopped has forgotten them. Ray Train takes two a second.
        for validation in progress.validations if is_trial else ():
            ray.train.report(validation)
        if rank == 0:
            name = checkpoints.directory.parent.name
            log.info("%s: goes on after step %d, with %d workers", name, progress.step, world)
            send(progress)

    def resume() -> tuple[Mapping[str, Any], Progress]:
        return load_tensors(path, device), load_progress(path)

    def save(tensors: Mapping[str, Any], progress: Progress) -> None:
        validated = bool(progress.validations) and progress.validations[-1]["step"] == progress.step
        problem = None
        # One that is merely due is left out while the last is being written: no step waits.
        if rank == 0 and (validated or not checkpoints.busy()):
            try:
                checkpoints.save(tensors, progress, then=send)
            except UserError as error:
                problem = error
        # The others would wait for rank 0 in the next step.
        if any(of_rank_zero([float(problem is not None)], world)):
            raise AgreedError(problem or "rank 0 could not write the checkpoint")
        if validated and is_trial:  # the sweep looks at these
            ray.train.report(progress.validations[-1])

    try:
        try:
            _refuse_other_code(loop["identity"]["code"])
            own = Rank(rank, world, device, save, None if path is None else resume)
            loop["worker"](settings, loop["config"], own)
        finally:
            checkpoints.wait()
    except UserError as error:
        if world > 1 and not isinstance(error, AgreedError):
            told.write_text(str(error))
            raise
        return str(error)
    return None


def _refuse_other_code(of_job: dict[str, str]) -> None:
    """
    Raises:
        UserError: this node trains with other code than the job's, whose name checkpoints bear.
    """
    here = code_identity()
    if other := sorted(name for name in here | of_job if here.get(name) != of_job.get(name)):
        raise UserError(
            f"node {platform.node()} has another {', '.join(other[:5])}"
            + (f" and {len(other) - 5} more" if len(other) > 5 else "")
            + " than the job. Install the same version on all nodes, or submit the job by "
            "`ray job submit --working-dir`, which brings its source along"
        )


def _mlflow_sender(actor: Any, run_id: str) -> Callable[[Progress], None]:
    """A function that sends MLflow the steps and validations it has not had; what cannot be sent
    goes with the next call.

    The function raises:
        RayError: MLflow does not take them, or not in time.
    """
    steps = 0

    def send(progress: Progress) -> None:
        nonlocal steps
        history = progress.history  # of now: training may go on with this progress meanwhile
        tables = [_named("train", history[steps:])]
        if progress.validations:
            tables.append(_named("valid", pa.Table.from_pylist(list(progress.validations))))
        ray.get([actor.log.remote(run_id, table) for table in tables], timeout=MLFLOW_SECONDS)
        steps = history.num_rows

    return send


def _in_the_background(send: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """`send` in a thread, which leaves out what comes while it is busy: no checkpoint waits for an
    MLflow that does not answer, and the next call brings what was left out."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
    sending: Future[None] | None = None

    def try_to(progress: Progress) -> None:
        try:
            send(progress)
        except RayError as error:
            log.warning("MLflow does not take the metrics, they will be sent again: %s", error)

    def submit(progress: Progress) -> None:
        nonlocal sending
        if sending is None or sending.done():
            sending = thread.submit(try_to, progress)

    return submit


def _send_the_rest(send: Callable[[Progress], None], progress: Progress) -> None:
    """What MLflow did not take before; a run without it must not be a finished one.

    Raises:
        UserError: MLflow does not take it, as often as it is sent.
    """
    for pause in (*MLFLOW_PAUSES, None):
        try:
            return send(progress)
        except RayError as error:
            if pause is None:
                raise UserError(
                    "trained to the end, but MLflow does not take the last metrics: "
                    f"{reason_of(error)}. Give the same command again when it does: they are sent "
                    "from the last checkpoint, nothing is trained again"
                ) from error
            log.warning("MLflow does not take the last metrics, again in %g s: %s", pause, error)
            time.sleep(pause)


def _named(prefix: str, table: pa.Table) -> pa.Table:
    return table.rename_columns(
        [name if name == "step" else f"{prefix}/{name}" for name in table.column_names]
    )
