"""Reaching a Ray cluster, or starting one on this machine.

`connect()` joins the cluster that RAY_ADDRESS names (a submitted job), else one that runs on this
machine, else starts a local one that ends with the process (see acebert/__init__.py for what it
listens on).
"""

import importlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import current_thread, main_thread
from types import FrameType

import ray
import ray.data
from ray.autoscaler.sdk import request_resources

from acebert.config import TrainSettings
from acebert.errors import UserError

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0


def connect() -> None:
    """Join or start Ray; does nothing where this process is connected already.

    From then on SIGTERM, by which `ray job stop` and cluster managers end a job, does what Ctrl-C
    does: with Ray's own handler a training aborts.

    Raises:
        UserError: a Ray of our own did not come up in time.
    """
    if ray.is_initialized():
        _quieten()
        return
    # Tasks and actors that were given no GPU see none, and stay off those that others train on.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    # The dashboard is there because Ray Train's clean-up asks it whether the controller lives.
    try:
        ray.init(logging_level=logging.WARNING)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise UserError(
            "Ray did not start in time: the machine is busy, or short of memory. Give the same "
            "command again, what is done is reused"
        ) from error
    _quieten()
    if current_thread() is main_thread():
        signal.signal(signal.SIGTERM, _as_ctrl_c)
    total = ray.cluster_resources()
    log.info(
        "ray: %s, %d CPUs, %d GPUs",
        ray.get_runtime_context().gcs_address,
        total.get("CPU", 0),
        total.get("GPU", 0),
    )


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does now: in a training Ray Train's handler ends the workers first."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        handler = signal.default_int_handler
    handler(signal.SIGINT, frame)


def connect_and_load() -> None:
    """`connect`, and import the stages meanwhile: each takes a core several seconds.

    Raises:
        UserError: as `connect`.
    """
    with ThreadPoolExecutor(1) as other:
        loading = other.submit(importlib.import_module, "acebert.pipeline")
        connect()
        loading.result()
    _quieten()


def _quieten() -> None:
    for chatty in ("ray.data", "ray.train"):  # after their import, which sets the level
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It says that there are no progress bars: our stages say themselves how far they are.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    data_context = ray.data.DataContext.get_current()
    data_context.enable_progress_bars = False
    data_context.print_on_execution_start = False


def room_for(bundle: Mapping[str, float]) -> int:
    """How many times `bundle` the nodes that are there have room for, were they free."""
    return sum(
        min(int(node.get(k, 0) / v + 1e-9) for k, v in bundle.items()) for node in node_resources()
    )


def bring_workers(train: TrainSettings) -> None:
    """Ask a cluster that grows on demand for what the training's workers need, and wait up to
    `train.wait_minutes` for the least of them; nothing where that is 0."""
    if train.wait_minutes:
        bundle = {"CPU": train.cpus_per_worker or 1.0} | ({"GPU": 1.0} if train.use_gpu else {})
        least = train.min_workers or train.num_workers
        wait_for_nodes(
            bundle, train.num_workers, train.wait_minutes, lambda: room_for(bundle) >= least
        )


def wait_for_nodes(
    bundle: dict[str, float], count: int, minutes: float, fits: Callable[[], bool]
) -> None:
    """Ask the autoscaler for `count` times the resources of `bundle`; return when `fits()` says
    that they are there, or when `minutes` have passed."""
    if fits():
        return
    log.info("ray: asks for %d × %s, waits up to %g minutes", count, bundle, minutes)
    end = time.monotonic() + 60 * minutes
    request_resources(bundles=[bundle] * count)
    try:
        while not fits() and time.monotonic() < end:
            time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))
    finally:
        request_resources(bundles=[])  # it stands until it is taken back, and nodes with it


@dataclass(frozen=True)
class EncoderPool:
    """Actors on Ray Data that encode by a model, all alike.

    Attributes:
        actors: how many
        num_gpus: of each, 0 or 1
        num_cpus: that Ray reserves for each; None: what Ray Data gives a GPU's actor
        threads: torch threads of each where it has no GPU
    """

    actors: int
    num_gpus: int
    num_cpus: float | None
    threads: int


def encoder_pool(wanted: int | None, nodes: Sequence[Mapping[str, float]]) -> EncoderPool:
    """`wanted` actors, or one a GPU, or where there are none one on each of the largest nodes. On
    CPUs they reserve half of a node, for who reads and writes, and compute with all of it.

    Args:
        wanted: eval.num_actors
        nodes: resources of the cluster's nodes, as `node_resources` gives them

    Raises:
        UserError: more actors than GPUs, or a cluster without CPUs.
    """
    gpus = int(sum(int(node.get("GPU", 0)) for node in nodes))
    if gpus:
        if wanted and wanted > gpus:
            raise UserError(
                f"--eval.num_actors {wanted}: the cluster has {gpus} GPUs, one an actor"
            )
        return EncoderPool(wanted or gpus, 1, None, 1)
    halves = [node["CPU"] / 2 for node in nodes if node.get("CPU", 0) > 0]
    if not halves:
        raise UserError("the cluster has no CPUs to encode on")

    def places(share: float) -> int:
        return sum(int(half / share + 1e-9) for half in halves)

    actors = wanted or places(max(halves))
    shares = sorted({half / k for half in halves for k in range(1, actors + 1)}, reverse=True)
    share = next(share for share in shares if places(share) >= actors)
    return EncoderPool(actors, 0, share, max(1, int(2 * share + 1e-9)))


def node_resources() -> list[dict[str, float]]:
    """Of each node that is there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def is_alone() -> bool:
    """One node without GPUs: actors would compute with the cores that this process has, and start
    for seconds before that."""
    nodes = node_resources()
    return len(nodes) == 1 and not nodes[0].get("GPU")


def cores_here() -> int:
    """Cores that this process may use: no more than Ray counts on its node, for Ray knows the quota
    of a container, which the system's own count does not show."""
    node = ray.get_runtime_context().get_node_id()
    (counted,) = (n["Resources"].get("CPU", 1) for n in ray.nodes() if n["NodeID"] == node)
    return max(1, min(len(os.sched_getaffinity(0)), int(counted)))


def leave() -> None:
    """Leave Ray: lines that workers printed arrive by a thread, and none comes after this.

    For jobs whose last line is read by others.
    """
    ray.shutdown()
