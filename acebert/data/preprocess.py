"""Preprocess: photos of the catalogue → RoIs, patch features and pixels, on Ray Data.

    stage = preprocess(settings, ingested)
    store = FeatureStore(stage.path)

What is written is in docs/architecture.md, 'features'. Ray Data streams runs of at most 1,000 rows
(addresses, not photos) to workers, which read the photos themselves, write a shard and return its
counts, so that neither photos nor features pass through the object store:

* CNN on CPUs: an actor a core does all of it, with one torch thread. Decoding and the CNN then
  share the cores evenly by themselves, whichever of them is slow.
* CNN on GPUs: tasks decode and crop; two actors a GPU run the CNN, one of them while the other
  writes. Only here blocks of crops (at most 128 MiB) pass through the object store.

Photos that a stage of an earlier catalogue or another log has already are read, to tell that they
are the same, and neither decoded nor put through the CNN: their features are copied.

Memory is bounded by the number of workers times the bytes of a run, whatever the catalogue's size.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from acebert.cluster import bring_workers, is_alone
from acebert.config import Settings, weights_digest
from acebert.data.crops import Batch, CropSpec, Reuse, ShardReport, encode, prepare
from acebert.data.earlier import (
    OF_CATALOGUE,
    earlier_rows,
    product_ids,
    same_key,
    stage_key,
)
from acebert.data.features import FeatureStore, write_shard_list
from acebert.data.image import decode, draw_roi
from acebert.data.inputs import first_seen
from acebert.data.photos import PhotoStorage, Rows
from acebert.errors import UserError
from acebert.workdir import STAGE_FILE, Stage, run_stage

if TYPE_CHECKING:
    from acebert.data.patches import PatchCNN

log = logging.getLogger(__name__)

VERSION = 3
MAX_ROWS = 1_000
MIN_ROWS = 100
MAX_BYTES = 96 << 20  # of a run's crops and pixels; below the size at which Ray splits blocks
RUNS_PER_WORKER = 4  # at least, so that workers end together
CPU_SHARE = 0.9  # of a CPU for a worker: what else is scheduled must find a little left
FEW_PHOTOS = 1_000  # new ones, which one process reads in the time that actors take to start
MANY_PHOTOS = 50_000  # all of which may have changed
REPORT_SECONDS = 5.0
GRID_PHOTOS = 24


def preprocess(settings: Settings, ingested: Stage) -> Stage:
    """Compute what the settings' model reads of the photos; reused when nothing has changed. What
    is copied from other stages changes no result beyond the CNN's rounding, so it is not in the
    key.

    The key knows photos in the rows by ingest's digest, and those behind an `image_uri` by their
    size and time where they lie on a file system (`PhotoStorage.fingerprint`), as the job first
    saw them.

    Raises:
        UserError: no such CNN or weights; more than data.max_bad_share of the photos broken; the
            disk is full.
        ValueError: the model reads no images (`settings.reads_images`).
    """
    if not settings.reads_images:
        raise ValueError("a model that reads neither patches nor pixels needs no features")
    spec = crop_spec(settings)
    key = {"version": VERSION, "ingest": ingested.digest, **_image_key(settings)}
    products = ingested.path / "products"
    look = partial(spec.storage.fingerprint, products)
    if photos := first_seen(f"photos of {products}", look):
        key["photos"] = photos

    def build(out: Path) -> None:
        reuse = _reuse(settings.workdir, key, ingested, out)
        _build(settings, spec, ingested, out, reuse)
        if reuse is not None:
            reuse.rows.unlink()

    return run_stage(settings.workdir, "features", key, build)


def _reuse(workdir: Path, key: dict[str, Any], ingested: Stage, out: Path) -> Reuse | None:
    """What can be taken for a stage with this key: of those made by the same settings from another
    ingest, the one with most of its products, the newest of several."""
    ids = product_ids(ingested.path)
    most, best = 0, None
    made = (workdir / "features").glob(f"[!.]*/{STAGE_FILE}")
    for file in sorted(made, key=lambda file: file.stat().st_mtime, reverse=True):
        if not same_key(file.parent, key, *OF_CATALOGUE):
            continue
        earlier = workdir / "ingest" / stage_key(file.parent)["ingest"]
        if (earlier / "products").is_dir():
            rows = earlier_rows(ids, product_ids(earlier))
            if (known := int((rows >= 0).sum())) > most:
                most, best = known, (file.parent, rows)
    if best is None:
        return None
    path = out / ".earlier_rows.npy"
    np.save(path, best[1])
    return Reuse(best[0], path)


def crop_spec(settings: Settings) -> CropSpec:
    """The settings that matter for crops, as workers take them."""
    image, model = settings.image, settings.model
    return CropSpec(
        # Photos decoded are larger than their files, but for tiny ones.
        storage=PhotoStorage(settings.data.products, int(image.max_megapixels * 3e6) + 2**20),
        roi=image.roi,
        cnn_side=image.cnn_side if model.patches else 0,
        pixel_side=image.pixel_side if model.pixels else 0,
        pixel_source=image.pixel_source,
        pixel_format=image.pixel_format,
        max_megapixels=image.max_megapixels,
    )


def _image_key(settings: Settings) -> dict[str, Any]:
    """The settings that change the result."""
    image, model = settings.image, settings.model
    names = {"roi", "max_megapixels"}
    if model.patches:
        names |= {"cnn", "cnn_weights", "cnn_side"}
    if model.pixels:
        names |= {"pixel_source", "pixel_side", "pixel_format"}
    key = image.model_dump(include=names) | {"patches": model.patches, "pixels": model.pixels}
    if model.patches:
        key["cnn_weights"] = weights_digest(image.cnn_weights)
    return key


def _build(
    settings: Settings, spec: CropSpec, ingested: Stage, out: Path, reuse: Reuse | None
) -> None:
    bring_workers(settings.train)  # a training follows, and its GPUs run the CNN
    products = ingested.path / "products"
    cnn = _load_cnn(settings) if spec.cnn_side else None
    workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    runs = plan_runs(products, spec, workers)
    total = sum(run.count for run in runs)
    limit = settings.data.max_bad_share
    start = time.perf_counter()
    reports: list[ShardReport] = []
    broken: list[tuple[str, str]] = []
    for report in _progress(stream_shards(runs, spec, cnn, out, reuse), total):
        reports.append(report)
        broken += report.broken
        if len(broken) > limit * total:  # no need to see the rest
            break
    seconds = time.perf_counter() - start
    done = sum(report.shard["rows"] for report in reports)
    photos = done - sum(report.missing for report in reports)
    reasons = dict(Counter(reason for _, reason in broken).most_common())
    if len(broken) > limit * photos:
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())
        examples = ", ".join(key for key, _ in broken[:5])
        raise UserError(
            f"{products}: {len(broken):,} of {photos:,} photos are broken ({counts}), for example "
            f"those of products {examples}. data.max_bad_share allows {limit:.1%}: mend the "
            "photos or raise it"
        )
    patch_dim = cnn.patch_dim if cnn else 0
    write_shard_list(out, [report.shard for report in reports], patch_dim, spec.pixel_side)
    _write_broken(broken, out)
    summary = {
        "products": done,
        "photos": photos,
        "missing": done - photos,
        "broken": len(broken),
        "broken_by_reason": reasons,
        "photos_as_before": sum(report.reused for report in reports),
        "rois_found": sum(report.rois for report in reports),
        "cnn": settings.image.cnn if cnn else None,
        "cnn_weights": cnn.weights_name if cnn else None,
        "clipped_to_fp16": sum(report.clipped for report in reports),
        "shards": len(reports),
        "bytes": sum(report.shard["bytes"] for report in reports),
        "images_per_second": round(photos / seconds, 1),
    }
    (out / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    log.info(
        "features: %s photos, %s as before, %s missing, %s broken %s, RoI found in %s; "
        "%.0f images/s",
        f"{photos:,}",
        f"{summary['photos_as_before']:,}",
        f"{done - photos:,}",
        f"{len(broken):,}",
        reasons or "",
        f"{summary['rois_found']:,}",
        photos / seconds,
    )
    draw_grid(runs, spec, out)


def _load_cnn(settings: Settings) -> "PatchCNN":
    """Built here once and handed to the actors: they ask no hub, and all have the same weights."""
    from acebert.data.patches import PatchCNN

    image = settings.image
    return PatchCNN(image.cnn, image.cnn_weights, image.cnn_side, image.cnn_batch)


def plan_runs(products: Path, spec: CropSpec, workers: int) -> list[Rows]:
    """Cut ingest's row groups into runs that fit in memory and keep all workers busy."""
    files = {path: pq.read_metadata(path) for path in sorted(products.glob("part-*.parquet"))}
    total = sum(metadata.num_rows for metadata in files.values())
    fair = -(-total // (RUNS_PER_WORKER * workers))
    size = max(1, min(MAX_ROWS, max(MIN_ROWS, fair), MAX_BYTES // max(1, spec.row_bytes)))
    runs = []
    for path, metadata in files.items():
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            parts = -(-rows // size)
            cuts = np.linspace(0, rows, parts + 1).astype(int).tolist()
            runs += [Rows(str(path), group, start, stop - start) for start, stop in pairwise(cuts)]
    return runs


def stream_shards(
    runs: list[Rows],
    spec: CropSpec,
    cnn: "PatchCNN | None",
    out: Path,
    reuse: Reuse | None = None,
) -> Iterator[ShardReport]:
    """Write a shard for each run under `out`, by Ray Data; what each held comes as it is done.
    Few new photos are read here, sooner than actors would start."""
    if is_alone() and _are_few(runs, reuse):
        for run in runs:
            yield encode(prepare(run, spec, reuse), cnn, out, reuse)
        return
    resources = ray.cluster_resources()
    cpus, gpus = max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))
    if cnn is None:
        gpus = 0
    shared = [ray.put(cnn)]  # in a list, for Ray to hand on the reference and not the object
    rows = ray.data.from_items([asdict(run) for run in runs], override_num_blocks=len(runs))
    context = rows.context
    context.enable_progress_bars = False  # ours counts photos, and writes a line into any log
    context.print_on_execution_start = False
    if gpus:
        shards = rows.map_batches(
            _Prepare(spec, reuse), batch_size=1, num_cpus=CPU_SHARE
        ).map_batches(
            _Encode,
            fn_constructor_args=(shared, out, reuse),
            # Ray wants a number where there are GPUs. What it cuts apart is put together.
            batch_size=max(run.count for run in runs),
            num_gpus=0.5,
            num_cpus=(1 - CPU_SHARE) / 2,
            compute=ray.data.ActorPoolStrategy(size=2 * gpus),
        )
    else:
        shards = rows.map_batches(
            _PrepareAndEncode,
            fn_constructor_args=(spec, shared, out, reuse),
            batch_size=1,
            num_cpus=CPU_SHARE,
            compute=ray.data.ActorPoolStrategy(size=min(cpus, len(runs))),
        )
    for row in shards.iter_rows():
        fields = json.loads(row["report"])
        fields["broken"] = [tuple(pair) for pair in fields["broken"]]
        yield ShardReport(**fields)


def _are_few(runs: list[Rows], reuse: Reuse | None) -> bool:
    total = sum(run.count for run in runs)
    if reuse is None or total > MANY_PHOTOS:
        return total <= FEW_PHOTOS
    return int((np.load(reuse.rows) < 0).sum()) <= FEW_PHOTOS


class _Prepare:
    """One run of rows → the batch of its crops."""

    def __init__(self, spec: CropSpec, reuse: Reuse | None) -> None:
        self.spec, self.reuse = spec, reuse

    def __call__(self, batch: Batch) -> Batch:
        return prepare(_only_row(batch), self.spec, self.reuse)


class _Encode:
    """A batch of crops → the reports of its shards, which it writes."""

    def __init__(self, shared: list["ray.ObjectRef"], out: Path, reuse: Reuse | None) -> None:
        self.out, self.reuse = out, reuse
        self.cnn: PatchCNN | None = ray.get(shared[0])
        if self.cnn is not None:
            import torch

            from acebert.data.patches import best_device

            torch.set_num_threads(1)  # an actor a core
            self.cnn.to(best_device())

    def __call__(self, batch: Batch) -> pa.Table:
        # Ray may join runs that do not follow each other; a shard holds consecutive products.
        cuts = np.flatnonzero(np.diff(batch["product"]) != 1) + 1
        edges = [0, *cuts.tolist(), len(batch["product"])]
        reports = [
            encode(
                {name: column[a:b] for name, column in batch.items()},
                self.cnn,
                self.out,
                self.reuse,
            )
            for a, b in pairwise(edges)
        ]
        return pa.table({"report": [json.dumps(asdict(report)) for report in reports]})


class _PrepareAndEncode:
    """Both in one process."""

    def __init__(
        self,
        spec: CropSpec,
        shared: list["ray.ObjectRef"],
        out: Path,
        reuse: Reuse | None,
    ) -> None:
        self.prepare, self.encode = _Prepare(spec, reuse), _Encode(shared, out, reuse)

    def __call__(self, batch: Batch) -> pa.Table:
        return self.encode(self.prepare(batch))


def _only_row(batch: Batch) -> Rows:
    return Rows(**{name: values[0] for name, values in batch.items()})


def _progress(reports: Iterator[ShardReport], total: int) -> Iterator[ShardReport]:
    """Log how far it is, every few seconds."""
    start = last = time.perf_counter()
    done = 0
    for report in reports:
        done += report.shard["rows"]
        now = time.perf_counter()
        if now - last >= REPORT_SECONDS:
            rate = done / (now - start)
            left = (total - done) / rate
            log.info(
                "features: %s of %s products, %.0f/s, %.0f s left",
                f"{done:,}",
                f"{total:,}",
                rate,
                left,
            )
            last = now
        yield report


def _write_broken(broken: list[tuple[str, str]], out: Path) -> None:
    columns = {
        "product_id": pa.array([key for key, _ in broken], pa.string()),
        "reason": pa.array([reason for _, reason in broken], pa.string()),
    }
    pq.write_table(pa.table(columns), out / "broken_images.parquet")


def draw_grid(runs: list[Rows], spec: CropSpec, out: Path) -> None:
    """Draw `grid.png`: photos from all over the catalogue with their RoIs and 4×4 cells."""
    from matplotlib.figure import Figure

    store = FeatureStore(out)
    chosen = [runs[i] for i in np.unique(np.linspace(0, len(runs) - 1, 6).astype(int))]
    each = -(-GRID_PHOTOS // len(chosen))
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    axes = figure.subplots(4, 6).ravel()
    shown = 0
    for run in chosen:
        photos = [p for p in spec.storage.read(run) if store.has_image(np.array([p.product]))[0]]
        for i in np.unique(np.linspace(0, len(photos) - 1, each).astype(int)) if photos else ():
            photo = photos[i]
            if shown == GRID_PHOTOS or photo.data is None:
                break
            image = decode(photo.data, spec.max_megapixels)
            x0, y0, x1, y1 = store.rois(np.array([photo.product]))[0].tolist()
            axes[shown].imshow(draw_roi(image, (x0, y0, x1, y1)))
            axes[shown].set_title(photo.product_id, fontsize=8)
            shown += 1
    for axis in axes:
        axis.set_axis_off()
    figure.suptitle("Region of interest (green) and its 4×4 patches", fontsize=11)
    figure.savefig(out / "grid.png", dpi=110)
