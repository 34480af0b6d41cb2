"""Training on several nodes, which come after the job has started: a simulated cluster."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from ray.cluster_utils import Cluster

from acebert.config import Settings
from acebert.training.finetune import finetune
from acebert.workdir import Stage

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_nodes_that_come_late_train_as_one_process_does(
    settings: Settings, stages: dict[str, Stage], tmp_path: Path
) -> None:
    """Each node has one CPU, so the two workers are on two nodes; features come from copies of the
    nodes' own."""
    short = settings.train.model_copy(update={"max_steps": 6, "validate_every": 6})
    alone = finetune(settings.model_copy(update={"train": short}), **stages)
    train = short.model_copy(
        update={
            **{"num_workers": 2, "cpus_per_worker": 1.0, "threads_per_worker": 1},
            **{"wait_minutes": 3.0, "patience": short.patience + 1},
        }
    )
    cached = {"feature_cache": "node_disk", "feature_cache_dir": tmp_path / "node"}
    job = settings.model_copy(
        update={"train": train, "image": settings.image.model_copy(update=cached)}
    )
    recipe = tmp_path / "job.yaml"
    recipe.write_text(yaml.safe_dump(job.model_dump(mode="json", exclude={"recipe"})))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    driver = subprocess.Popen(
        [sys.executable, "ray_jobs/finetune.py", "--recipe", str(recipe)],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert driver.stdout is not None
    said: list[str] = []
    try:
        for line in driver.stdout:
            said.append(line)
            if "asks for 2 ×" in line:
                break
        waits = driver.poll() is None
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        said += driver.stdout
        driver.wait(60)
    finally:
        driver.kill()
        cluster.shutdown()
    assert waits, said
    assert driver.returncode == 0, "".join(said[-60:])
    model = Path(said[-1].strip())
    one, two = (pq.read_table(path / "history.parquet") for path in (alone.path, model))
    for name in ("loss", "adversary"):
        np.testing.assert_allclose(one[name], two[name], rtol=2e-3, err_msg=name)
    (copy,) = (tmp_path / "node").glob("features-*")
    assert copy.name == f"features-{stages['features'].digest}"
