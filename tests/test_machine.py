"""The machine in words."""

import os
import platform

import pytest
import ray

from acebert.machine import machine


def test_it_names_the_clusters_cpus_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form in which Ray tells of a cluster with two GPUs of one kind."""
    resources = {"CPU": 16.0, "GPU": 2.0, "accelerator_type:H200": 1.0, "memory": 1e11}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    assert machine().endswith(", 16 CPUs, 2 GPUs (H200)")


def test_without_ray_it_is_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert f", {os.cpu_count()} CPU" in machine()
    assert platform.system() != "Linux" or not machine().startswith(",")
