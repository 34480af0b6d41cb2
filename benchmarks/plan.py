"""Seconds and memory of the partition plan, beside Ray Data's own sort of the same keys.

    python benchmarks/plan.py --pairs 1000000 5000000 25000000
    python benchmarks/plan.py --pairs 1000000 5000000 --sort

One epoch, W = 384, the paper's 65 batches a partition, 5,000 categories of Zipf sizes. `processes`
is the peak of all processes that this one started, Ray's daemons among them (proportional set
size: shared pages counted once, mapped files included); `anonymous` is what of it no file backs.
`object store` is Ray's share of it. Linux only.
"""

import argparse
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from acebert.data.partitions import Plan, write_plan
from acebert.data.plan_arithmetic import DEAL, Layout, layout_of, permute, round_keys

W = 384
CATEGORIES = 5000
ROW_GROUP = 1 << 20
OBJECT_STORE = 1 << 30


def write_pairs(path: Path, n: int) -> None:
    """A pairs.parquet of n pairs, with the columns that the plan reads."""
    rng = np.random.default_rng(0)
    schema = pa.schema(
        [
            ("pair", pa.int64()),
            ("query", pa.int32()),
            ("product", pa.int32()),
            ("category_code", pa.int32()),
        ]
    )
    with pq.ParquetWriter(path, schema) as file:
        for low in range(0, n, ROW_GROUP):
            m = min(ROW_GROUP, n - low)
            columns = [
                np.arange(low, low + m),
                rng.integers(0, n // 4 + 1, m).astype(np.int32),
                rng.integers(0, n // 10 + 1, m).astype(np.int32),
                ((rng.zipf(1.3, m) - 1) % CATEGORIES).astype(np.int32),
            ]
            file.write_table(pa.table(columns, schema=schema))


def sort_by_ray(pairs_file: Path, layout: Layout) -> None:
    """What the plan would cost as a push shuffle: key every row, let Ray Data sort, count."""
    keys = round_keys(layout.seed, 0, DEAL)

    def key(batch: pa.Table) -> pa.Table:
        pair = batch["pair"].to_numpy().astype(np.uint64)
        position = permute(pair, layout.pairs, keys)
        partition = layout.partition_of(
            np.minimum(position // np.uint64(W), np.uint64(layout.full_batches - 1))
        )
        word = (partition << np.uint64(32)) | batch["category_code"].to_numpy().astype(np.uint64)
        return batch.append_column("key", pa.array(word.astype(np.int64)))

    # The keys are uniform, so the boundaries are known: Ray need not sample.
    shards = max(2, layout.pairs // ROW_GROUP)
    boundaries: list[int | float] = [
        int(layout.partitions * i / shards) << 32 for i in range(1, shards)
    ]
    dataset = (
        ray.data.read_parquet(str(pairs_file))
        .map_batches(key, batch_format="pyarrow", batch_size=ROW_GROUP)
        .sort("key", boundaries=boundaries)
    )
    rows = sum(len(batch["key"]) for batch in dataset.iter_batches(batch_size=None))
    assert rows == layout.pairs


def start_ray() -> None:
    """One on this machine alone, quiet, whose object store has one size everywhere."""
    ray.init(
        address="local",
        object_store_memory=OBJECT_STORE,
        include_dashboard=False,
        logging_level=logging.WARNING,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False


def start_workers() -> None:
    """Workers that are there already are no part of what is measured."""
    ray.data.range(4, override_num_blocks=4).map_batches(lambda x: x).count()


def descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found


def memory() -> np.ndarray:
    """MiB [processes, anonymous, object store] now."""
    total = np.zeros(3)
    for pid in descendants():
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue  # it has ended
        fields = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
        names = ("Pss", "Pss_Anon", "Pss_Shmem")
        total += [int(fields.get(name, 0)) / 1024 for name in names]
    return total


def measure(work: Callable[[], None]) -> tuple[float, np.ndarray]:
    """Seconds, and peak memory as `memory` gives it."""
    peak = memory()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            np.maximum(peak, memory(), out=peak)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        work()
        return time.perf_counter() - start, peak
    finally:
        stop.set()
        watcher.join()


def check(plan: Plan) -> float:
    """Seconds to read the epoch in the order of steps; every pair must come once."""
    start = time.perf_counter()
    seen = np.zeros(plan.pairs, bool)
    rows = 0
    for step in range(plan.steps(0) + (plan.remainder > 0)):
        pair = plan.batch(0, step)["pair"].to_numpy()
        seen[pair] = True
        rows += len(pair)
    assert rows == plan.pairs
    assert seen.all()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--partitions", type=int, default=None)
    parser.add_argument("--sort", action="store_true", help="also Ray Data's own sort")
    args = parser.parse_args()
    start_ray()
    idle = memory()
    start_workers()
    head = "pairs", "P", "plan", "seconds", "M pairs/s", "processes", "anonymous", "object store"
    lines = [f"idle Ray: {idle[0]:.0f} MiB, {idle[1]:.0f} of it anonymous", ""]
    lines.append(("{:>12}{:>8}  {:<10}" + "{:>14}" * 5).format(*head))
    with tempfile.TemporaryDirectory() as scratch:
        for n in args.pairs:
            pairs_file, out = Path(scratch) / "pairs.parquet", Path(scratch) / "plan"
            write_pairs(pairs_file, n)
            layout = layout_of(n, W, args.partitions, seed=0)
            out.mkdir()
            rows = [("pull", *measure(lambda: write_plan(out, pairs_file, layout, 1)))]  # noqa: B023
            reading = check(Plan(out))
            shutil.rmtree(out)
            if args.sort:
                rows.append(("ray sort", *measure(lambda: sort_by_ray(pairs_file, layout))))  # noqa: B023
            for name, seconds, peak in rows:
                lines.append(
                    f"{n:>12,}{layout.partitions:>8,}  {name:<10}{seconds:>14.1f}"
                    f"{n / 1e6 / seconds:>14.1f}"
                    + "".join(f"{mebibytes:>10.0f} MiB" for mebibytes in peak)
                )
            lines.append(f"{'':>22}reading the epoch in order of steps: {reading:.1f} s")
    print("\n".join(lines))
    ray.shutdown()


if __name__ == "__main__":
    main()
