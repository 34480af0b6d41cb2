"""Reaching a Ray cluster, or starting one on this machine.

`connect()` joins the cluster that RAY_ADDRESS names (a submitted job), else one that runs on this
machine, else starts a local one that ends with the process (see acebert/__init__.py for what it
listens on).
"""

import logging
import os
import time
from collections.abc import Callable

import ray
import ray.data
from ray.autoscaler.sdk import request_resources

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0


def connect() -> None:
    """Join or start Ray; does nothing where this process is connected already."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default
    # The dashboard is there because Ray Train's clean-up asks it whether the controller lives.
    ray.init(logging_level=logging.WARNING)
    data_context = ray.data.DataContext.get_current()  # our stages say themselves how far they are
    data_context.enable_progress_bars = False
    data_context.print_on_execution_start = False
    total = ray.cluster_resources()
    log.info(
        "ray: %s, %d CPUs, %d GPUs",
        ray.get_runtime_context().gcs_address,
        total.get("CPU", 0),
        total.get("GPU", 0),
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


def leave() -> None:
    """Leave Ray: lines that workers printed arrive by a thread, and none comes after this.

    For jobs whose last line is read by others.
    """
    ray.shutdown()
