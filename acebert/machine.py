"""The machine that something ran on, in words."""

import os
import platform
from pathlib import Path

import ray

ACCELERATOR = "accelerator_type:"
"""before the name of a GPU among Ray's resources"""


def machine() -> str:
    """`AMD EPYC 9754, 16 CPUs, 1 GPU (H200)`: this node's processor, the cluster's CPUs and GPUs
    (of this node where Ray does not run)."""
    resources = ray.cluster_resources() if ray.is_initialized() else {}
    cpus, gpus = int(resources.get("CPU", os.cpu_count() or 1)), int(resources.get("GPU", 0))
    told = f"{_processor()}, {cpus} {'CPU' if cpus == 1 else 'CPUs'}"
    if not gpus:
        return told
    names = sorted(n.removeprefix(ACCELERATOR) for n in resources if n.startswith(ACCELERATOR))
    return f"{told}, {gpus} {'GPU' if gpus == 1 else 'GPUs'} ({', '.join(names)})"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
