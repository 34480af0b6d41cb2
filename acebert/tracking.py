"""MLflow: where runs are kept, how a stage becomes one, how workers reach it.

* The server is MLFLOW_TRACKING_URI's, else a sqlite file in the work directory.
* The driver makes the experiment and the run. sqlite is reached on the driver's node alone, so
  workers hand their metrics to `MetricsActor`, which is pinned there; no training step waits.
* A run belongs to a stage's digest: a job that was stopped and is started again goes on in it.
"""

import hashlib
import logging
import os
import platform
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from filelock import FileLock
from mlflow.entities import LifecycleStage, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from acebert import __version__
from acebert.config import Settings, flatten
from acebert.errors import UserError
from acebert.workdir import STAGE_FILE, digest_of, file_digests, run_stage

log = logging.getLogger(__name__)

STAGE_TAG = "acebert.stage"
DATA_TAG = "acebert.data"
MODEL_TAG = "acebert.model"
"""digest of the ingest that a run is of"""
DIGEST_TAG = "acebert.digest"
WORKDIR_TAG = "acebert.workdir"
TABLE_TAG = "table"
PRODUCT_SIDE_TAG = "acebert.product_side"
CONTENT_TAG = "acebert.content"
"""of a registered version: digest of its model directory's files"""
SHARED_STAGES = ("demo", "ingest", "vocabulary", "tokens", "features", "plan", "cnn_labels")
"""of several recipes and seeds, so that no one's name is right for them"""
Row = tuple[str, float, int]
"""name, value, step"""


def tracking_uri(settings: Settings) -> str:
    """MLFLOW_TRACKING_URI, else sqlite in the work directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{settings.workdir / 'mlflow.db'}"


def server_environment() -> dict[str, str]:
    """This process's variables for the server, credentials among them. Workers are handed them as
    arguments or objects: an actor's runtime_env is shown to whoever lists actors, and a pickled
    function may lie on disk."""
    return {k: v for k, v in os.environ.items() if k.startswith("MLFLOW_")}


def shared(settings: Settings) -> Settings:
    """For the stages that come before what a job makes: name, tag and parent of its run are not
    theirs, and no model of theirs is registered."""
    own = dict.fromkeys(("run_name", "tag", "parent_run", "register_as"))
    return settings.model_copy(update={"tracking": settings.tracking.model_copy(update=own)})


def tagged(settings: Settings, table: str) -> Settings:
    """For a row of this table."""
    tracking = settings.tracking.model_copy(update={"tag": table})
    return settings.model_copy(update={"tracking": tracking})


@contextmanager
def default_server(settings: Settings) -> Iterator[None]:
    """For those functions of MLflow that only know the process's server.

    MLflow writes it into MLFLOW_TRACKING_URI, where it would be taken for the user's: what this
    process tracks next may be another work directory's.
    """
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(tracking_uri(settings))
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None: none


def without_password(text: str) -> str:
    """For people: a URI, or a text with some, without user and password."""
    return re.sub(r"//[^/\s]*@", "//", text)


def client(settings: Settings) -> MlflowClient:
    """A client; the first one in a work directory creates the database, others wait for it.

    Raises:
        UserError: the server does not answer.
    """
    settings.workdir.mkdir(parents=True, exist_ok=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    with FileLock(settings.workdir / ".mlflow.lock"):
        made = MlflowClient(tracking_uri(settings))
        try:
            made.search_experiments(max_results=1)
        except MlflowException as error:
            uri = without_password(tracking_uri(settings))
            raise UserError(f"MLflow at {uri} does not answer") from error
    return made


def _experiment(mlflow_client: MlflowClient, settings: Settings) -> str:
    """
    Raises:
        UserError: it was deleted. MLflow keeps the name, and takes no run.
    """
    name, uri = settings.tracking.experiment, tracking_uri(settings)
    found = mlflow_client.get_experiment_by_name(name)
    if found is None:
        location = (
            (settings.workdir / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
        )
        try:
            return mlflow_client.create_experiment(name, artifact_location=location)
        except MlflowException:  # another process made it in between
            found = mlflow_client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == LifecycleStage.DELETED:
        raise UserError(
            f"--tracking.experiment {name}: it was deleted in {without_password(uri)}. Choose "
            f"another name, or restore it: MLFLOW_TRACKING_URI={without_password(uri)} "
            f"mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return found.experiment_id


class Run:
    """One MLflow run, ended whatever stops the block that it is used in. An error does not end it
    anew where somebody else did: a trial that its sweep stops dies of that, after its run."""

    def __init__(self, mlflow_client: MlflowClient, run_id: str) -> None:
        self.client = mlflow_client
        self.run_id = run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        log_rows(self.client, self.run_id, [(k, v, step) for k, v in metrics.items()])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def log_artifact(self, path: Path, under: str | None = None) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), under or path.name)
        else:
            self.client.log_artifact(self.run_id, str(path), under)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        if kind is None or self.client.get_run(self.run_id).info.status == "RUNNING":
            self.client.set_terminated(self.run_id, status)


def log_rows(mlflow_client: MlflowClient, run_id: str, rows: list[Row]) -> None:
    """Metrics in batches of the 1,000 that MLflow takes at a time."""
    now = int(time.time() * 1000)
    metrics = [Metric(name, float(value), now, step) for name, value, step in rows]
    for start in range(0, len(metrics), 1000):
        mlflow_client.log_batch(run_id, metrics=metrics[start : start + 1000])


def start_run(
    settings: Settings,
    stage: str,
    digest: str,
    *,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    started: float | None = None,
    first_step: int = 0,
) -> Run:
    """The run of this stage and digest: the unfinished one that is there, else a new one. One that
    has steps although what comes now starts at the first is another training's, and is ended.
    Where what comes goes on after `first_step`, a finished one is it too: its job was killed
    before the stage had its name.

    Params are the flat settings; tags name stage, digest, code, machine and, where
    `tracking.tag` is set, the table that the run is a row of. An unfinished run takes the name,
    the table and the parent that are asked for now. `started` is a Unix time.
    """
    mlflow_client = client(settings)
    experiment = _experiment(mlflow_client, settings)
    tracking = settings.tracking
    place = {TABLE_TAG: tracking.tag, MLFLOW_PARENT_RUN_ID: tracking.parent_run}
    own = {tag: value for tag, value in place.items() if value}
    known = mlflow_client.search_runs(
        [experiment],
        f"tags.`{STAGE_TAG}` = '{stage}' AND tags.`{DIGEST_TAG}` = '{digest}'"
        + ("" if first_step else " AND attributes.status != 'FINISHED'"),
        order_by=["attributes.start_time DESC"],
    )
    workdir = str(settings.workdir)  # another's may make the same stage, for the same server
    unfinished = next((run for run in known if run.data.tags.get(WORKDIR_TAG) == workdir), None)
    has_steps = unfinished and any(name.startswith("train/") for name in unfinished.data.metrics)
    if unfinished and has_steps and not first_step:
        mlflow_client.set_terminated(unfinished.info.run_id, "KILLED")
    elif unfinished:
        run = Run(mlflow_client, unfinished.info.run_id)
        mlflow_client.update_run(run.run_id, status="RUNNING", name=name or tracking.run_name)
        run.set_tags(own)
        log.info("mlflow: goes on in run %s", run.run_id)
        return run
    all_tags = {
        STAGE_TAG: stage,
        DIGEST_TAG: digest,
        WORKDIR_TAG: workdir,
        "acebert.recipe": settings.recipe,
        **_provenance(),
        **own,
        **(tags or {}),
    }
    created = mlflow_client.create_run(
        experiment,
        start_time=int((started or time.time()) * 1000),
        run_name=name or tracking.run_name or _run_name(settings, stage, digest),
        tags=all_tags,
    )
    flat = flatten(settings.model_dump(mode="json", exclude={"tracking"}))
    params = [Param(k, str(v)) for k, v in flat.items()]
    for start in range(0, len(params), 100):
        mlflow_client.log_batch(created.info.run_id, params=params[start : start + 100])
    return Run(mlflow_client, created.info.run_id)


def _run_name(settings: Settings, stage: str, digest: str) -> str:
    if stage in SHARED_STAGES:
        return f"{stage} {digest[:6]}"
    return f"{stage} {Path(settings.recipe).stem}, seed {settings.seed}, {digest[:6]}"


def finished_run(
    settings: Settings,
    stage: str,
    digest: str,
    table: str | None = None,
    *,
    here: bool = False,
) -> Run | None:
    """The finished run of this stage and digest, and of this table where one is given; `here`: of
    this work directory."""
    mlflow_client = client(settings)
    found = mlflow_client.search_runs(
        [_experiment(mlflow_client, settings)],
        f"tags.`{STAGE_TAG}` = '{stage}' AND tags.`{DIGEST_TAG}` = '{digest}' "
        "AND attributes.status = 'FINISHED'"
        + (f" AND tags.`{TABLE_TAG}` = '{table}'" if table else ""),
    )
    own = str(settings.workdir)
    runs = (run for run in found if not here or run.data.tags.get(WORKDIR_TAG) == own)
    run = next(runs, None)
    return None if run is None else Run(mlflow_client, run.info.run_id)


def log_model(settings: Settings, run: Run, directory: Path) -> None:
    """Log a model directory as an MLflow model of the run and, where `tracking.register_as` says
    so, register it as a new version under `tracking.alias`. Where it is a version already, as the
    best of a sweep may be, the alias alone is moved."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    from acebert.serving.query_encoder import product_side_version

    name, alias = settings.tracking.register_as, settings.tracking.alias
    content = _content(directory)
    if name is not None and (known := _version_of(run.client, name, content)):
        run.client.set_registered_model_alias(name, alias, known)
        log.info("mlflow: model %s version %s is this one, alias %s", name, known, alias)
        return
    dim = settings.model.embedding_dim
    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "query")]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, dim))]),
    )
    with (
        default_server(settings),
        mlflow.start_run(run_id=run.run_id),
        warnings.catch_warnings(),
    ):
        # About type hints and a missing input example: the signature is given.
        warnings.simplefilter("ignore", UserWarning)
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).parent / "serving" / "mlflow_model.py"),
            artifacts={"model": str(directory)},
            signature=signature,
            pip_requirements=[f"acebert=={__version__}"],
        )
        if name is None:
            return
        version = mlflow.register_model(logged.model_uri, name).version
    tags = {PRODUCT_SIDE_TAG: product_side_version(directory), CONTENT_TAG: content}
    for tag, value in tags.items():
        run.client.set_model_version_tag(name, version, tag, value)
    run.client.set_registered_model_alias(name, alias, version)
    log.info("mlflow: model %s version %s, alias %s", name, version, alias)


def _content(directory: Path) -> str:
    """Of a model directory: while it is built, under another name, as when it is whole."""
    files = file_digests(directory)
    files.pop(STAGE_FILE, None)  # written last
    return digest_of(files)


def _version_of(mlflow_client: MlflowClient, name: str, content: str) -> str | None:
    """The newest version of a registered model that has these files."""
    found = mlflow_client.search_model_versions(
        f"name = '{name}'", order_by=["version_number DESC"]
    )
    same = (str(v.version) for v in found if v.tags.get(CONTENT_TAG) == content)
    return next(same, None)


def registered_product_side(settings: Settings, address: str) -> str:
    """`product_side_version` of the model behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        UserError: the registry does not answer, or has no such model of ours.
    """
    try:
        return _registered(settings, address).tags[PRODUCT_SIDE_TAG]
    except (MlflowException, TypeError, KeyError) as error:
        raise UserError(
            f"{address}: no model that a training registered in {tracking_uri(settings)}: {error!r}"
        ) from error


def _registered(settings: Settings, address: str) -> ModelVersion:
    """
    Raises:
        MlflowException, TypeError: the registry does not answer, or has no such model.
    """
    name, at, alias = address.removeprefix("models:/").partition("@")
    if at:
        return client(settings).get_model_version_by_alias(name, alias)
    return client(settings).get_model_version(*name.split("/", 1))


def model_directory(settings: Settings, address: str | Path) -> Path:
    """A directory itself, or a registered model's, `models:/NAME@ALIAS` or `models:/NAME/VERSION`,
    of which the work directory keeps a copy. Its weights are as old as the registered version.

    Raises:
        UserError: the registry has no such model.
    """
    if isinstance(address, Path):
        return address
    import mlflow

    def build(out: Path) -> None:
        with default_server(settings):
            mlflow.artifacts.download_artifacts(
                f"models:/{found.name}/{found.version}", dst_path=str(out)
            )
        for weights in (out / "artifacts").glob("*/model.safetensors"):
            os.utime(weights, times=(created, created))

    try:
        found = _registered(settings, address)
        created = found.creation_timestamp / 1000
        key = {
            "registry": without_password(tracking_uri(settings)),
            "model": [found.name, found.version, created],
        }
        stage = run_stage(settings.workdir, "registered", key, build)
    except (MlflowException, TypeError) as error:
        raise UserError(f"--model {address}: not in {tracking_uri(settings)}: {error}") from error
    (directory,) = (stage.path / "artifacts").iterdir()
    return directory


def _provenance() -> dict[str, str]:
    cluster = ray.cluster_resources() if ray.is_initialized() else {}
    return {
        "acebert.version": __version__,
        "acebert.code": code_digest(),
        "machine.host": platform.node(),
        "machine.cpus": str(int(cluster.get("CPU", os.cpu_count() or 1))),
        "machine.gpus": str(int(cluster.get("GPU", 0))),
        "machine.python": platform.python_version(),
    }


def code_digest() -> str:
    """First 12 hex digits of a SHA-256 over the package's own source, recipes and templates."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(p for kind in ("py", "yaml", "j2") for p in root.rglob(f"*.{kind}")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class MetricsActor:
    """Takes metrics from workers and writes them on the driver's node, each step of each once.

    What a run has already is asked of MLflow, so rows may be sent again after any restart, of a
    worker, of this actor or of the job.
    """

    def __init__(self, uri: str, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self._client = MlflowClient(uri)
        self._last: dict[str, dict[str, int]] = {}

    def log(self, run_id: str, table: pa.Table) -> int:
        """Write a table's metrics that the run has not; returns how many those were.

        The table has a column `step`, ascending, and one a metric; nulls are left out.
        """
        last = self._last.pop(run_id, None)  # asked anew after a failure half-way
        if last is None:
            logged = self._client.get_run(run_id).to_proto().data.metrics
            last = {metric.key: metric.step for metric in logged}
        names = [name for name in table.column_names if name != "step"]
        oldest = min((last.get(name, -1) for name in names), default=-1)
        new = [
            (name, value, row["step"])
            for row in table.filter(pc.field("step") > oldest).to_pylist()
            for name, value in row.items()
            if name != "step" and value is not None and row["step"] > last.get(name, -1)
        ]
        log_rows(self._client, run_id, new)
        self._last[run_id] = last | {name: step for name, _, step in new}
        return len(new)


@contextmanager
def metrics_actor(settings: Settings) -> Iterator[Any]:
    """The actor's handle, pinned to this (the driver's) node, to the end of the context: that the
    handle goes to workers as bytes would keep the actor for as long as the job."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    made = MetricsActor.options(scheduling_strategy=here)  # type: ignore[attr-defined]
    actor = made.remote(tracking_uri(settings), server_environment())
    try:
        yield actor
    finally:
        ray.kill(actor)
