"""How many trainings run at once, and which share of the cluster each of their workers gets.

A training's own process and Ray Train's controller need no CPU; its workers are placed together or
not at all. So trainings that fit the cluster never wait for each other in a circle.
"""

import math

import ray

from acebert.config import Settings
from acebert.errors import UserError
from acebert.sweep.space import with_leaves

FOR_RAY = 0.1
"""share of a node's CPUs that workers leave to others"""


def place(base: Settings, wanted: int | None, name: str) -> tuple[int, Settings]:
    """Trainings at once, and `base` with the share of CPUs and threads of each worker.

    Neither changes what is trained, so a training is the same stage however it was placed.

    Args:
        wanted: trainings at once, which the user gave as `name`; None: one on CPUs, as many as
            find GPUs, or as `train.cpus_per_worker` leaves room for.

    Raises:
        UserError: they do not fit the cluster.
    """
    train = base.train
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    use_gpu = gpus > 0 if train.use_gpu is None else train.use_gpu

    def fitting(share: float) -> int:
        """Workers with this many CPUs, and a GPU each if they take any."""
        return sum(
            int(min(node["CPU"] / share + 1e-9, node.get("GPU", 0) if use_gpu else math.inf))
            for node in nodes
            if node.get("CPU", 0) > 0
        )

    most = fitting(train.cpus_per_worker or 1.0) // train.num_workers
    # CPUs may be shared out at will; unless told how, there is one training. A worker is on one
    # node, so several are filled by train.num_workers, `wanted` or train.cpus_per_worker.
    default = max(1, most) if use_gpu or train.cpus_per_worker else 1
    at_once = wanted or default
    if at_once > max(1, most):
        needs = f"{train.cpus_per_worker or 1:g} CPUs" + (" and a GPU" if use_gpu else "")
        raise UserError(
            f"{name} {at_once}: the cluster has room for {max(1, most)} at once, with "
            f"{train.num_workers} workers a training (train.num_workers) of {needs} each"
        )
    if at_once == 1:
        return at_once, base
    share = cpus = train.cpus_per_worker
    if share is None:
        workers = at_once * train.num_workers
        shares = (n["CPU"] / k for n in nodes if n.get("CPU") for k in range(1, workers + 1))
        share = next(s for s in sorted(shares, reverse=True) if fitting(s) >= workers)
        cpus = math.floor(100 * (1 - FOR_RAY) * share) / 100
    # Else each would take as many threads as its node has cores.
    threads = train.threads_per_worker or max(1, int(share))
    return at_once, with_leaves(
        base, {"train.cpus_per_worker": cpus, "train.threads_per_worker": threads}
    )
