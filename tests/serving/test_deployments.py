"""The service on Ray Serve, over HTTP; replicas and the writer are killed with -9."""

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pyarrow as pa
import pytest

from acebert.config import ExperimentSettings
from acebert.errors import UserError
from acebert.evaluation import embed
from acebert.evaluation.recall import DotProduct, search_catalogue
from acebert.evaluation.testset import load_test_set
from acebert.experiment.assignment import Experiment
from acebert.serving.bundle import publish
from acebert.serving.catalogue import Unavailable
from acebert.serving.deployments import _asked, api_key
from acebert.serving.drift import WINDOW
from acebert.serving.leases import held
from acebert.serving.query_encoder import QueryEncoder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def client(
    ray_cluster: None, shared_world: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    from ray import serve

    from acebert.serving.deployments import build

    workdir: Path = tmp_path_factory.mktemp("deployed")
    for arm in (None, "old", "new"):
        publish(workdir, shared_world.bundle, arm)
    (workdir / "serving" / "events").write_text("no directory, so that no log can be written")
    experiment = ExperimentSettings(name="test", arms=("old", "new"))
    changed = {"workdir": workdir, "experiment": experiment}
    settings = shared_world.settings.model_copy(update=changed)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(settings, replicas=2))
    known = {"x-workdir": str(workdir)}  # for the tests: the service does not read it
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=known) as made:
        yield made
    serve.shutdown()


def pids(deployment: str) -> list[int]:
    """Processes of a deployment's replicas."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if name.startswith("ray::ServeReplica:") and f":{deployment}" in name:
                found.append(int(folder.name))
    return found


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError("it did not come true in time")


def titles(client: httpx.Client, name: str) -> set[str | None]:
    """A product's title as several requests in a row find it, so as both replicas have it."""
    answers = [client.get(f"/products/{name}") for _ in range(8)]
    return {a.json()["title"] if a.status_code == 200 else None for a in answers}


def test_the_top_100_are_numpys_on_the_embed_stages_vectors(
    client: httpx.Client, shared_world: Any
) -> None:
    encoder = QueryEncoder.load(shared_world.model)
    for query in ["red shoe", "a  BLUE bag", "watch for men"]:
        answer = client.get("/search", params={"q": query, "k": 100})
        assert answer.status_code == 200, answer.text
        scores = shared_world.vectors @ encoder.encode([query])[0]
        of = dict(zip(shared_world.ids, scores.tolist(), strict=True))
        found = {hit["product_id"]: of[hit["product_id"]] for hit in answer.json()["hits"]}
        best = sorted(of.values(), reverse=True)
        np.testing.assert_allclose(list(found.values()), best[:100], atol=1e-5)
        assert len(best) > 100  # so that the cut matters


def test_the_top_100_of_the_test_days_queries_are_those_of_evaluation(
    client: httpx.Client, shared_world: Any
) -> None:
    import ray

    world, none = shared_world, np.empty(0, np.int64)
    test = load_test_set(world.settings, world.ingested)
    queries = test.queries[:30]
    make = partial(embed._Queries, model=world.model, texts=ray.put(pa.array(queries)))
    # Here, and by no actor: the replicas leave no whole CPU.
    embedded = embed._Embedder(world.settings, world.model, make, 1)(
        {"start": np.array([0]), "stop": np.array([len(queries)])}
    )
    vectors = np.empty_like(embedded["embedding"])
    vectors[embedded["row"]] = embedded["embedding"]
    found = search_catalogue(DotProduct(vectors, world.vectors), len(queries), none, none, 100)
    for query, rows, scores in zip(queries, found.top, found.top_score, strict=True):
        answer = client.get("/search", params={"q": query, "k": 100})
        hits = {hit["product_id"]: hit["score"] for hit in answer.json()["hits"]}
        np.testing.assert_allclose(list(hits.values()), scores, atol=1e-5)
        top = dict(zip([test.product_ids[row] for row in rows], scores, strict=True))
        for name in hits.keys() ^ top.keys():  # of equal products either may be the last
            assert {**hits, **top}[name] == pytest.approx(scores[-1], abs=1e-5)


def test_a_part_that_cannot_read_its_bundle_is_unavailable_and_no_fault_of_the_request() -> None:
    from ray.exceptions import RayTaskError

    async def fails() -> None:
        broken = RayTaskError("encode", "traceback", UserError("/srv/bundle: broken"))
        raise broken.as_instanceof_cause()

    with pytest.raises(Unavailable, match="cannot read its bundle: try again"):
        asyncio.run(_asked(fails()))


def test_a_bundle_without_what_the_runtime_runs_is_refused_before_it_is_deployed(world) -> None:
    from acebert.serving.deployments import build

    serve = world.settings.serve.model_copy(update={"runtime": "onnx_int8"})
    with pytest.raises(UserError, match=r"publish\.py --query_encoder"):
        build(world.settings.model_copy(update={"serve": serve}))


def test_changes_reach_both_replicas_and_outlive_a_replica_and_the_writer(
    client: httpx.Client,
) -> None:
    for i in range(10):
        assert client.put(f"/products/new-{i}", json={"title": f"t{i}"}).status_code == 202
    assert client.delete("/products/new-3").status_code == 202
    until(lambda: titles(client, "new-9") == {"t9"} and titles(client, "new-3") == {None})

    victim = pids("Search")[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(pids("Search")) == 2 and victim not in pids("Search"))
    until(lambda: client.get("/ready").status_code == 200)
    assert titles(client, "new-9") == {"t9"}
    assert titles(client, "new-3") == {None}

    (writer,) = pids("Changes")
    os.kill(writer, signal.SIGKILL)
    assert client.get("/search?q=shoe").status_code == 200  # searches need no writer
    until(lambda: client.put("/products/new-3", json={"title": "again"}).status_code == 202)
    until(lambda: titles(client, "new-3") == {"again"})
    assert titles(client, "new-9") == {"t9"}


def test_a_photo_that_is_none_is_refused_through_both_deployments(client: httpx.Client) -> None:
    answer = client.put("/products/x", json={"title": "x", "photo": "R0lGODlh"})
    assert answer.status_code == 422
    assert "photo" in answer.json()["error"]


def test_every_metric_that_the_dashboard_asks_for_is_one_that_the_service_exports(
    client: httpx.Client,
) -> None:
    import ray

    dashboard = json.loads((Path(__file__).parents[2] / "serve" / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_\w+", target["expr"])
    }
    assert len(asked) == 11
    for _ in range(2 * WINDOW // 100):  # drift is told from WINDOW searches of a replica on
        answer = client.post("/search/batch", json={"queries": ["red shoe"] * 100, "k": 1})
        assert answer.status_code == 200, answer.text
    assert client.get("/search", params={"q": "a tail query"}).status_code == 200
    unlogged = client.get("/search", params={"q": "shoe"}, headers={"X-User-Id": "u"})
    assert unlogged.status_code == 200, unlogged.text
    assert (unlogged.json()["search_id"], unlogged.json()["arm"]) == (None, None)
    assert client.put("/products/new", json={"title": "new"}).status_code == 202
    assert client.post("/search/batch", content=b"x" * (17 << 20)).status_code == 413
    (node,) = ray.nodes()
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    missing = asked

    def exported() -> bool:
        nonlocal missing
        missing = asked - set(re.findall(r"^(ray_\w+)", httpx.get(address).text, re.MULTILINE))
        return not missing

    try:
        until(exported, 120)
    except AssertionError:
        assert missing == set()
    experiment = Experiment.of(ExperimentSettings(name="test", arms=("old", "new")))
    assert experiment is not None

    def by_arm(metric: str) -> set[str]:
        lines = re.findall(rf"^ray_{metric}{{.*", httpx.get(address).text, re.MULTILINE)
        return {match[1] for line in lines if (match := re.search(r'arm="(\w*)"', line))}

    until(lambda: by_arm("acebert_queries_total") == {"", experiment.arm("u")}, 120)
    for metric in ("acebert_age_s", "acebert_products", "acebert_behind_s"):
        assert by_arm(metric) == {"", "old", "new"}

    def counted(metric: str, label: str, batches: bool = False) -> dict[str, float]:
        """By a label's value; of times the stage `total`, of batches or of all else."""
        sums: dict[str, float] = {}
        for line in re.findall(rf"^ray_{metric}_total{{.*", httpx.get(address).text, re.MULTILINE):
            labels, value = dict(re.findall(r'(\w+)="([^"]*)"', line)), float(line.split()[-1])
            if labels.get("stage", "total") == "total" and (labels["path"] == "batch") == batches:
                sums[labels[label]] = sums.get(labels[label], 0) + value
        return sums

    def histogram_is_of_all_searches() -> bool:
        at_most = counted("acebert_stage_ms_bucket", "le")
        batches = counted("acebert_stage_ms_bucket", "le", batches=True)["+Inf"]
        searches = sum(counted("acebert_queries", "path").values())
        rising = sorted(at_most.items(), key=lambda pair: float(pair[0]))
        counts = [count for _, count in rising]
        of_batches = 100 * batches  # of so many are all here
        whole = searches == at_most["+Inf"] + of_batches
        return counts == sorted(counts) and whole and of_batches >= 2 * WINDOW

    until(histogram_is_of_all_searches, 120)


def test_an_empty_key_is_refused_and_none_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACEBERT_API_KEY", "")
    with pytest.raises(UserError, match="ACEBERT_API_KEY is empty"):
        api_key()
    monkeypatch.delenv("ACEBERT_API_KEY")
    assert api_key() is None
    assert "whoever reaches the service may change products" in caplog.text
    monkeypatch.setenv("ACEBERT_API_KEY", "secret")
    assert api_key() == "secret"


def test_replicas_that_are_shut_down_hold_no_bundle_any_more(
    client: httpx.Client, shared_world: Any
) -> None:
    from ray import serve

    workdir = Path(client.headers["x-workdir"])
    living = len(pids("Search"))
    before = len(list((workdir / "serving" / "in_use").iterdir()))
    assert held(workdir) == {shared_world.bundle}
    serve.shutdown()
    until(lambda: not pids("Search"))
    after = len(list((workdir / "serving" / "in_use").iterdir()))
    assert before - after == living == 2  # a replica that was killed leaves its file
