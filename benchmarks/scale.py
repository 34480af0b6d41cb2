"""Seconds and memory of the stages that see the whole data, against its size, with a line through.

    python benchmarks/scale.py                       # all five, minutes on two idle cores
    python benchmarks/scale.py --parts plan --pairs 1000000 5000000 25000000

ingest      the demo's log of 20,000 products, rows a day as asked, data.memory_limit 500MB
plan        one epoch, W = 384, 65 batches a partition (benchmarks/plan.py's pairs)
preprocess  the demo's photos, resnet18 at 128 px, pixels at 112 px
embed       the demo's products without photos, `twinbert_tiny` at random weights
recall      exact search of unit vectors of 128 dimensions, mapped, for 2,000 queries, depth 100

A line a + b·size is fitted to each, and read off at the paper's size (25 million pairs, 3.4 million
products, 100,000 queries) and at 100 million products. It is this machine's line: docs/scale.md
says what a cluster makes of it. `cpu` is the CPU time of all processes that this one started: the
number to trust where the machine is shared. `anonymous` is the peak of their memory that no file
backs, above what an idle Ray has. `written` is the size of the result. Linux only.
"""

import argparse
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import yaml
from plan import W, descendants, measure, memory, start_ray, start_workers, write_pairs
from worker_memory import demo_files

from acebert.cluster import ray  # after acebert, which keeps it on 127.0.0.1
from acebert.config import load_settings
from acebert.data import demo_log
from acebert.data.partitions import write_plan
from acebert.data.plan_arithmetic import layout_of

QUERIES = 2_000


@dataclass(frozen=True)
class Row:
    size: int
    seconds: float
    cpu: float
    """seconds"""
    anonymous: float
    """MiB above idle, peak"""
    written: float
    """MB"""


Measured = tuple[int, Callable[[], None], Path]
"""size, the work, where its result lies"""


def logs(sizes: list[int], scratch: Path) -> Iterator[Measured]:
    from acebert.data.ingest import ingest

    for n in sizes:
        work = scratch / f"ingest-{n}"
        work.mkdir()
        demo = load_settings([]).demo
        demo_files(work, 20_000, searches=n // (demo_log.SHOWN * demo.days))
        settings = load_settings(["--workdir", str(work / "work"), "--data.memory_limit", "500MB"])
        files = str(work / "products.parquet"), str(work / "impressions")
        yield n, lambda: _done(ingest(settings, *files)), settings.workdir / "ingest"  # noqa: B023


def plans(sizes: list[int], scratch: Path) -> Iterator[Measured]:
    for n in sizes:
        pairs, out = scratch / f"{n}.parquet", scratch / f"plan-{n}"
        write_pairs(pairs, n)
        out.mkdir()
        layout = layout_of(n, W, None, seed=0)
        yield n, lambda: write_plan(out, pairs, layout, 1), out  # noqa: B023


def features(sizes: list[int], scratch: Path) -> Iterator[Measured]:
    from acebert.data.demo import build_demo
    from acebert.data.ingest import ingest
    from acebert.data.preprocess import preprocess

    for n in sizes:
        argv = ["--recipe", "acebert_tiny", "--workdir", str(scratch / f"features-{n}")]
        settings = load_settings([*argv, "--demo.products", str(n)])
        demo = build_demo(settings)
        files = str(demo.path / "products.parquet"), str(demo.path / "impressions")
        ingested = ingest(settings, *files)
        yield n, lambda: _done(preprocess(settings, ingested)), settings.workdir / "features"  # noqa: B023


def vectors(sizes: list[int], scratch: Path) -> Iterator[Measured]:
    import pyarrow.parquet as pq

    from acebert.data.ingest import ingest
    from acebert.data.tokens import tokenize
    from acebert.evaluation.embed import embed
    from acebert.training.finetune import new_model
    from acebert.training.pairs import StagePaths

    for n in sizes:
        work = scratch / f"embed-{n}"
        work.mkdir()
        demo_files(work, n, searches=2_000)
        settings = load_settings(["--recipe", "twinbert_tiny", "--workdir", str(work / "work")])
        ingested = ingest(settings, str(work / "products.parquet"), str(work / "impressions"))
        tokens = tokenize(settings, ingested)
        model = work / "model"
        new_model(settings, StagePaths(ingested.path, tokens.path, None)).save(model)
        tree = settings.model_dump(mode="json", exclude={"tracking"})
        (model / "settings.yaml").write_text(yaml.safe_dump(tree))
        (model / "tokenizer").symlink_to(tokens.path / "tokenizer")
        texts = pq.read_table(ingested.path / "queries.parquet")["text"][:100].to_pylist()
        yield (
            n,
            lambda: _done(embed(settings, model, ingested, tokens, None, texts)),  # noqa: B023
            settings.workdir / "embed",
        )


def searches(sizes: list[int], scratch: Path) -> Iterator[Measured]:
    from acebert.evaluation.recall import DotProduct, search_catalogue

    rng = np.random.default_rng(0)
    queries = _unit(rng, QUERIES)
    for n in sizes:
        path = scratch / f"vectors-{n}.npy"
        mapped = np.lib.format.open_memmap(path, "w+", np.float32, (n, 128))
        for start in range(0, n, 65_536):
            mapped[start : start + 65_536] = _unit(rng, min(65_536, n - start))
        query = np.repeat(np.arange(QUERIES), 2)
        product = rng.integers(0, n, len(query))
        products = np.load(path, mmap_mode="c")
        yield (
            n,
            lambda: _done(
                search_catalogue(DotProduct(queries, products), QUERIES, query, product, 100)  # noqa: B023
            ),
            path,
        )


def _done(_: object) -> None:
    return


def _unit(rng: np.random.Generator, n: int) -> np.ndarray:
    drawn = rng.standard_normal((n, 128), np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def size_of(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


class CPUTime:
    """CPU time of the processes below this one in a block, those that end in it included."""

    def __enter__(self) -> Self:
        self._before = sum(_ticks().values())
        self._last = _ticks()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self._last |= _ticks()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()
        self._last |= _ticks()

    @property
    def seconds(self) -> float:
        return (sum(self._last.values()) - self._before) / os.sysconf("SC_CLK_TCK")


def _ticks() -> dict[int, int]:
    """Process → its own CPU time so far."""
    found = {}
    for pid in descendants():
        with suppress(OSError):  # it has ended
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            found[pid] = int(fields[11]) + int(fields[12])
    return found


def line(rows: list[Row], name: str) -> tuple[float, float]:
    """a and b of the least squares line a + b·size."""
    b, a = np.polyfit([row.size for row in rows], [getattr(row, name) for row in rows], 1)
    return float(a), float(b)


def report(title: str, unit: str, rows: list[Row], targets: dict[str, int], factor: float) -> None:
    """The table, the lines, and what they say of larger sizes; `factor` more queries than here."""
    heads = unit, "seconds", "cpu", "anonymous", "written"
    print("\n" + title + "\n" + "".join(f"{head:>14}" for head in heads))
    for row in rows:
        print(
            f"{row.size:>14,}{row.seconds:>12.1f} s{row.cpu:>12.1f} s{row.anonymous:>10.0f} MiB"
            f"{row.written:>11.1f} MB"
        )
    if len(rows) < 2:
        return
    for name in ("seconds", "cpu", "anonymous"):
        a, b = line(rows, name)
        print(f"{name} = {a:.1f} + {1e6 * b:.2f} a million {unit}")
    a, b = line(rows, "cpu")
    _, written = line(rows, "written")
    for where, size in targets.items():
        hours = (a + b * size * factor) / 3600
        print(f"{where}: {size:,} {unit}: {hours:,.2f} core hours, {written * size / 1e3:,.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = ["ingest", "plan", "preprocess", "embed", "recall"]
    parser.add_argument("--parts", nargs="*", choices=names, default=names)
    parser.add_argument("--rows", type=int, nargs="+", default=[500_000, 1_000_000, 2_000_000])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 4_000_000, 10_000_000])
    parser.add_argument("--photos", type=int, nargs="+", default=[500, 1_000, 2_000])
    parser.add_argument("--texts", type=int, nargs="+", default=[20_000, 40_000, 80_000])
    parser.add_argument("--vectors", type=int, nargs="+", default=[250_000, 500_000, 1_000_000])
    args = parser.parse_args()
    if set(args.parts) - {"ingest", "recall"}:
        start_ray()
        start_workers()
    idle = float(memory()[1])
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; idle: {idle:.0f} MiB anonymous")
    paper, large = {"paper": 3_400_000}, {"large": 100_000_000}
    plain = {
        "ingest": (logs, args.rows, "rows", {"paper": 400_000_000}, 1.0),
        "plan": (plans, args.pairs, "pairs", {"paper": 25_000_000, "large": 1_000_000_000}, 1.0),
        "preprocess": (features, args.photos, "photos", paper | large, 1.0),
        "embed": (vectors, args.texts, "products", paper | large, 1.0),
        "recall": (searches, args.vectors, "products", paper | large, 100_000 / QUERIES),
    }
    for part in args.parts:
        make, sizes, unit, targets, factor = plain[part]
        rows = []
        with tempfile.TemporaryDirectory() as scratch:
            for size, work, result in make(sizes, Path(scratch)):
                with CPUTime() as used:
                    seconds, peak = measure(work)
                above = float(peak[1]) - idle
                rows.append(Row(size, seconds, used.seconds, above, size_of(result)))
        load = f"load {os.getloadavg()[0]:.1f}"
        asked = f", {QUERIES:,} queries here and 100,000 there" if factor > 1 else ""
        report(f"{part} ({load}{asked})", unit, rows, targets, factor)
    ray.shutdown()


if __name__ == "__main__":
    main()
