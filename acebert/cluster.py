"""Reaching a Ray cluster, or starting one on this machine.

`connect()` joins the cluster that RAY_ADDRESS names (a submitted job), else one that runs on this
machine, else starts a local one that ends with the process. Whatever is started here listens on
127.0.0.1 only and sends no usage report, unless the environment says otherwise.
"""

import logging
import os

import ray

log = logging.getLogger(__name__)

PRIVATE_BY_DEFAULT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the node's address is then 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; silences a warning
}


def connect() -> None:
    """Join or start Ray; does nothing where this process is connected already."""
    if ray.is_initialized():
        return
    for name, value in PRIVATE_BY_DEFAULT.items():
        os.environ.setdefault(name, value)
    context = ray.init(
        log_to_driver=True,
        include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
        logging_level=logging.WARNING,
    )
    total = ray.cluster_resources()
    log.info(
        "ray: %s, %d CPUs, %d GPUs",
        context.address_info["address"],
        total.get("CPU", 0),
        total.get("GPU", 0),
    )
