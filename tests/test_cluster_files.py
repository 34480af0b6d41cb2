"""cluster.yaml against Ray's schema, the KubeRay manifests against Kubernetes' schemas, and both
against the project that they install and run."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from acebert.config import load_settings

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "docs" / "kuberay"
KUBERNETES = "1.34"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture
def config() -> dict[str, Any]:
    """cluster.yaml with the defaults that `ray up` fills in."""
    return prepare_config(read(ROOT / "cluster.yaml"))


def test_cluster_yaml_is_what_ray_up_takes(config: dict[str, Any]) -> None:
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


def test_all_nodes_start_from_the_image_that_the_docs_put_in_place(config: dict[str, Any]) -> None:
    images = {node["node_config"]["ImageId"] for node in config["available_node_types"].values()}
    (image,) = images
    assert f"s/{image}/$ami/" in (ROOT / "docs" / "cluster.md").read_text()


def test_ray_up_refuses_a_cluster_yaml_with_a_misspelt_key(config: dict[str, Any]) -> None:
    """The schema does look: an oracle that takes everything would prove nothing."""
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuets"):
        validate_config(config | {"idle_timeout_minuets": 5})


def test_gpu_and_cpu_workers_are_spot_and_gpus_scale_from_none(config: dict[str, Any]) -> None:
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"]["CPU"] == 0
    assert {bool(t["resources"].get("GPU")) for t in types.values()} == {True, False}
    for worker in types.values():
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert worker["min_workers"] == (0 if worker["resources"].get("GPU") else 1)
        assert worker["min_workers"] < worker["max_workers"]
    assert sum(worker["max_workers"] for worker in types.values()) <= config["max_workers"]


def test_set_up_installs_this_project_as_it_is_pinned(config: dict[str, Any]) -> None:
    (target,) = config["file_mounts"]
    install = next(c for c in config["setup_commands"] if "pip install" in c)
    assert f"-e '{target}[gpu]'" in install
    assert "constraints.txt" in install
    extras = (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^gpu = ", extras, re.M)


def pods(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod templates of a RayCluster's spec by group."""
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {name: g["template"] for name, g in ({"head": spec["headGroupSpec"]} | groups).items()}


@pytest.fixture
def spec() -> dict[str, Any]:
    return read(KUBERAY / "raycluster.yaml")["spec"]


def test_every_pod_and_the_claim_are_what_kubernetes_takes(spec: dict[str, Any]) -> None:
    documents = [pod(template) for template in pods(spec).values()]
    documents.append(read(KUBERAY / "storage.yaml"))
    assert [fault for document in documents if (fault := kubernetes_fault(document))] == []


def test_kubernetes_schema_refuses_a_misspelt_field(spec: dict[str, Any]) -> None:
    template = pods(spec)["gpu"]
    template["spec"]["tolerances"] = template["spec"].pop("tolerations")
    assert "tolerances" in kubernetes_fault(pod(template))


def pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **template}


def kubernetes_fault(document: dict[str, Any]) -> str:
    """What Kubernetes would refuse a document for; empty for one that it takes."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{error.json_path}: {error.message}"
    return ""


# The part of KubeRay's ray.io/v1 API that the manifests use, from its reference.
OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": False}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
CLUSTER_SPEC = OBJECT | {
    "required": ["headGroupSpec"],
    "properties": {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "authOptions": OBJECT | {"properties": {"mode": {"enum": ["disabled", "token"]}}},
        "autoscalerOptions": OBJECT
        | {"properties": {"version": {"enum": ["v1", "v2"]}, "idleTimeoutSeconds": COUNT}},
        "headGroupSpec": OBJECT
        | {
            "required": ["template"],
            "properties": {"rayStartParams": STRINGS, "template": {"type": "object"}},
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": OBJECT
            | {
                "required": ["groupName", "minReplicas", "maxReplicas", "template"],
                "properties": {
                    "groupName": {"type": "string"},
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": STRINGS,
                    "template": {"type": "object"},
                },
            },
        },
    },
}
JOB_SPEC = OBJECT | {
    "properties": {
        "entrypoint": {"type": "string"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": COUNT,
        "backoffLimit": COUNT,
        "rayClusterSpec": CLUSTER_SPEC,
    }
}

SERVICE_SPEC = OBJECT | {
    "properties": {
        "serveConfigV2": {"type": "string"},
        "upgradeStrategy": {
            **OBJECT,
            "properties": {
                "type": {"enum": ["None", "NewCluster", "NewClusterWithIncrementalUpgrade"]}
            },
        },
        "excludeHeadPodFromServeSvc": {"type": "boolean"},
        "rayClusterConfig": CLUSTER_SPEC,
    }
}


@pytest.mark.parametrize(
    ("file", "kind", "schema"),
    [
        ("raycluster", "RayCluster", CLUSTER_SPEC),
        ("rayjob", "RayJob", JOB_SPEC),
        ("rayservice", "RayService", SERVICE_SPEC),
    ],
)
def test_the_manifests_are_what_kuberay_takes(file: str, kind: str, schema: dict[str, Any]) -> None:
    manifest = read(KUBERAY / f"{file}.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert schema_faults(manifest["spec"], schema) == []


@pytest.mark.parametrize("kind", ["raycluster", "rayjob", "rayservice"])
def test_the_manifests_are_what_the_operators_own_schema_takes(kind: str) -> None:
    """ACEBERT_KUBERAY_CRDS names a directory with the operator's ray.io_*.yaml
    (docs/cluster.md, 'KubeRay')."""
    directory = os.environ.get("ACEBERT_KUBERAY_CRDS")
    if not directory:
        pytest.skip("KubeRay's CRDs are not at hand (set ACEBERT_KUBERAY_CRDS)")
    definition = read(Path(directory) / f"ray.io_{kind}s.yaml")
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    assert schema_faults(read(KUBERAY / f"{kind}.yaml")["spec"], schema) == []


def schema_faults(document: Any, schema: dict[str, Any]) -> list[str]:
    """What a JSON Schema, itself a valid one, refuses a document for."""
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    return [f"{e.json_path}: {e.message}" for e in validator(schema).iter_errors(document)]


def closed(schema: Any) -> Any:
    """A structural schema as JSON Schema that refuses fields it does not know."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {name: closed(value) for name, value in schema.items()}
    if out.pop("x-kubernetes-int-or-string", False):
        out.pop("type", None)
    if "properties" in out and not out.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


def test_the_job_runs_on_the_cluster_of_the_other_manifest(spec: dict[str, Any]) -> None:
    assert read(KUBERAY / "rayjob.yaml")["spec"]["rayClusterSpec"] == spec


def test_the_jobs_command_line_is_one_that_the_script_takes(tmp_path: Path) -> None:
    python, script, *arguments = shlex.split(read(KUBERAY / "rayjob.yaml")["spec"]["entrypoint"])
    assert python == "python"
    assert (ROOT / Path(script).relative_to("/home/ray/acebert")).is_file()
    settings = load_settings([*arguments, "--workdir", str(tmp_path)])
    assert settings.train.num_workers <= 8


def serve_configs() -> dict[str, dict[str, Any]]:
    service = read(KUBERAY / "rayservice.yaml")["spec"]["serveConfigV2"]
    return {"serve": read(ROOT / "serve" / "config.yaml"), "kuberay": yaml.safe_load(service)}


@pytest.mark.parametrize("name", ["serve", "kuberay"])
def test_the_service_is_what_ray_serve_takes(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(serve_configs()[name])
    (application,) = config.applications
    module, attribute = application.import_path.split(":")
    assert f"def {attribute}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    load_settings([f"--{key}={value}" for key, value in application.args.items()])
    written = (ROOT / "acebert" / "serving" / "deployments.py").read_text()
    for deployment in application.deployments:
        assert f"class {deployment.name}:" in written


def test_the_services_pods_are_what_kubernetes_takes() -> None:
    for template in pods(read(KUBERAY / "rayservice.yaml")["spec"]["rayClusterConfig"]).values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **template}
        assert kubernetes_fault(pod) == ""


def test_all_pods_share_the_work_directory_and_mount_what_they_declare(
    spec: dict[str, Any],
) -> None:
    claim = read(KUBERAY / "storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in pods(spec).values():
        (container,) = template["spec"]["containers"]
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        home = next(e["value"] for e in container["env"] if e["name"] == "ACEBERT_HOME")
        work = volumes[mounts[home]]["persistentVolumeClaim"]["claimName"]
        assert work == claim["metadata"]["name"]
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_pods_run_the_ray_that_the_project_pins(spec: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    base = re.search(r"^FROM rayproject/ray:([\d.]+)-", (KUBERAY / "Dockerfile").read_text(), re.M)
    assert base
    assert spec["rayVersion"] == base[1] == pinned[1]
