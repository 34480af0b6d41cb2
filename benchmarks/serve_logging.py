"""What metrics and an experiment's log cost: the service with them against itself without.

    python benchmarks/serve_logging.py --bundle DIR [--seconds 5] [--rounds 5] [--clients 8]
    python benchmarks/serve_logging.py --bundle DIR --port 8000 …

With `--port`, a service that runs there, on Ray Serve say, with an experiment of two arms that have
the bundle DIR: searches with a user, who is dealt to an arm and whose search is in the log before
it is answered, against the same searches without one, by turns. Otherwise servers are started here:

The service under plain uvicorn, a process each, connected to a Ray that runs beside it. `bare`: no
experiment, and metrics that count nothing. `metrics`: Ray's. `experiment`: metrics too, and each
search, of one of 1,000 users, is in the log before it is answered; both arms are the same bundle.
`unlogged`: the same with a log that keeps nothing, so that what the log costs stands alone.
Closed loop, hot and tail queries as in serve.py, and both mixed as on the log's test day (`log`),
every request with its user's id. The servers take
turns, the first of a round by turns too, and one whose turn it is not stands still, so that it
moves its log to Parquet in its own time. Told are searches a second, median of the rounds, and by
round their ratio to `bare`: median, least and most.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count, cycle
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq

PORTS = {"bare": 8010, "metrics": 8011, "unlogged": 8013, "experiment": 8012}
TWO_ARMS = ("unlogged", "experiment")
USERS = 1000


async def one_client(port: int, paths: Iterator[str], end: float, users: bool, ids: bool) -> int:
    """How many answers it had until `end`, to searches with users or without; a RuntimeError where
    an answer has no id of a search though it should, or the other way round."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = 0
    for number in count():
        if time.perf_counter() > end:
            break
        user = f"X-User-Id: user-{number % USERS}\r\n" if users else ""
        writer.write(f"GET {next(paths)} HTTP/1.1\r\nHost: x\r\n{user}\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        if (b'"search_id":null' in body) == ids:
            raise RuntimeError(f"port {port}: logged, or not, as it should not be: {body[-99:]!r}")
        answers += 1
    writer.close()
    return answers


def rate(
    port: int, paths: Iterator[str], clients: int, seconds: float, users: bool, ids: bool
) -> float:
    """Answers a second, to searches as `one_client` takes them."""

    async def run() -> int:
        end = time.perf_counter() + seconds
        of_each = (one_client(port, paths, end, users, ids) for _ in range(clients))
        return sum(await asyncio.gather(*of_each))

    return asyncio.run(run()) / seconds


def queries(bundle: Path) -> dict[str, Iterator[str]]:
    """Without end: `hot`, `tail`, and both as often as the searches of the test day were."""
    hot = pq.read_table(bundle / "hot_queries.parquet")["query"].to_pylist()[:500]
    words = sorted({word for query in hot for word in query.split()})
    rng = np.random.default_rng(0)
    tail = [quote(" ".join(rng.choice(words, 3))) for _ in range(20_000)]
    share = json.loads((bundle / "bundle.json").read_text())["hot_share_of_test_searches"]
    paths = {
        "hot": cycle([f"/search?k=10&q={quote(text)}" for text in hot]),
        "tail": (f"/search?k=10&q={q}+{i}" for i, q in zip(count(), cycle(tail), strict=False)),
    }
    paths["log"] = (
        next(paths[kind])
        for kind in cycle(rng.choice(["hot", "tail"], 10_000, p=[share, 1 - share]))
    )
    return paths


def serve(name: str, workdir: str, ray_address: str) -> None:
    """One of the servers; nothing changes products here."""
    import uvicorn

    from acebert.cluster import ray
    from acebert.config import load_settings
    from acebert.serving import service as module
    from acebert.serving.api import make_api

    class Nothing:
        async def begin(self, catalogue: object) -> tuple[int, list[str]]:
            return 0, []

        async def changes(self, since: int, bundle: Path, version: str) -> list[object]:
            return []

    class Silent:
        """Any metric or log, and any of its methods."""

        def __init__(self, *_: object) -> None:
            pass

        def __getattr__(self, name: str) -> "Silent":
            return self

        def __call__(self, *_: object) -> "Silent":
            return self

    if name == "bare":
        module.Metrics = Silent  # type: ignore[assignment,misc]
    if name == "unlogged":
        module.EventLog = Silent  # type: ignore[assignment,misc]
    ray.init(address=ray_address, log_to_driver=False)
    experiment = ["--experiment.name", "cost", "--experiment.arms", "old,new"]
    chosen = load_settings(["--workdir", workdir, *(experiment if name in TWO_ARMS else [])])

    async def run() -> None:
        running = module.SearchService(chosen, Nothing())  # type: ignore[arg-type]
        await running.start()
        config = uvicorn.Config(make_api(running, None), port=PORTS[name], log_level="warning")
        await uvicorn.Server(config).serve()

    asyncio.run(run())


@contextmanager
def started(name: str, workdir: str, ray_address: str) -> Iterator[int]:
    """Its process id, once it answers; it stands still then."""
    command = [sys.executable, __file__, "--serve", name, workdir, ray_address]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORTS[name]}/ready", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    sys.exit(f"{name} ended with {process.returncode}")
                time.sleep(0.5)
        else:
            sys.exit(f"{name} does not answer")
        os.kill(process.pid, signal.SIGSTOP)
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def compare_running(arguments: argparse.Namespace) -> None:
    """Searches with users beside searches without, of the service at `arguments.port`."""
    names = {"without a user": False, "with a user": True}
    for kind, paths in queries(arguments.bundle).items():
        rates: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(-1, arguments.rounds):  # the first warms up
            for name, users in list(names.items())[:: 1 if turn % 2 else -1]:
                sizes = arguments.clients, arguments.seconds
                found = rate(arguments.port, paths, *sizes, users, users)
                if turn >= 0:
                    rates[name].append(found)
        tell(kind, rates, "without a user")


def tell(kind: str, rates: dict[str, list[float]], base: str) -> None:
    for name, some in rates.items():
        ratio = np.array(some) / rates[base]
        print(
            f"{kind:5} {name:14} {np.median(some):8.1f}/s, of {base} "
            f"{np.median(ratio):.3f} [{ratio.min():.3f}, {ratio.max():.3f}]",
            flush=True,
        )


def main(arguments: argparse.Namespace) -> None:
    from acebert.cluster import ray
    from acebert.serving.bundle import publish

    info = json.loads((arguments.bundle / "bundle.json").read_text())
    print(f"{info['products']} products, {os.cpu_count()} cores, {arguments.clients} clients")
    with ExitStack() as stack:
        workdir = stack.enter_context(tempfile.TemporaryDirectory())
        for arm in (None, "old", "new"):
            publish(Path(workdir), arguments.bundle.resolve(), arm)
        ray.init(address="local", num_cpus=1, include_dashboard=False)
        address = ray.get_runtime_context().gcs_address
        pids = {name: stack.enter_context(started(name, workdir, address)) for name in PORTS}
        for kind, paths in queries(arguments.bundle).items():
            rates: dict[str, list[float]] = {name: [] for name in PORTS}
            for turn in range(-1, arguments.rounds):  # the first warms up
                order = list(PORTS)[:: 1 if turn % 2 else -1]
                for name in order:
                    os.kill(pids[name], signal.SIGCONT)
                    sizes = arguments.clients, arguments.seconds
                    found = rate(PORTS[name], paths, *sizes, True, name in TWO_ARMS)
                    os.kill(pids[name], signal.SIGSTOP)
                    if turn >= 0:
                        rates[name].append(found)
            tell(kind, rates, "bare")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--port", type=int, help="of a service that runs")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.serve:
        serve(*parsed.serve)
    elif parsed.port:
        compare_running(parsed)
    else:
        main(parsed)
