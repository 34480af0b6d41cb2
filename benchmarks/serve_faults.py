"""Does a request fail while replicas die, the model is swapped and products change?

    python benchmarks/serve_faults.py --bundle A --other B [--requests 20000] [--clients 8]

A and B are bundles of one catalogue by two models. Two Search replicas behind Ray's HAProxy, which
asks the other replica when one is gone. In the middle of constant load a replica is killed with -9,
B is published, another replica is killed; all the while products are added, replaced and deleted.
At the end every change has to be as it was acknowledged, on every replica that answers. It ends
with status 1 where a search failed or a product is not so; changes that were refused are counted.
Told too: seconds from a product's acknowledgement until every search of its category shows it.

Every search is one of an experiment of two arms, A both: B is published to all and to the second.
At the end each search that was answered has to be in the log; one that was sent again under its
id, for its replica died, may be there twice under that id, which a report counts once.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
# Every request of this API may be sent twice: searches read, changes say what a product then is.
os.environ.setdefault("RAY_SERVE_HAPROXY_RETRY_ON", "conn-failure empty-response response-timeout")

import httpx2 as httpx
import numpy as np
import pyarrow.dataset as ds

from acebert.experiment.event_log import collect, events_directory

URL = "http://127.0.0.1:8000"
ARMS = "one", "two"
AGREEING = 6  # searches in a row, of two replicas by turns


def replica_pids() -> list[int]:
    """Processes of the Search replicas."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    lines = [line.split(None, 1) for line in listed.stdout.splitlines()]
    return [
        int(pid)
        for pid, name in lines
        if name.startswith("ray::ServeReplica:") and ":Search" in name
    ]


async def load(
    client: httpx.AsyncClient, queries: list[str], left: list[int], seen: Counter, ids: set[str]
) -> None:
    """Searches until `left` is used up; statuses and model versions are counted in `seen`, `ids`
    are those of the searches that were answered."""
    while left[0] > 0:
        left[0] -= 1
        name = uuid.uuid4().hex
        headers = {"X-User-Id": f"user-{random.randrange(1000)}", "X-Search-Id": name}
        try:
            answer = await client.get(
                "/search", params={"q": random.choice(queries), "k": 20}, headers=headers
            )
            seen[answer.status_code] += 1
            if answer.status_code == 200:
                ids.add(name)
                seen[f"model {answer.json()['version']}"] += 1
            elif answer.status_code == 503:
                await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
        except httpx.HTTPError as error:
            seen[type(error).__name__] += 1


async def change(
    client: httpx.AsyncClient, truth: dict[str, str | None], left: list[int], refused: Counter
) -> None:
    """Changes of 50 products; `truth` holds what was acknowledged last, `refused` counts why others
    were not."""
    number = 0
    while left[0] > 0:
        number += 1
        name = f"fault-{number % 50}"
        value = None if random.random() < 0.3 else f"thing {number}"
        try:
            if value is None:
                answer = await client.delete(f"/products/{name}")
            else:
                answer = await client.put(f"/products/{name}", json={"title": value})
            status: object = answer.status_code
        except httpx.HTTPError as error:
            status = type(error).__name__
        if status == 202:
            truth[name] = value
        else:
            refused[status] += 1
            truth.pop(name, None)  # it may have been made or not
        await asyncio.sleep(0.05)


async def freshness(client: httpx.AsyncClient, left: list[int], delays: list[float]) -> None:
    """Adds products in categories of their own; `delays` [s]: from the acknowledgement until a
    search finds the product, and the `AGREEING` - 1 after it, whichever replica answers."""
    number = 0
    while left[0] > 0:
        number += 1
        name = f"fresh-{number}"
        with suppress(httpx.HTTPError):
            answer = await client.put(
                f"/products/{name}", json={"title": f"new thing {number}", "category": name}
            )
            if answer.status_code != 202:
                continue
            start = time.perf_counter()
            found: list[float] = []
            while len(found) < AGREEING:
                answer = await client.get("/search", params={"q": "thing", "category": name})
                if answer.status_code == 200 and answer.json()["hits"]:
                    found.append(time.perf_counter() - start)
                else:
                    found.clear()
            delays.append(found[0])
        await asyncio.sleep(0.5)


async def scenario(arguments: argparse.Namespace, workdir: Path, ids: set[str]) -> bool:
    """Whether no search failed and every product is as it was acknowledged; `ids` are those of the
    searches that were answered."""
    from acebert.serving.bundle import publish

    info = json.loads((arguments.bundle / "bundle.json").read_text())
    queries = [f"red shoe {i}" for i in range(200)]
    left = [arguments.requests]
    seen: Counter[object] = Counter()
    refused: Counter[object] = Counter()
    truth: dict[str, str | None] = {}
    delays: list[float] = []
    limits = httpx.Limits(max_connections=arguments.clients + 4)
    async with httpx.AsyncClient(base_url=URL, timeout=60, limits=limits) as client:
        for _ in range(600):
            try:
                if (await client.get("/ready")).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.5)
        start = time.perf_counter()
        tasks = [load(client, queries, left, seen, ids) for _ in range(arguments.clients)]
        running = asyncio.gather(
            *tasks, change(client, truth, left, refused), freshness(client, left, delays)
        )

        async def when(share: float) -> None:
            while left[0] > (1 - share) * arguments.requests:
                await asyncio.sleep(0.1)

        await when(0.25)
        victim = replica_pids()[0]
        os.kill(victim, signal.SIGKILL)
        print(f"killed replica {victim}", flush=True)
        await when(0.5)
        for arm in (None, ARMS[1]):
            publish(workdir, arguments.other, arm)
        print(f"published {arguments.other.name}", flush=True)
        await when(0.75)
        victim = replica_pids()[-1]
        os.kill(victim, signal.SIGKILL)
        print(f"killed replica {victim}", flush=True)
        await running
        seconds = time.perf_counter() - start
        await asyncio.sleep(3)
        wrong = 0
        for _ in range(4):  # whichever replica answers
            for name, title in truth.items():
                found = await client.get(f"/products/{name}")
                held = found.json()["title"] if found.status_code == 200 else None
                wrong += held != title
        print(
            f"{arguments.requests} searches in {seconds:.0f} s beside changes of "
            f"{len(truth)} products; {info['products']} products",
            flush=True,
        )
        for what, count in sorted(seen.items(), key=str):
            print(f"{what}: {count}")
        print(f"changes that were refused: {dict(refused) or 0}")
        print(f"products that are not as acknowledged: {wrong}")
        median, most = np.quantile(delays, [0.5, 1])
        print(
            f"{len(delays)} new products, found after {median:.2f} s (median), {most:.2f} s (most)"
        )
    return wrong == 0 and seen[200] == arguments.requests


def logged(workdir: Path, ids: set[str]) -> bool:
    """Whether the log has each search that was answered."""
    events = events_directory(workdir)
    collect(events)  # what the killed replicas left
    exposures = ds.dataset(events / "exposure").to_table(["search_id"])["search_id"].to_pylist()
    rows = Counter(exposures)
    twice = sum(count > 1 for count in rows.values())
    print(
        f"{len(ids):,} searches answered, {len(ids & rows.keys()):,} of them in the log, {twice:,} "
        f"of them twice (sent again, under one id); {len(rows.keys() - ids):,} in it unanswered"
    )
    return ids <= rows.keys()


def main(arguments: argparse.Namespace) -> None:
    from ray import serve

    from acebert.cluster import ray
    from acebert.config import load_settings
    from acebert.serving.bundle import publish
    from acebert.serving.deployments import build

    with tempfile.TemporaryDirectory() as folder:
        for arm in (None, *ARMS):
            publish(Path(folder), arguments.bundle, arm)
        arms = ["--experiment.name", "faults", "--experiment.arms", ",".join(ARMS)]
        settings = load_settings(["--workdir", folder, *arms])
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, logging_level=logging.WARNING
        )
        serve.start(http_options={"port": 8000})
        serve.run(build(settings, replicas=2), blocking=False)
        ids: set[str] = set()
        held = asyncio.run(scenario(arguments, Path(folder), ids))
        serve.shutdown()
        held &= logged(Path(folder), ids)
        ray.shutdown()
    if not held:
        sys.exit("a search failed or is not in the log, or a product is not as acknowledged")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=8)
    main(parser.parse_args())
