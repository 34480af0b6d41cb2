"""Anonymous memory of a finetune worker against the size of the catalogue.

    python benchmarks/worker_memory.py --fashion DIR

A worker is the training loop in a process of its own, 30 steps and a validation. Anonymous memory
is what no file backs: the kernel cannot drop it, and each worker has its own. Mapped files are in
the page cache, once a node. `--fashion` is a directory with products.parquet and impressions/, cut
to its first products and the first rows of three days; `--demo` are the demo generator's titles and
log. Photos are left out: patch features of 2 KB a product are drawn at random and written as
preprocess would.

Columns: training pairs, bytes of the files that the worker maps, and its anonymous memory when the
modules are imported, when its inputs are open, after 30 steps and a validation, and the growth from
the first to the last. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from acebert.config import Settings, load_settings, settings_from
from acebert.data import demo_log
from acebert.data.demo_catalogue import KINDS, catalogue, day, product_id, titles
from acebert.data.features import Shard, write_shard, write_shard_list
from acebert.data.partitions import SCHEMA, STEPS_SCHEMA, epoch_dir, part_file

PATCH_DIM = 64
SHARD = 1_000  # as many as preprocess writes at most, so that as many files are mapped
CHUNK = 50_000
ROWS_A_DAY = 200_000
STEPS = 30
MODEL = [
    *[
        "--model.width",
        "64",
        "--model.heads",
        "2",
        "--model.layers",
        "1",
        "--model.pixels",
        "false",
    ],
    *["--train.batch_size", "64", "--train.epochs", "1", "--train.max_steps", str(STEPS)],
    *["--train.valid_products", "1000", "--train.validate_every", str(STEPS)],
    *["--train.valid_searches", "200", "--data.max_bad_share", "1", "--data.memory_limit", "1GB"],
]


def demo_files(out: Path, products: int, searches: int) -> None:
    """The demo generator's products without photos, and its log."""
    demo = load_settings(
        ["--demo.products", str(products), "--demo.searches_per_day", str(searches)]
    ).demo
    cat, kinds = catalogue(demo), list(KINDS)
    schema = pa.schema({"product_id": pa.string(), "title": pa.string(), "category": pa.string()})
    with pq.ParquetWriter(out / "products.parquet", schema) as file:
        for start in range(0, products, CHUNK):
            rows = range(start, min(start + CHUNK, products))
            names = titles(cat, rows, np.random.default_rng([demo.seed, 3, start]))
            ids = [product_id(row) for row in rows]
            of_kind = [kinds[cat.kind[row]] for row in rows]
            file.write_table(pa.table([ids, names, of_kind], schema=schema))
    (out / "impressions").mkdir()
    for number, block in demo_log.blocks(demo):
        table = demo_log.impressions(demo, number, block)
        pq.write_table(table, out / "impressions" / f"{day(number)}-{block}.parquet")


def fashion_files(out: Path, source: Path, products: int) -> None:
    columns = ["product_id", "title", "category"]
    table = pq.read_table(source / "products.parquet", columns=columns)
    pq.write_table(table.slice(0, products), out / "products.parquet")
    (out / "impressions").mkdir()
    for path in sorted((source / "impressions").glob("*.parquet"))[:3]:
        batch = next(pq.ParquetFile(path).iter_batches(ROWS_A_DAY))
        pq.write_table(pa.Table.from_batches([batch]), out / "impressions" / path.name)


def draw_features(out: Path, products: int) -> None:
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(SHARD, 16, PATCH_DIM)).astype(np.float16)
    entries = []
    for first in range(0, products, SHARD):
        n = min(SHARD, products - first)
        rows = np.arange(first, first + n, dtype=np.int32)
        shard = Shard(rows, np.ones(n, bool), np.zeros((n, 4), np.int32), patches[:n], None)
        entries.append(write_shard(out, f"part-{first:09d}.arrow", shard))
    write_shard_list(out, entries, PATCH_DIM, 0)


def draw_plan(out: Path, pairs_file: Path, batch_size: int) -> None:
    """One epoch of batches drawn at random, in the plan's files: no Ray is needed for that."""
    pairs = pq.read_table(pairs_file, columns=["pair", "query", "product"])
    order = np.random.default_rng(0).permutation(len(pairs))
    steps, remainder = divmod(len(pairs), batch_size)
    epoch = epoch_dir(out, 0)
    epoch.mkdir(parents=True)
    with pa.ipc.new_file(str(part_file(out, 0, 0)), SCHEMA) as file:
        file.write_table(pairs.take(order).combine_chunks().cast(SCHEMA), batch_size)
    rows = steps + (remainder > 0)
    columns = [np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32)]
    with pa.ipc.new_file(str(epoch / "steps.arrow"), STEPS_SCHEMA) as file:
        file.write_table(pa.table(columns, schema=STEPS_SCHEMA))
    counts = {"pairs": len(pairs), "batch_size": batch_size, "partitions": 1, "epochs": 1}
    report: dict[str, object] = {**counts, "remainder": remainder, "hard_share_by_epoch": []}
    (out / "report.json").write_text(json.dumps(report))


def prepare(settings: Settings, scratch: Path) -> dict[str, str]:
    """The stages that a worker reads; their paths as StagePaths has them."""
    from acebert.data.ingest import ingest
    from acebert.data.tokens import tokenize

    files = str(scratch / "products.parquet"), str(scratch / "impressions")
    ingested = ingest(settings, *files)
    features = scratch / "features"
    features.mkdir()
    lists = ingested.path / "product_hot_lists.parquet"
    draw_features(features, pq.read_metadata(lists).num_rows)
    draw_plan(scratch / "plan", ingested.path / "pairs.parquet", settings.train.batch_size)
    return {
        "ingest": str(ingested.path),
        "tokens": str(tokenize(settings, ingested).path),
        "features": str(features),
        "plan": str(scratch / "plan"),
    }


def anonymous() -> float:
    """MiB of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def worker(job: dict[str, dict[str, object]]) -> None:
    """Train, and print anonymous MiB as JSON: imported, opened, trained."""
    import torch

    from acebert.training.finetune import new_model
    from acebert.training.loop import run
    from acebert.training.pairs import PairBatches, StagePaths
    from acebert.training.steps import Rank

    torch.set_num_threads(1)
    settings = settings_from(job["settings"])
    paths = StagePaths(**{name: Path(str(path)) for name, path in job["paths"].items()})
    at = [anonymous()]
    opened = PairBatches(settings, paths, 0, 1)
    opened.batch(0)
    at.append(anonymous())
    del opened
    alone = Rank(0, 1, torch.device("cpu"), save=lambda tensors, progress: None)
    run(settings, paths, new_model(settings, paths), alone)
    at.append(anonymous())
    print(json.dumps(at))


def mapped_bytes(paths: dict[str, str]) -> int:
    """Bytes of the files that a worker maps."""
    files = [*Path(paths["features"]).glob("*.arrow"), *Path(paths["ingest"]).glob("lookups/*")]
    files += [*Path(paths["tokens"]).glob("*.npy"), *Path(paths["plan"]).rglob("*.arrow")]
    return sum(file.stat().st_size for file in files)


def measure(name: str, scratch: Path) -> str:
    argv = ["--recipe", "acebert_tiny", "--workdir", str(scratch / "work"), *MODEL]
    settings = load_settings(argv)
    paths = prepare(settings, scratch)
    job = json.dumps({"settings": settings.model_dump(mode="json"), "paths": paths})
    done = subprocess.run(
        [sys.executable, __file__, "--worker", job], capture_output=True, text=True, check=True
    )
    imported, opened, trained = json.loads(done.stdout.splitlines()[-1])
    pairs = pq.read_metadata(Path(paths["ingest"]) / "pairs.parquet").num_rows
    return (
        f"{name:<20}{pairs:>12,}{mapped_bytes(paths) / 1e6:>12,.0f} MB{imported:>10.0f}"
        f"{opened:>10.0f}{trained:>10.0f}{trained - imported:>10.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--fashion", type=Path, help="products.parquet and impressions/")
    parser.add_argument("--products", type=int, nargs="*", default=[10_000, 44_441])
    parser.add_argument("--demo", type=int, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--searches", type=int, default=10_000, help="a day, of the demo")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    heads = "pairs", "mapped", "imported", "opened", "trained", "growth"
    print(f"{'products':<20}{heads[0]:>12}{heads[1]:>15}" + "".join(f"{h:>10}" for h in heads[2:]))
    for source, sizes in (("fashion", args.products if args.fashion else []), ("demo", args.demo)):
        for products in sizes:
            with tempfile.TemporaryDirectory() as scratch:
                if source == "fashion":
                    fashion_files(Path(scratch), args.fashion, products)
                else:
                    demo_files(Path(scratch), products, args.searches)
                print(measure(f"{source} {products:,}", Path(scratch)), flush=True)


if __name__ == "__main__":
    main()
