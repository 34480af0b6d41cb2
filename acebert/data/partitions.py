"""The partition plan on Ray Data: every mini-batch of every epoch, written before training.

    plan(settings, ingested) → Stage      Plan(stage.path).batch(epoch, step) → RecordBatch

* A partition pulls its pairs instead of being sent them. `plan_arithmetic.permute` tells which
  pairs a partition holds without a look at the data, so the columns are laid out once for random
  access (12 bytes a pair, memory-mapped) and each Ray Data task gathers, sorts and writes whole
  partitions. No row is shuffled through the object store.
* Batches are written in the order of partitions; `steps.arrow` says where each step's batch lies.
  The second shuffle, of batches, moves no rows either.
* All epochs are one Ray Data pipeline; small ones share a task.
* A task needs 16 bytes for each pair of the partitions it works on (a million pairs, or one
  partition if that is larger), besides what it touches of the mapped columns.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from acebert.config import Settings
from acebert.data.plan_arithmetic import (
    CHUNK,
    Ints,
    Layout,
    batch_of_step,
    layout_of,
    order_partitions,
    random_hard_share,
    short_batch,
)
from acebert.errors import UserError
from acebert.workdir import Stage, run_stage

log = logging.getLogger(__name__)

VERSION = 1  # raised when the same pairs and settings would give another plan
PART_ROWS = 1 << 20  # pairs in a file, where partitions are smaller than that
BLOCK_ROWS = 1 << 18  # pairs in a Ray Data block at least, where epochs are smaller than a file
OPEN_PARTS = 64  # files of an epoch that a reader holds open
PROGRESS_SECONDS = 5.0

PAIR_COLUMNS = ["pair", "query", "product", "category_code"]
SCHEMA = pa.schema([("pair", pa.int64()), ("query", pa.int32()), ("product", pa.int32())])
STEPS_SCHEMA = pa.schema([("part", pa.int32()), ("record_batch", pa.int32())])


def plan(settings: Settings, ingested: Stage) -> Stage:
    """Draw the mini-batches of all `train.epochs` (paper section 4.3) from ingest's pairs.parquet.

    The plan depends on (seed, epoch, pair) and the categories, not on Ray's blocks or tasks.

    Raises:
        UserError: fewer pairs than a batch (train.batch_size), more partitions than batches
            (plan.partitions), a pairs.parquet that is not as ingest writes it, or a full disk.
    """
    pairs_file = ingested.path / "pairs.parquet"
    layout = layout_of(
        count_pairs(pairs_file),
        settings.train.batch_size,
        settings.plan.partitions,
        settings.seed,
        settings.plan.batches_per_partition,
    )
    epochs = settings.train.epochs
    key = {"version": VERSION, "ingest": ingested.digest, "epochs": epochs, **asdict(layout)}
    return run_stage(
        settings.workdir, "plan", key, lambda out: write_plan(out, pairs_file, layout, epochs)
    )


def write_plan(
    out: Path,
    pairs_file: Path,
    layout: Layout,
    epochs: int,
    *,
    part_rows: int = PART_ROWS,
    blocks: int | None = None,
) -> None:
    """Write the plan's files under `out`, which all nodes of the cluster must see.

    Args:
        part_rows: pairs that a file should hold; never less than one partition.
        blocks: Ray Data blocks, i.e. tasks (None: by size). Neither changes any batch.
    """
    import ray.data

    from acebert.cluster import connect

    columns = out / "columns"
    columns.mkdir()
    pairs_of_category = lay_out_columns(pairs_file, columns)
    parts = parts_of(layout, part_rows)
    for epoch in range(epochs):
        epoch_dir(out, epoch).mkdir()
        _write_steps(out, layout, epoch, parts)

    items = [
        {"epoch": epoch, "part": part} for epoch in range(epochs) for part in range(len(parts))
    ]
    if blocks is None:
        blocks = min(len(items), max(1, epochs * layout.pairs // BLOCK_ROWS))
    writer = _PartWriter(out, columns, layout, parts, len(pairs_of_category))
    connect()
    done = (
        ray.data.from_items(items, override_num_blocks=blocks)
        .map_batches(writer, batch_size=None, batch_format="numpy")
        .iter_rows()
    )
    same_category = np.zeros(epochs, np.int64)
    for row in _with_progress(done, len(items)):
        same_category[row["epoch"]] += row["same_category"]
    for file in columns.iterdir():
        file.unlink()
    columns.rmdir()

    W = layout.batch_size
    hard_shares = same_category / (layout.full_batches * W * (W - 1))
    hard_share, floor = float(hard_shares.mean()), random_hard_share(pairs_of_category)
    report = {
        **asdict(layout),
        "epochs": epochs,
        "steps": layout.full_batches,
        "remainder": layout.remainder,
        "hard_share": hard_share,
        "hard_share_by_epoch": hard_shares.tolist(),
        "random_hard_share": floor,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    log.info(
        "plan: %d epochs of %s batches of %d from %s pairs in %s partitions, %d left over an "
        "epoch; hard share %.3f (random batches: %.3f)",
        epochs,
        f"{layout.full_batches:,}",
        W,
        f"{layout.pairs:,}",
        f"{layout.partitions:,}",
        layout.remainder,
        hard_share,
        floor,
    )


class Plan:
    """Reads a plan. Opening it costs a small file; batches are memory-mapped, so any number of
    processes may read at once."""

    def __init__(self, directory: Path | str) -> None:
        """Raises UserError when `directory` holds no plan."""
        self.path = Path(directory)
        report_file = self.path / "report.json"
        if not report_file.is_file():
            raise UserError(f"{self.path}: not a partition plan (it has no report.json)")
        report = json.loads(report_file.read_text())
        self.pairs: int = report["pairs"]
        self.batch_size: int = report["batch_size"]
        self.partitions: int = report["partitions"]
        self.epochs: int = report["epochs"]
        self.remainder: int = report["remainder"]
        """Pairs in each epoch's short last batch."""
        self.hard_share_by_epoch: list[float] = report["hard_share_by_epoch"]
        """Mean share of a pair's in-batch negatives that are of its category."""
        self._open_epoch: int | None = None

    def steps(self, epoch: int) -> int:
        """Full batches in the epoch; `batch(epoch, steps(epoch))` is the short one, if any.

        Raises:
            IndexError: the plan has no such epoch.
        """
        if not 0 <= epoch < self.epochs:
            raise IndexError(f"{self.path}: epoch {epoch} of a plan of {self.epochs} epochs")
        return self.pairs // self.batch_size

    def batch(self, epoch: int, step: int) -> pa.RecordBatch:
        """The mini-batch of this step: `pair` int64, `query`, `product` int32; W rows, or the
        remainder. Columns map the file: `batch["query"].to_numpy()` copies nothing.

        Raises:
            IndexError: the plan has no such epoch or step.
        """
        stop = self.steps(epoch) + (self.remainder > 0)
        if not 0 <= step < stop:
            raise IndexError(f"{self.path}: step {step} of an epoch of {stop} batches")
        if epoch != self._open_epoch:
            index = _open(epoch_dir(self.path, epoch) / "steps.arrow").get_batch(0)
            self._part = index["part"].to_numpy()
            self._record_batch = index["record_batch"].to_numpy()
            # Each holds a file open, and an epoch of 1,000 million pairs has a thousand.
            self._reader = lru_cache(OPEN_PARTS)(lambda n: _open(part_file(self.path, epoch, n)))
            self._open_epoch = epoch
        reader = self._reader(int(self._part[step]))
        return reader.get_batch(int(self._record_batch[step]))


def _open(path: Path) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(path)))


def epoch_dir(directory: Path, epoch: int) -> Path:
    return directory / f"epoch-{epoch:03d}"


def part_file(directory: Path, epoch: int, part: int) -> Path:
    return epoch_dir(directory, epoch) / f"part-{part:05d}.arrow"


def count_pairs(pairs_file: Path) -> int:
    """Rows of pairs.parquet, n.

    Raises:
        UserError: no such file, or one without the columns of the contract.
    """
    if not pairs_file.is_file():
        raise UserError(f"{pairs_file}: there is no such file; run the ingest stage first")
    with pq.ParquetFile(pairs_file) as parquet:
        missing = [name for name in PAIR_COLUMNS if name not in parquet.schema_arrow.names]
        if missing:
            raise UserError(f"{pairs_file}: lacks the columns {', '.join(missing)}")
        return parquet.metadata.num_rows


def lay_out_columns(pairs_file: Path, columns: Path) -> Ints:
    """Stream pairs.parquet into `columns` as flat arrays for random access by pair.

    `categories.i4` int32 [n]; `rows.i4` int32 [n, 2], query and product.

    Returns:
        int64 [C]: pairs of each category code.

    Raises:
        UserError: a null, a negative category code, or `pair` other than 0, 1, … n − 1.
    """
    pairs_of_category = np.zeros(1, np.int64)
    n = 0
    with (
        pq.ParquetFile(pairs_file) as parquet,
        (columns / "categories.i4").open("wb") as categories,
        (columns / "rows.i4").open("wb") as rows,
    ):
        for batch in parquet.iter_batches(batch_size=1 << 17, columns=PAIR_COLUMNS):
            for name in PAIR_COLUMNS:
                if batch[name].null_count:
                    raise UserError(f"{pairs_file}: nulls in column {name}; there may be none")
            pair = batch["pair"].to_numpy()
            wrong = np.flatnonzero(pair != np.arange(n, n + len(pair)))
            if wrong.size:
                raise UserError(
                    f"{pairs_file}: row {n + wrong[0]} has pair {pair[wrong[0]]}; pairs are "
                    "numbered 0, 1, 2 … in the order of rows"
                )
            codes = batch["category_code"].to_numpy().astype("<i4", copy=False)
            if codes.min(initial=0) < 0:
                row = n + int(codes.argmin())
                raise UserError(f"{pairs_file}: row {row} has category_code {codes.min()}, below 0")
            counts = np.bincount(codes, minlength=len(pairs_of_category))
            counts[: len(pairs_of_category)] += pairs_of_category
            pairs_of_category = counts
            categories.write(codes.data)
            ends = [batch[name].to_numpy().astype("<i4", copy=False) for name in SCHEMA.names[1:]]
            rows.write(np.stack(ends, axis=1).data)
            n += len(pair)
    return pairs_of_category


def parts_of(layout: Layout, part_rows: int) -> list[tuple[int, int]]:
    """Runs of partitions [first, last) of about `part_rows` pairs, one file each."""
    batches_of_largest = -(-layout.full_batches // layout.partitions)
    run = max(1, part_rows // (batches_of_largest * layout.batch_size))
    P = layout.partitions
    return [(first, min(first + run, P)) for first in range(0, P, run)]


@dataclass(frozen=True)
class _PartWriter:
    """Ray Data's map function: a block of (epoch, part) → files, and what was counted."""

    out: Path
    columns: Path
    layout: Layout
    parts: list[tuple[int, int]]
    num_categories: int

    def __call__(self, block: dict[str, Ints]) -> Iterator[dict[str, Any]]:
        categories = np.asarray(np.memmap(self.columns / "categories.i4", "<i4", "r"))
        # Query and product as one word: a gather then misses the cache once a pair, not twice.
        rows = np.asarray(np.memmap(self.columns / "rows.i4", "<i8", "r"))
        for epoch, part in zip(block["epoch"].tolist(), block["part"].tolist(), strict=True):
            first, last = self.parts[part]
            batches, same_category = order_partitions(
                self.layout, epoch, categories, self.num_categories, first, last
            )
            final = part_file(self.out, epoch, part)
            # A name of its own: a task that Ray runs twice must not write into the other's file.
            aside = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
            try:
                with pa.ipc.new_file(str(aside), SCHEMA) as file:
                    step = max(1, CHUNK // self.layout.batch_size)
                    for low in range(0, len(batches), step):
                        self._write(file, batches[low : low + step].reshape(-1), rows)
                    if last == self.layout.partitions:
                        self._write(file, short_batch(self.layout, epoch), rows)
                os.replace(aside, final)
            finally:
                aside.unlink(missing_ok=True)
            yield {"epoch": [epoch], "part": [part], "same_category": [same_category]}

    def _write(self, file: pa.ipc.RecordBatchFileWriter, pairs: Ints, rows: Ints) -> None:
        query_product = rows[pairs].view("<i4").reshape(-1, 2)
        table = pa.table(
            [pairs, np.ascontiguousarray(query_product[:, 0]), query_product[:, 1].copy()],
            schema=SCHEMA,
        )
        file.write_table(table, max_chunksize=self.layout.batch_size)


def _write_steps(out: Path, layout: Layout, epoch: int, parts: list[tuple[int, int]]) -> None:
    """steps.arrow: row i says which record batch of which part is step i; the short batch last."""
    first_batches = np.array([layout.first_batch(first) for first, _ in parts])
    batch = batch_of_step(layout, epoch)
    if layout.remainder:
        batch = np.append(batch, layout.full_batches)  # it follows the last partition's batches
    part = np.searchsorted(first_batches, batch, side="right") - 1
    columns = [part.astype(np.int32), (batch - first_batches[part]).astype(np.int32)]
    table = pa.table(columns, schema=STEPS_SCHEMA)
    with pa.ipc.new_file(str(epoch_dir(out, epoch) / "steps.arrow"), STEPS_SCHEMA) as file:
        file.write_table(table)


def _with_progress(rows: Iterable[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    last = time.monotonic()
    for count, row in enumerate(rows, 1):
        yield row
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            log.info("plan: %d of %d files written", count, total)
