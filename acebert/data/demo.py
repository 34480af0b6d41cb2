"""The demo catalogue: products drawn, titled, searched and clicked, at any scale.

    stage = build_demo(settings)  # products.parquet, impressions/<date>.parquet, boxes.parquet

It is what runs when no catalogue is given, and what a load test is made of: pictures and log are
made in chunks that depend on the seed and the chunk's number alone, by as many processes as there
are cores, and written as they come. The bytes are the same whatever the number of processes, and
memory holds a few chunks and the products' attributes (some 25 bytes each), never the pictures.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from acebert.config import DemoSettings, Settings
from acebert.data import demo_log
from acebert.data.demo_catalogue import (
    FIRST_DAY,
    KINDS,
    Catalogue,
    background,
    catalogue,
    day,
    product_id,
    titles,
)
from acebert.data.demo_pictures import COLOURS, PATTERNS, Look, Picture, draw
from acebert.workdir import Stage, run_stage

log = logging.getLogger(__name__)

CHUNK = 500  # products of one task and one row group
JPEG_QUALITY = 88
ONE_PROCESS = 10_000  # below, starting processes takes longer than the work [products, searches]

PRODUCTS = pa.schema(
    {
        "product_id": pa.string(),
        "title": pa.string(),
        "category": pa.string(),
        "category_path": pa.string(),
        "price": pa.float32(),
        "listed_at": pa.timestamp("ms"),
        "image": pa.binary(),
    }
)
BOXES = pa.schema(
    {"product_id": pa.string()} | {name: pa.int32() for name in ("x0", "y0", "x1", "y1")}
)


def build_demo(settings: Settings, processes: int | None = None) -> Stage:
    """Draw the catalogue and simulate its log (docs/architecture.md, 'demo').

    `processes` None: one a core, or this one alone where the demo is small. Processes are
    spawned, so a script that calls this needs its `if __name__ == "__main__"`.

    Raises:
        UserError: the work directory cannot be written, or the disk is full.
    """
    demo = settings.demo
    if processes is None:
        large = max(demo.products, demo.searches_per_day * demo.days) > 2 * ONE_PROCESS
        processes = _cores() if large else 1
    return run_stage(
        settings.workdir,
        "demo",
        key={"version": 1, **demo.model_dump()},
        build=partial(_build, demo=demo, processes=processes),
    )


def _build(out: Path, *, demo: DemoSettings, processes: int) -> None:
    with _pool(processes) as pool:
        _write_products(out, demo, pool, processes)
        _write_log(out, demo, pool, processes)


def _write_products(out: Path, demo: DemoSettings, pool: Executor | None, processes: int) -> None:
    starts = range(0, demo.products, CHUNK)
    chunks = _in_order(pool, partial(products, demo), [(start,) for start in starts], processes)
    with (
        pq.ParquetWriter(out / "products.parquet", PRODUCTS, compression="zstd") as to_products,
        pq.ParquetWriter(out / "boxes.parquet", BOXES, compression="zstd") as to_boxes,
    ):
        for table, boxes in _logged(chunks, "products drawn", len(starts)):
            to_products.write_table(table)
            to_boxes.write_table(boxes)
    log.info("demo: %d products", demo.products)


def _write_log(out: Path, demo: DemoSettings, pool: Executor | None, processes: int) -> None:
    (out / "impressions").mkdir()
    tasks = demo_log.blocks(demo)
    tables = _in_order(pool, partial(demo_log.impressions, demo), tasks, processes)
    progress = _logged(zip(tasks, tables, strict=True), "searches simulated", len(tasks))
    for number, blocks in groupby(progress, key=lambda item: item[0][0]):
        path = out / "impressions" / f"{day(number)}.parquet"
        with pq.ParquetWriter(path, demo_log.SCHEMA, compression="zstd") as to_day:
            for _, table in blocks:
                to_day.write_table(table)
    log.info("demo: %d searches on %d days", demo.searches_per_day * demo.days, demo.days)


def products(demo: DemoSettings, start: int) -> tuple[pa.Table, pa.Table]:
    """The products from row `start` on, at most CHUNK: (PRODUCTS, BOXES); no box without photo."""
    cat = catalogue(demo)
    rows = range(start, min(start + CHUNK, demo.products))
    rng = np.random.default_rng([demo.seed, 3, start])
    kinds = list(KINDS)
    names = titles(cat, rows, rng)
    usual = np.array([KINDS[kinds[cat.kind[row]]].price for row in rows])
    prices = usual * rng.lognormal(0, 0.3, len(rows))
    boxes: list[tuple[Any, ...]] = []
    images: list[bytes | None] = []
    for row in rows:
        if not cat.has_image[row]:
            images.append(None)
            continue
        picture = draw(_look(cat, row), demo.image_side, rng)
        images.append(_damage(_jpeg(picture), row) if cat.broken[row] else _jpeg(picture))
        boxes.append((product_id(row), *picture.box))
    category = [kinds[cat.kind[row]] if cat.has_category[row] else None for row in rows]
    table = pa.table(
        {
            "product_id": [product_id(row) for row in rows],
            "title": names,
            "category": [name and name.capitalize() for name in category],
            "category_path": [
                name and f"{KINDS[name].path} > {name.capitalize()}" for name in category
            ],
            "price": prices.round(2).astype(np.float32),
            "listed_at": np.datetime64(FIRST_DAY, "ms")
            + cat.listed[start : rows.stop].astype("timedelta64[D]"),
            "image": images,
        },
        schema=PRODUCTS,
    )
    found = [dict(zip(BOXES.names, box, strict=True)) for box in boxes]
    return table, pa.Table.from_pylist(found, schema=BOXES)


def _look(cat: Catalogue, row: int) -> Look:
    return Look(
        list(KINDS)[cat.kind[row]],
        list(COLOURS)[cat.colour[row]],
        PATTERNS[cat.pattern[row]],
        background(cat, row),
    )


def _jpeg(picture: Picture) -> bytes:
    bgr = cv2.cvtColor(picture.image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def _damage(photo: bytes, row: int) -> bytes:
    """An upload that broke off, or the page that a web server sends instead of a photo."""
    return photo[: len(photo) // 2] if row % 2 else b"<html><h1>404 Not Found</h1></html>"


Result = TypeVar("Result")


def _in_order(
    pool: Executor | None,
    make: Callable[..., Result],
    tasks: Iterable[tuple[Any, ...]],
    processes: int,
) -> Iterator[Result]:
    """make(*task) for each task, in order, with at most two a process under way or waiting."""
    if pool is None:
        yield from (make(*task) for task in tasks)
        return
    pending: deque[Any] = deque()
    for task in tasks:
        pending.append(pool.submit(make, *task))
        if len(pending) >= 2 * processes:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _logged(items: Iterable[Result], what: str, total: int) -> Iterator[Result]:
    """The items, with a line in the log every ten seconds."""
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last > 10:
            last = time.monotonic()
            log.info("demo: %.0f %% of the %s", 100 * done / total, what)


@contextmanager
def _pool(processes: int) -> Iterator[Executor | None]:
    """Spawned, not forked: the caller may have threads (Arrow, torch, Ray)."""
    if processes == 1:
        yield None
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: those that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
