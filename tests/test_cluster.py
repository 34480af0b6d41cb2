from pathlib import Path

import yaml
from ray.autoscaler._private.util import validate_config

ROOT = Path(__file__).parents[1]


def test_cluster_yaml_is_what_ray_up_takes():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    # `ray up` fills this default in before it validates
    validate_config({"cluster_synced_files": [], **config})
    assert config["head_node_type"] in config["available_node_types"]
    gpu = [t for t in config["available_node_types"].values() if t["resources"].get("GPU")]
    assert gpu, "training at the paper's size needs GPU workers"
