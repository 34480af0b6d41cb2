"""An experiment on the search service over HTTP, in a process that is killed with -9."""

import asyncio
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from playwright.sync_api import expect

from acebert.errors import UserError
from acebert.experiment.assignment import Experiment
from acebert.experiment.event_log import EventLog, Exposure, collect, events_directory
from acebert.experiment.readout import Readout, read_out
from acebert.experiment.shoppers import demo_searches
from acebert.experiment.simulate import send
from acebert.serving.bundle import Bundle, publish
from acebert.serving.catalogue import Unavailable
from acebert.serving.leases import held
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

    async def begin(self, catalogue):
        return 0, []

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
        self.recipe = workdir / "settings.yaml"
        self.recipe.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        self.start()

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", SERVER, str(self.recipe), str(port)]
        self.process = subprocess.Popen(command)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        for _ in range(600):
            try:
                self.client.get("/ready")
                return
            except httpx.TransportError:
                assert self.process.poll() is None
                time.sleep(0.1)
        self.stop(signal.SIGKILL)
        raise AssertionError("it does not answer")

    def search(self, user: str, query: str = "red shoe", **more: object) -> dict[str, Any]:
        asked = {"q": query, "k": 10, **more}
        answer = self.client.get("/search", params=asked, headers={"X-User-Id": user})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        os.kill(self.process.pid, how)
        self.process.wait(30)

    def read_out(self) -> Readout:
        """As ab_report does: what a process left that was stopped in haste is collected first."""
        collect(self.events)
        return read_out(self.experiment, self.events)

    def logged(self, kind: str) -> list[dict[str, Any]]:
        collect(self.events)
        files = sorted(self.events.glob(f"{kind}/*/*.parquet"))
        return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture
def start(world: Any) -> Iterator[Any]:
    started: list[Server] = []

    def make(of: Any = world, **experiment: object) -> Server:
        started.append(Server(of, **experiment))
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


def test_every_answered_search_is_logged_once_when_the_process_is_killed(start, world) -> None:
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
    logged = server.logged("exposure")
    rows = {row["search_id"]: row for row in logged}
    assert len(rows) == len(logged)
    assert len(answered) > 50
    bundles = {"old": world.bundle, "new": world.other_bundle}
    encoders = {arm: Bundle(bundle).encoder for arm, bundle in bundles.items()}
    for answer in answered:
        row = rows[answer["search_id"]]
        assert row["arm"] == answer["arm"]
        assert row["products"] == [hit["product_id"] for hit in answer["hits"]]
        assert len(row["user"]) == 32
        encoder = encoders[answer["arm"]]
        assert row["versions"] == [(answer["arm"], f"{answer['version']} {encoder}")]
        assert row["query"] == ""
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
    refused = server.client.get("/search?q=hat", headers={"X-User-Id": "u1", "X-Search-Id": "?"})
    assert refused.status_code == 422
    assert refused.json()["error"].startswith("header.x-search-id: String should match pattern")
    server.stop()
    found = server.read_out()
    arms = found.arms.values()
    assert sum(arm.searches for arm in arms) == 21
    earned = sum(arm.values["revenue"] * arm.searches for arm in arms)
    np.testing.assert_allclose(earned, sum(prices.values()), rtol=1e-5)


def test_an_interleaved_answer_is_a_draft_of_both_arms_and_its_clicks_are_read_out(
    start, world
) -> None:
    server = start(design="interleave")
    answer = server.search("u1")
    assert answer["arm"] is None
    assert [h["product_id"] for h in server.search("u1")["hits"]] == [
        h["product_id"] for h in answer["hits"]
    ]  # the same when it is repeated
    shown, searches = demo_searches(world.settings.demo, 10, 40, 0)
    sent = asyncio.run(send(str(server.client.base_url).rstrip("/"), searches, shown, 4, 0))
    assert set(sent) == {None}
    server.stop()
    rows = {row["search_id"]: row for row in server.logged("exposure")}
    row = rows[answer["search_id"]]
    assert sorted(row["teams"]) == ["new"] * 5 + ["old"] * 5
    assert {arm for arm, _ in row["versions"]} == {"new", "old"}
    assert len({version for _, version in row["versions"]}) == 2
    scores = {}
    for arm, bundle in (("old", world.bundle), ("new", world.other_bundle)):
        vector = QueryEncoder.load(bundle / "model").encode(["red shoe"])[0]
        vectors = np.load(bundle / "vectors.npy")
        scores[arm] = dict(zip(world.ids, (vectors @ vector).tolist(), strict=True))
    best = {max(of.values()) for of in scores.values()}
    firsts = [h["score"] for h in answer["hits"][:2]]
    np.testing.assert_allclose(sorted(firsts), sorted(best), atol=1e-5)
    lead: Counter[str] = Counter()  # clicks on the new arm's products less those on the old one's
    for click in (act for act in server.logged("action") if act["action"] == "click"):
        of = rows[click["search_id"]]
        team = dict(zip(of["products"], of["teams"], strict=True))[click["product_id"]]
        lead[click["search_id"]] += {"new": 1, "old": -1, None: 0}[team]
    won = [int(np.sign(some)) for some in lead.values() if some]
    found = server.read_out()
    assert found.preference is not None
    assert found.preference.value == pytest.approx(sum(won) / len(won))
    assert found.interleaved_users == len({rows[name]["user"] for name in lead if lead[name]})
    assert (found.arms, found.not_shown, found.without_search) == ({}, 0, 0)


def test_a_draft_is_full_when_one_arms_scores_are_all_too_low(start, world) -> None:
    """Scores of two models have no common scale: the arm whose pass fills the list, for nobody."""
    queries = [f"{colour} {what}" for colour in ("red", "blue") for what in ("shoe", "bag", "hat")]
    of_arm = []
    for bundle in (world.bundle, world.other_bundle):
        vectors = QueryEncoder.load(bundle / "model").encode(queries)
        of_arm.append(np.sort(vectors @ np.load(bundle / "vectors.npy").T, axis=1)[:, ::-1])
    gaps = [  # from the one arm's best score to the other's tenth
        (float(high[9] - low[0]), query, float(low[0]), float(high[9]))
        for some in (of_arm, of_arm[::-1])
        for query, low, high in zip(queries, *some, strict=True)
    ]
    _, query, best, tenth = max(gaps)
    assert best < tenth
    server = start(design="interleave")
    full = server.search("u1", query, min_score=(best + tenth) / 2)
    assert len(full["hits"]) == 10
    assert not full["no_good_match"]
    empty = server.search("u1", query, min_score=0.9999)
    assert (empty["hits"], empty["no_good_match"]) == ([], True)
    server.stop()
    rows = {row["search_id"]: row for row in server.logged("exposure")}
    assert rows[full["search_id"]]["teams"] == [None] * 10
    assert rows[empty["search_id"]]["teams"] == []


def test_searches_are_answered_while_the_log_cannot_be_written(start) -> None:
    """A process whose files may not grow, as on a full disk."""
    server = start(flush_seconds=3600.0)
    first = server.search("u1")
    of_process = server.process.pid, resource.RLIMIT_FSIZE
    soft, hard = resource.prlimit(*of_process)
    resource.prlimit(*of_process, (0, hard))
    for _ in range(3):
        answer = server.search("u1")
        assert (answer["search_id"], answer["arm"]) == (None, None)
        assert answer["hits"] == first["hits"]
    event = {"search_id": first["search_id"], "action": "click", "product_id": "p"}
    refused = server.client.post("/events", json=event)
    assert refused.status_code == 503
    assert "log" in refused.json()["error"]
    asked, reviewer = {"q": "red shoe"}, {"X-User-Id": "r"}
    assert server.client.get("/compare", params=asked, headers=reviewer).status_code == 503
    resource.prlimit(*of_process, (soft, hard))
    last = server.search("u1")
    assert server.client.post("/events", json=event).status_code == 202
    server.stop()
    logged = [row["search_id"] for row in server.logged("exposure")]
    assert sorted(logged) == sorted([first["search_id"], last["search_id"]])
    assert len(server.logged("action")) == 1


def test_what_was_searched_for_is_logged_where_it_is_asked_for(start) -> None:
    server = start(log_queries=True)
    server.search("u1", "  Red SHOE ")
    server.stop()
    assert [row["query"] for row in server.logged("exposure")] == ["red shoe"]


def test_products_of_an_arm_alone_have_a_page_a_photo_and_a_price(start, world, tmp_path) -> None:
    bundle = tmp_path / "with-a-product-more"
    shutil.copytree(world.other_bundle, bundle)
    with closing(sqlite3.connect(bundle / "products.sqlite")) as db, db:
        ((row,),) = db.execute("SELECT min(row) FROM product WHERE photo IS NOT NULL").fetchall()
        changed = "UPDATE product SET product_id = 'arms-own', price = 77.5 WHERE row = ?"
        assert db.execute(changed, (row,)).rowcount == 1
    server = start(replace(world, other_bundle=bundle))
    found = server.client.get("/products/arms-own")
    assert (found.status_code, found.json().get("price")) == (200, 77.5)
    photo = server.client.get("/photos/arms-own")
    assert photo.status_code == 200
    assert photo.content == server.client.get(f"/photos/{world.ids[row]}").content
    similar = server.client.get("/similar/arms-own?k=3")
    assert (similar.status_code, len(similar.json()["hits"])) == (200, 3)
    assert server.client.get("/products/nobodys").status_code == 404
    name = server.search("u1")["search_id"]
    event = {"search_id": name, "action": "purchase", "product_id": "arms-own"}
    assert server.client.post("/events", json=event).status_code == 202
    server.stop()
    assert [row["revenue"] for row in server.logged("action")] == [77.5]


def test_an_old_log_ages_out_in_a_service_that_runs_no_experiment(world, with_service) -> None:
    events, now = events_directory(world.settings.workdir), datetime.now(UTC)
    log = EventLog(events)
    log.append(
        [
            Exposure(f"s{n}", now - timedelta(days=n), "over", "a", "u", "q", [], "d", "split", {})
            for n in (5, 20)
        ]
    )
    assert log._current is not None
    os.close(log._current._fd)  # as its process was killed

    def logged() -> list[str]:
        files = events.glob("exposure/*/*.parquet")
        return [name for file in files for name in pq.read_table(file)["search_id"].to_pylist()]

    async def wait(client: Any, local: Any) -> None:
        for _ in range(300):
            await asyncio.sleep(0.1)
            if await asyncio.to_thread(logged) == ["s5"]:
                return

    with_service(wait, experiment={"flush_seconds": 0.1, "retention_days": 10})
    assert logged() == ["s5"]
    assert list((events / "hot").iterdir()) == []


def test_an_arms_bundle_that_is_published_for_all_is_not_loaded_once_more(
    world, with_service
) -> None:
    workdir = world.settings.workdir
    publish(workdir, world.bundle, "old")
    publish(workdir, world.other_bundle, "new")

    async def test(client: Any, local: Any) -> None:
        service = local.service
        assert service.loaded is service.trial.arms["old"]
        publish(workdir, world.other_bundle)
        for _ in range(1200):
            if service.loaded.bundle.directory == world.other_bundle:
                break
            await asyncio.sleep(0.05)
        assert service.loaded is service.trial.arms["new"]

    with_service(test, experiment={"name": "test", "arms": ("old", "new")})


def test_a_service_holds_the_bundles_that_it_has_loaded(world, with_service) -> None:
    workdir = world.settings.workdir
    publish(workdir, world.bundle, "old")
    publish(workdir, world.other_bundle, "new")

    async def look(client: Any, local: Any) -> None:
        assert held(workdir) == {world.bundle, world.other_bundle}

    with_service(look, experiment={"name": "test", "arms": ("old", "new")})
    assert held(workdir) == set()


def test_changes_reach_every_arm_but_the_one_whose_model_cannot_encode_them(
    world, with_service, tmp_path, monkeypatch
) -> None:
    """The failing arm is the first; `behind` tells of it alone."""
    copied = tmp_path / "of-the-published-model"
    shutil.copytree(world.bundle, copied)
    publish(world.settings.workdir, world.other_bundle, "old")
    publish(world.settings.workdir, copied, "new")

    async def put(client: Any, local: Any) -> None:
        arms, encode, broken = local.service.trial.arms, local.catalogue.encode, True

        async def of_one_model(bundle: Path, sources: Any) -> np.ndarray:
            if broken and bundle == world.other_bundle:
                raise Unavailable("no memory left")
            return await encode(bundle, sources)

        async def until(condition: Any) -> None:
            for _ in range(600):
                if condition():
                    return
                await asyncio.sleep(0.05)
            raise AssertionError("it did not come true in time")

        monkeypatch.setattr(local.catalogue, "encode", of_one_model)
        answer = await client.put("/products/late", json={"title": "late"})
        assert answer.status_code == 202
        seq = answer.json()["seq"]
        await until(lambda: arms["new"].seq == local.service.current().seq == seq)
        assert arms["old"].seq < seq
        await until(lambda: arms["old"].behind > 1)
        await until(lambda: arms["new"].behind < 0.5 < arms["old"].behind)
        broken = False
        await until(lambda: arms["old"].seq == seq and arms["old"].behind < 1)

    with_service(put, experiment={"name": "test", "arms": ("old", "new")})


def test_without_an_experiment_there_is_no_log(address: str, world: Any) -> None:
    answer = httpx.get(f"{address}/search?q=shoe", headers={"X-User-Id": "u"})
    assert answer.json()["search_id"] is None
    event = {"search_id": "12345678", "action": "click", "product_id": "p"}
    assert httpx.post(f"{address}/events", json=event).status_code == 422
    reviewer = {"X-User-Id": "u"}
    assert httpx.get(f"{address}/compare?q=shoe", headers=reviewer).status_code == 422
    vote = {"search_id": "12345678", "better": "left"}
    assert httpx.post(f"{address}/votes", json=vote).status_code == 422
    assert not (Path(world.settings.workdir) / "serving" / "events").exists()


def test_a_rehearsal_is_read_out_as_it_was_sent(start, world) -> None:
    server = start()
    sent = subprocess.run(
        [
            *[sys.executable, "ray_jobs/ab_simulate.py", "--recipe", str(server.recipe)],
            *["--url", str(server.client.base_url), "--searches", "150", "--users", "40"],
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert sent.returncode == 0, sent.stderr
    assert "ab_report.py" in sent.stdout
    assert "--experiment.name test --experiment.arms old,new" in sent.stdout
    server.stop()
    found = server.read_out()
    assert set(found.arms) == {"old", "new"}
    for name, arm in found.arms.items():
        (row,) = (line for line in sent.stdout.splitlines() if line.startswith(f"│ {name} "))
        searches, clicks, _, ctr, *_ = (cell.strip() for cell in row.split("│")[2:-1])
        assert arm.searches == int(searches)
        assert f"{arm.values['ctr']:.2%}" == ctr
        assert round(arm.values["ctr"] * 16 * arm.searches) == int(clicks)
    assert sum(arm.searches for arm in found.arms.values()) == 150
    assert sum(arm.values["ctr"] for arm in found.arms.values()) > 0
    assert (found.not_shown, found.without_search) == (0, 0)


def test_shoppers_are_sent_to_no_service_without_an_experiment(address, world) -> None:
    shown, searches = demo_searches(world.settings.demo, 5, 10, 0)
    with pytest.raises(UserError, match="runs no experiment"):
        asyncio.run(send(address, searches, shown, 2, 0))
    with pytest.raises(UserError, match="cannot be reached"):
        asyncio.run(send("http://127.0.0.1:9", searches, shown, 2, 0))


def test_two_arms_are_compared_blind_and_votes_are_in_the_report(start, world) -> None:
    server = start()
    best = {}
    for arm, bundle in (("old", world.bundle), ("new", world.other_bundle)):
        vector = QueryEncoder.load(bundle / "model").encode(["red shoe"])[0]
        best[arm] = world.ids[int(np.argmax(np.load(bundle / "vectors.npy") @ vector))]
    assert best["old"] != best["new"]
    sides = set()
    for i in range(24):
        asked = {"q": "red shoe", "k": 5}
        answer = server.client.get("/compare", params=asked, headers={"X-User-Id": f"r{i % 6}"})
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) == {"search_id", "left", "right"}
        lists = {side: answer.json()[side] for side in ("left", "right")}
        assert all(set(hit).isdisjoint({"score", "arm"}) for hits in lists.values() for hit in hits)
        new = next(s for s, hits in lists.items() if hits[0]["product_id"] == best["new"])
        sides.add(new)
        voted = {"search_id": answer.json()["search_id"], "better": new if i % 3 else "neither"}
        assert server.client.post("/votes", json=voted).status_code == 202
    assert sides == {"left", "right"}
    assert server.client.get("/compare", params={"q": "hat"}).status_code == 422
    server.stop()
    votes = server.read_out().votes["new"]
    assert (votes.preference.value, votes.votes) == (1.0, 16)


@pytest.mark.slow
def test_a_reviewer_votes_on_the_page_and_does_not_learn_which_is_which(start, browser) -> None:
    server = start()
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{server.client.base_url}?compare=1&q=red+shoe")
    expect(page.locator("#left .card")).to_have_count(12, timeout=60_000)
    expect(page.locator("#right .card")).to_have_count(12)
    shown = page.locator("main").inner_text()
    assert "old" not in shown.split()
    assert "new" not in shown.split()
    expect(page.locator("#hits")).to_be_hidden()
    page.get_by_role("button", name="B is better").click()
    expect(page.locator("#status")).to_contain_text("your vote is kept", timeout=60_000)
    expect(page.get_by_role("button", name="A is better")).to_be_disabled()
    page.locator("#query").fill("blue bag")
    expect(page.get_by_role("button", name="A is better")).to_be_enabled(timeout=60_000)
    assert "compare=1" in page.url
    page.get_by_role("button", name="No difference").click()
    expect(page.locator("#status")).to_contain_text("your vote is kept", timeout=60_000)
    page.close()
    server.stop()
    votes = [row["product_id"] for row in server.logged("action") if row["action"] == "vote"]
    assert len(votes) == 2
    assert votes.count("") == 1
    assert set(votes) - {""} <= {"old", "new"}
