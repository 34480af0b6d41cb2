"""An experiment on the search service over HTTP, in a process that is killed with -9."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from acebert.experiment.assignment import Experiment
from acebert.experiment.event_log import collect
from acebert.experiment.readout import read_out
from acebert.serving.bundle import publish
from acebert.serving.query_encoder import QueryEncoder

SERVER = """
import asyncio, sys
from pathlib import Path
import uvicorn
from acebert.config import read_recipe, settings_from
from acebert.serving.api import make_api
from acebert.serving.service import SearchService

class Nothing:  # changes no product
    async def changes(self, since, bundle, version):
        return []

    async def before(self, moment):
        return 0

async def run():
    service = SearchService(settings_from(read_recipe(sys.argv[1])), Nothing())
    await service.start()
    config = uvicorn.Config(make_api(service, None), port=int(sys.argv[2]), log_level="warning")
    await uvicorn.Server(config).serve()
    await service.stop()

asyncio.run(run())
"""


class Server:
    def __init__(self, world: Any, **experiment: object) -> None:
        workdir = world.settings.workdir
        publish(workdir, world.bundle, "old")
        publish(workdir, world.other_bundle, "new")
        chosen = {"name": "test", "arms": ("old", "new"), "flush_seconds": 0.2} | experiment
        section = world.settings.experiment.model_copy(update=chosen)
        settings = world.settings.model_copy(update={"experiment": section})
        dealt = Experiment.of(section)
        assert dealt is not None
        self.experiment, self.events = dealt, workdir / "serving" / "events"
        self._recipe = workdir / "settings.yaml"
        self._recipe.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        self.start()

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", SERVER, str(self._recipe), str(port)]
        self.process = subprocess.Popen(command)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        for _ in range(600):
            try:
                self.client.get("/ready")
                return
            except httpx.TransportError:
                assert self.process.poll() is None
                time.sleep(0.1)
        raise AssertionError("it does not answer")

    def search(self, user: str, query: str = "red shoe") -> dict[str, Any]:
        asked = {"q": query, "k": 10}
        answer = self.client.get("/search", params=asked, headers={"X-User-Id": user})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        os.kill(self.process.pid, how)
        self.process.wait(30)

    def logged(self, kind: str) -> list[dict[str, Any]]:
        collect(self.events)
        files = sorted(self.events.glob(f"{kind}/*/*.parquet"))
        return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture
def start(world: Any) -> Iterator[Any]:
    started: list[Server] = []

    def make(**experiment: object) -> Server:
        started.append(Server(world, **experiment))
        return started[-1]

    yield make
    for server in started:
        server.process.kill()
        server.process.wait()


def test_users_get_their_arms_own_answers_before_and_after_a_restart(start, world) -> None:
    server = start()
    users = [f"u{i}" for i in range(30)]
    before = {user: server.search(user) for user in users}
    assert {answer["arm"] for answer in before.values()} == {"old", "new"}
    for user, answer in before.items():
        assert answer["arm"] == server.experiment.arm(user)
        model = world.bundle if answer["arm"] == "old" else world.other_bundle
        assert answer["version"] == QueryEncoder.load(model / "model").version
    without = server.client.get("/search?q=red+shoe").json()
    assert (without["arm"], without["search_id"]) == (None, None)
    server.stop()
    server.start()
    assert {u: server.search(u)["arm"] for u in users} == {u: a["arm"] for u, a in before.items()}


def test_every_answered_search_is_logged_once_when_the_process_is_killed(start) -> None:
    server = start()
    answered: list[dict[str, Any]] = []

    def ask(user: int) -> None:
        for i in range(1000):
            try:
                answered.append(server.search(f"u{user}", f"query {i}"))
            except httpx.TransportError:
                return

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, user) for user in range(4)]
        time.sleep(3)
        server.stop(signal.SIGKILL)
        for one in asking:
            one.result()
    rows = {row["search_id"]: row for row in server.logged("exposure")}
    assert len(answered) > 50
    for answer in answered:
        row = rows[answer["search_id"]]
        assert row["arm"] == answer["arm"]
        assert row["products"] == [hit["product_id"] for hit in answer["hits"]]
        assert len(row["user"]) == 32
    assert len(rows) <= len(answered) + 4  # those that were under way


def test_clicks_and_purchases_are_in_the_report_and_repeats_are_not(start) -> None:
    server = start()
    prices: dict[str, float] = {}
    for user in range(20):
        answer = server.search(f"u{user}")
        hit = answer["hits"][0]
        event = {"search_id": answer["search_id"], "product_id": hit["product_id"]}
        for action in ("click", "click", "purchase"):
            sent = server.client.post("/events", json=event | {"action": action})
            assert sent.status_code == 202, sent.text
        prices[answer["search_id"]] = hit["price"]
    twice = {"X-User-Id": "u1", "X-Search-Id": "my-own-search"}
    for _ in range(2):
        assert (
            server.client.get("/search?q=hat", headers=twice).json()["search_id"]
            == twice["X-Search-Id"]
        )
    assert server.client.post("/events", json={"search_id": "?"}).status_code == 422
    server.stop()
    found = read_out(server.experiment, server.events)
    arms = found.arms.values()
    assert sum(arm.searches for arm in arms) == 21
    earned = sum(arm.values["revenue"] * arm.searches for arm in arms)
    np.testing.assert_allclose(earned, sum(prices.values()), rtol=1e-5)


def test_an_interleaved_answer_is_a_draft_of_both_arms_and_the_same_when_repeated(
    start, world
) -> None:
    server = start(design="interleave")
    answer = server.search("u1")
    assert answer["arm"] is None
    assert [h["product_id"] for h in server.search("u1")["hits"]] == [
        h["product_id"] for h in answer["hits"]
    ]
    server.stop()
    row = next(r for r in server.logged("exposure") if r["search_id"] == answer["search_id"])
    assert sorted(row["teams"]) == ["new"] * 5 + ["old"] * 5
    scores = {}
    for arm, bundle in (("old", world.bundle), ("new", world.other_bundle)):
        vector = QueryEncoder.load(bundle / "model").encode(["red shoe"])[0]
        vectors = np.load(bundle / "vectors.npy")
        scores[arm] = dict(zip(world.ids, (vectors @ vector).tolist(), strict=True))
    best = {max(of.values()) for of in scores.values()}
    firsts = [h["score"] for h in answer["hits"][:2]]
    np.testing.assert_allclose(sorted(firsts), sorted(best), atol=1e-5)


def test_without_an_experiment_there_is_no_log(address: str, world: Any) -> None:
    answer = httpx.get(f"{address}/search?q=shoe", headers={"X-User-Id": "u"})
    assert answer.json()["search_id"] is None
    event = {"search_id": "12345678", "action": "click", "product_id": "p"}
    assert httpx.post(f"{address}/events", json=event).status_code == 422
    assert not (Path(world.settings.workdir) / "serving" / "events").exists()
