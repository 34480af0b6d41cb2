"""What Ray Serve costs: the service on it against the same service under plain uvicorn.

    python benchmarks/serve.py --bundle DIR [--seconds 10] [--servers plain default haproxy apart]

One worker each: the same code, bundle, runtime, batching and index. `plain`: uvicorn in one
process. `default`: Ray Serve's own proxy, no hop behind it. `haproxy`: Ray's HAProxy in its place.
`apart`: HAProxy, and the query encoder a deployment of its own (one hop). Closed loop: each of 1, 8
and 64 clients, in a second process, asks again when it has its answer. `noop` is /health, `hot`
asks for queries of the bundle's table, `clicks` for the same with past clicks, `tail` for others,
each of them once a server.
"""

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq

PORT = 8000
CLIENTS = (1, 8, 64)
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
ENVIRONMENT = {"plain": {}, "default": {}, "haproxy": HAPROXY, "apart": HAPROXY}


async def one_client(paths: Iterator[str], end: float, times: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    while time.perf_counter() < end:
        start = time.perf_counter()
        writer.write(f"GET {next(paths)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        first = await reader.read(1)
        if not first:  # HAProxy closed it between two requests, as it does when it is reloaded
            reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
            continue
        head = first + await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - start)
    writer.close()


def measure(paths: Iterator[str], clients: int, seconds: float) -> tuple[float, float, float]:
    """Requests a second, p50 and p99 [ms]."""

    async def run() -> list[float]:
        times: list[float] = []
        end = time.perf_counter() + seconds
        await asyncio.gather(*(one_client(paths, end, times) for _ in range(clients)))
        return times

    asyncio.run(run())  # warm-up: connections, caches
    times = 1000 * np.array(asyncio.run(run()))
    return len(times) / seconds, *np.percentile(times, [50, 99]).tolist()


def generate(bundle: Path, seconds: float, results: "multiprocessing.Queue[Any]") -> None:
    """The second process."""
    hot = pq.read_table(bundle / "hot_queries.parquet")["query"].to_pylist()[:500]
    words = sorted({word for query in hot for word in query.split()})
    rng = np.random.default_rng(0)
    searches = ["/search?k=10&q=" + quote(" ".join(rng.choice(words, 3))) for _ in range(20_000)]
    kinds = {
        "noop": cycle(["/health"]),
        "hot": cycle([f"/search?k=10&q={quote(text)}" for text in hot]),
        "clicks": cycle([f"/search?k=10&clicks=true&q={quote(text)}" for text in hot]),
        "tail": (f"{some}+{i}" for i, some in zip(count(), cycle(searches), strict=False)),
    }
    for name, paths in kinds.items():
        for clients in CLIENTS:
            results.put((name, clients, *measure(paths, clients, seconds)))


def serve_plain(bundle: Path) -> None:
    """The service in one process, by uvicorn; nothing changes products here."""
    import uvicorn
    import uvloop

    from acebert.config import load_settings
    from acebert.serving.api import make_api
    from acebert.serving.service import SearchService

    class Nothing:
        async def begin(self, catalogue: object) -> tuple[int, list[str]]:
            return 0, []

        async def changes(self, since: int, bundle: Path, version: str) -> list[object]:
            return []

    async def run() -> None:
        settings = load_settings(["--serve.bundle", str(bundle)])
        service = SearchService(settings, Nothing())  # type: ignore[arg-type]
        await service.start()
        config = uvicorn.Config(make_api(service, None), port=PORT, log_level="warning")
        await uvicorn.Server(config).serve()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as Ray's workers have it
        runner.run(run())


def serve_ray(bundle: Path, apart: bool) -> None:
    from ray import serve

    from acebert.cluster import ray
    from acebert.config import load_settings
    from acebert.serving.deployments import build

    arguments = ["--serve.bundle", str(bundle), "--serve.encoder_apart", str(apart)]
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, logging_level=logging.WARNING
        )
        serve.start(http_options={"port": PORT})
        serve.run(build(load_settings([*arguments, "--workdir", folder])), blocking=False)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            signal.pause()
        finally:  # or HAProxy and a replica go on, and answer for the next server
            serve.shutdown()
            ray.shutdown()


def main(arguments: argparse.Namespace) -> None:
    info = json.loads((arguments.bundle / "bundle.json").read_text())
    print(
        f"{info['products']} products, {os.cpu_count()} cores; requests/s, p50 ms, p99 ms",
        flush=True,
    )
    for server in arguments.servers:
        command = [sys.executable, __file__, "--bundle", str(arguments.bundle), "--serve", server]
        env = os.environ | ENVIRONMENT[server]
        with open(os.devnull, "w") as nothing:
            process = subprocess.Popen(command, env=env, stdout=nothing, start_new_session=True)
        try:
            wait(process)
            results: multiprocessing.Queue[Any] = multiprocessing.Queue()
            generator = multiprocessing.Process(
                target=generate, args=(arguments.bundle, arguments.seconds, results)
            )
            generator.start()
            while generator.is_alive() or not results.empty():
                with suppress(queue.Empty):
                    name, clients, *numbers = results.get(timeout=1)
                    columns = "".join(f"{number:9.2f}" for number in numbers)
                    print(f"{server:8} {name:5} {clients:3} {columns}", flush=True)
            if generator.exitcode:
                sys.exit(f"{server}: the clients failed, see above; did the server die?")
        finally:
            process.terminate()
            process.wait()
        wait_for_free_port()


def wait(process: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=5).close()
            return
        except OSError:
            if process.poll() is not None:
                sys.exit(f"the server ended with {process.returncode}")
            time.sleep(0.5)
    sys.exit("the server does not answer")


def wait_for_free_port() -> None:
    """Else the server before would answer for the next one."""
    for _ in range(120):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", PORT)):
                return
        time.sleep(0.5)
    sys.exit(f"port {PORT} is still taken")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--servers", nargs="+", default=list(ENVIRONMENT), choices=ENVIRONMENT)
    parser.add_argument("--serve", choices=ENVIRONMENT, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.serve == "plain":
        serve_plain(parsed.bundle)
    elif parsed.serve:
        serve_ray(parsed.bundle, parsed.serve == "apart")
    else:
        main(parsed)
