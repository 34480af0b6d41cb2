"""Images a second through the Ray Data stage against a plain loop over the same functions.

    python benchmarks/preprocess.py --seconds 10 --repeats 3

Both write the same shards of synthetic JPEGs with one process a core and one thread each; the loop
is multiprocessing's pool. 'steady' counts from the first finished shard to the last, so without the
start of the processes; 'whole' counts it too (Ray itself runs already). The two take turns, for
other load on the machine to meet both; rates are medians, ratios medians over the turns.
"""

import argparse
import logging
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from acebert.config import settings_from
from acebert.data.crops import CropSpec, encode, prepare
from acebert.data.patches import PatchCNN, dead_leaves
from acebert.data.photos import Rows
from acebert.data.preprocess import crop_spec, plan_runs, stream_shards

SIZES = [(60, 80), (224, 224), (600, 800)]  # width, height [px]
CNN_SIDE, PIXEL_SIDE = 128, 112
DISTINCT = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="work of a measurement [s]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=options.processes,
        object_store_memory=500 * 2**20,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    print(f"{options.processes} processes, {options.repeats} turns")
    print(f"{'':32} |{'steady':^22} |{'whole':^22}")
    columns = f"{'loop/s':>7} {'Ray/s':>7} {'ratio':>6}"
    print(f"{'photos':>8} {'work':>15} {'images':>7} |{columns} |{columns}")
    resnet18 = PatchCNN("resnet18", "random", CNN_SIDE)
    with tempfile.TemporaryDirectory() as name:
        for size in SIZES:
            for work, cnn in (("decode and RoI", None), ("with resnet18", resnet18)):
                measure(size, work, cnn, Path(name), options)


def measure(
    size: tuple[int, int], work: str, cnn: PatchCNN | None, root: Path, options: argparse.Namespace
) -> None:
    """Print one row of the table."""
    settings = settings_from(
        {
            "workdir": root,
            "image": {"cnn_side": CNN_SIDE, "pixel_side": PIXEL_SIDE},
            "model": {"patches": cnn is not None},
        }
    )
    spec = crop_spec(settings)
    photos = draw_photos(*size)
    n = round(options.seconds * options.processes * photos_per_second(photos, spec, cnn, root))
    products = write_products(photos, n, root)
    runs = plan_runs(products, spec, options.processes)
    loop, stage = [], []
    for _ in range(options.repeats):
        loop.append(rates(partial(run_loop, runs, spec, cnn, options.processes), root))
        stage.append(rates(partial(run_stage, runs, spec, cnn), root))
    line = f"{size[0]:>4}x{size[1]:<3} {work:>15} {n:>7} "
    for kind in (0, 1):
        pairs = [(a[kind], b[kind]) for a, b in zip(loop, stage, strict=True)]
        ratio = statistics.median(b / a for a, b in pairs)
        plain, ray_data = (statistics.median(side) for side in zip(*pairs, strict=True))
        line += f"|{plain:>7.0f} {ray_data:>7.0f} {ratio:>6.2f} "
    print(line, flush=True)


def draw_photos(width: int, height: int) -> list[bytes]:
    """JPEGs of something busy on white."""
    inner = max(width, height) // 2
    photos = []
    for thing in dead_leaves(DISTINCT, inner):
        photo = np.full((height, width, 3), 255, np.uint8)
        thing = thing[: height - 4, : width - 4]
        y, x = (height - thing.shape[0]) // 2, (width - thing.shape[1]) // 3
        photo[y : y + thing.shape[0], x : x + thing.shape[1]] = thing
        photos.append(cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    return photos


def write_products(photos: list[bytes], n: int, root: Path) -> Path:
    """Ingest's products, n of them with these photos over and over."""
    products = root / "products"
    shutil.rmtree(products, ignore_errors=True)
    products.mkdir()
    columns = {
        "product": pa.array(np.arange(n, dtype=np.int32)),
        "product_id": pa.array([str(i) for i in range(n)]),
        "image": pa.array([photos[i % len(photos)] for i in range(n)], pa.binary()),
        "image_uri": pa.nulls(n, pa.string()),
    }
    path = products / "part-00000.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=1000, compression="none")
    return products


def photos_per_second(
    photos: list[bytes], spec: CropSpec, cnn: PatchCNN | None, root: Path
) -> float:
    """A first guess in this process, to choose how many photos to measure with."""
    import torch

    torch.set_num_threads(1)
    [run, *_] = plan_runs(write_products(photos, DISTINCT, root), spec, 1)
    out = root / "guess"
    out.mkdir(exist_ok=True)
    start = time.perf_counter()
    encode(prepare(run, spec), cnn, out)
    return run.count / (time.perf_counter() - start)


def rates(work: Callable[[Path], Iterator[int]], root: Path) -> tuple[float, float]:
    """Images a second of `work`, which yields how many each shard has: steady, and in all."""
    out = root / "out"
    out.mkdir()
    start = time.perf_counter()
    ends, images = zip(*((time.perf_counter(), count) for count in work(out)), strict=True)
    shutil.rmtree(out)
    return sum(images[1:]) / (ends[-1] - ends[0]), sum(images) / (ends[-1] - start)


def run_stage(runs: list[Rows], spec: CropSpec, cnn: PatchCNN | None, out: Path) -> Iterator[int]:
    for report in stream_shards(runs, spec, cnn, out):
        yield report.shard["rows"]


def run_loop(
    runs: list[Rows], spec: CropSpec, cnn: PatchCNN | None, processes: int, out: Path
) -> Iterator[int]:
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(processes, _start, (spec, cnn, out)) as pool:
        yield from pool.imap_unordered(_work, runs)


def _start(spec: CropSpec, cnn: PatchCNN | None, out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    globals()["shared"] = (spec, cnn, out)


def _work(run: Rows) -> int:
    spec, cnn, out = globals()["shared"]
    return encode(prepare(run, spec), cnn, out).shard["rows"]


if __name__ == "__main__":
    main()
