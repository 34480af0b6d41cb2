"""Photos → crops → a shard of features: the work of one step of preprocessing, without Ray.

    batch = prepare(rows, spec)          # decode, RoI, crops: CPU work, no torch
    report = encode(batch, cnn, out)     # CNN, and the shard written under `out`

Between the two lies a batch as Ray Data carries them, a dict of arrays, for they run in one process
where the CNN runs on the CPU, and in two where it has a GPU.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from acebert.data.features import (
    N_PATCHES,
    PHOTO_DIGEST,
    FeatureStore,
    Shard,
    ShardEntry,
    photo_digest,
    write_shard,
)
from acebert.data.image import Box, BrokenImage, crop_resize, decode, find_roi
from acebert.data.photos import Photo, PhotoStorage, Rows

if TYPE_CHECKING:
    from acebert.data.patches import PatchCNN

Batch = dict[str, np.ndarray]
JPEG_QUALITY = 90


@dataclass(frozen=True)
class CropSpec:
    """What is cut from a photo."""

    storage: PhotoStorage
    roi: bool
    """look for the region of interest, else the whole photo counts as one"""
    cnn_side: int
    """side of the crops that the CNN reads [px]; 0: none"""
    pixel_side: int
    """side of the pixels that are stored [px]; 0: none"""
    pixel_source: str
    """`roi` or `photo`"""
    pixel_format: str
    """`raw` or `jpeg`"""
    max_megapixels: float

    @property
    def row_bytes(self) -> int:
        """Memory that a product takes in a batch."""
        return 3 * (self.cnn_side**2 + self.pixel_side**2)


@dataclass(frozen=True)
class Reuse:
    """An earlier `features` stage of the same settings, whose rows hold for photos that have not
    changed; opened where it is read, for this is sent to workers.

    Attributes:
        features: its directory.
        rows: file with the row there of each product, int32 [n], or -1 (`earlier_rows`).
    """

    features: Path
    rows: Path

    def open(self) -> tuple[FeatureStore, np.ndarray]:
        return _opened(self)

    def find(self, product: int, photo: np.ndarray) -> int:
        """The row there of this product with this photo (`photo_digest`), or -1."""
        store, rows = self.open()
        row = int(rows[product])
        same = row >= 0 and np.array_equal(store.photos(np.array([row]))[0], photo)
        return row if same else -1


@lru_cache(1)
def _opened(reuse: Reuse) -> tuple[FeatureStore, np.ndarray]:
    rows = np.load(reuse.rows, mmap_mode="r", allow_pickle=False)
    return FeatureStore(reuse.features), rows


@dataclass
class ShardReport:
    """What a written shard held."""

    shard: ShardEntry
    missing: int
    """products without a photo"""
    rois: int
    """photos with a region of interest"""
    clipped: int
    """feature values beyond float16"""
    reused: int
    """photos whose features were there already"""
    broken: list[tuple[str, str]]
    """product_id and reason of photos that could not be read"""


def prepare(rows: Rows, spec: CropSpec, reuse: Reuse | None = None) -> Batch:
    """Read the photos of n catalogue rows, and cut those that are not in `reuse`.

    Returns:
        `product` int32 [n], `product_id` str [n], `has_image` bool [n], `found` bool [n] (a RoI),
        `roi` int32 [n, 4], `photo` uint8 [n, 16] (`photo_digest`), `reused` int64 [n] (its row in
        `reuse`, or -1: its crops are here), `problem` str [n] ('' for good photos, 'missing', or
        why it is broken), and by the spec `crops` uint8 [n, cnn_side, cnn_side, 3] and `pixels`
        uint8 [n, pixel_side, pixel_side, 3] or JPEGs as bytes [n]. Zeros where there is no image.
    """
    n = rows.count
    batch: Batch = {
        "product": np.zeros(n, np.int32),
        "product_id": np.full(n, "", object),
        "has_image": np.zeros(n, bool),
        "found": np.zeros(n, bool),
        "roi": np.zeros((n, 4), np.int32),
        "photo": np.zeros((n, PHOTO_DIGEST), np.uint8),
        "reused": np.full(n, -1, np.int64),
        "problem": np.full(n, "", object),
    }
    if spec.cnn_side:
        batch["crops"] = np.zeros((n, spec.cnn_side, spec.cnn_side, 3), np.uint8)
    if spec.pixel_side and spec.pixel_format == "jpeg":
        batch["pixels"] = np.full(n, b"", object)
    elif spec.pixel_side:
        batch["pixels"] = np.zeros((n, spec.pixel_side, spec.pixel_side, 3), np.uint8)
    for i, photo in enumerate(spec.storage.read(rows)):
        batch["product"][i], batch["product_id"][i] = photo.product, photo.product_id
        digest = photo_digest(photo.data or b"")
        if reuse is not None and photo.data is not None:
            batch["reused"][i] = reuse.find(photo.product, digest)
            if batch["reused"][i] >= 0:
                continue
        try:
            image = _decode(photo, spec.max_megapixels)
        except BrokenImage as error:
            batch["problem"][i] = error.reason
            continue
        if image is None:
            batch["problem"][i] = "missing"
            continue
        whole: Box = (0, 0, image.shape[1], image.shape[0])
        box, found = find_roi(image) if spec.roi else (whole, False)
        batch["has_image"][i], batch["found"][i], batch["roi"][i] = True, found, box
        batch["photo"][i] = digest
        if spec.cnn_side:
            batch["crops"][i] = crop_resize(image, box, spec.cnn_side)
        if spec.pixel_side:
            shown = box if spec.pixel_source == "roi" else whole
            pixels = crop_resize(image, shown, spec.pixel_side)
            batch["pixels"][i] = _jpeg(pixels) if spec.pixel_format == "jpeg" else pixels
    if reuse is not None:
        _copy(reuse, batch)
    return batch


def _copy(reuse: Reuse, batch: Batch) -> None:
    """What `reuse` has of the batch's photos, but for patches, which `encode` copies."""
    store, _ = reuse.open()
    to = np.flatnonzero(batch["reused"] >= 0)
    rows = batch["reused"][to]
    batch["has_image"][to], batch["found"][to] = True, store.found(rows)
    batch["roi"][to], batch["photo"][to] = store.rois(rows), store.photos(rows)
    if "pixels" in batch and len(to):
        pixels = store.stored_pixels(rows)
        batch["pixels"][to] = np.array(pixels, object) if isinstance(pixels, list) else pixels


def _decode(photo: Photo, max_megapixels: float) -> np.ndarray | None:
    if photo.problem:
        raise BrokenImage(photo.problem)
    return None if photo.data is None else decode(photo.data, max_megapixels)


def _jpeg(pixels: np.ndarray) -> bytes:
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def encode(
    batch: Batch, cnn: "PatchCNN | None", out: Path, reuse: Reuse | None = None
) -> ShardReport:
    """Run the CNN on the crops of a batch and write its shard; the file is named by its first row.
    `reuse` is the one that the batch was prepared with.

    Raises:
        OSError: the shard cannot be written.
    """
    has_image, reused = batch["has_image"], batch["reused"] >= 0
    patches, clipped = None, 0
    if cnn is not None:
        before = cnn.clipped
        patches = np.zeros((len(has_image), N_PATCHES, cnn.patch_dim), np.float16)
        patches[has_image & ~reused] = cnn(batch["crops"][has_image & ~reused])
        if reuse is not None:
            patches[reused] = reuse.open()[0].patches(batch["reused"][reused])
        clipped = cnn.clipped - before
    pixels: Any = batch.get("pixels")
    if pixels is not None and pixels.dtype == object:
        pixels = pixels.tolist()
    shard = Shard(
        batch["product"],
        has_image,
        batch["roi"],
        patches,
        pixels,
        batch["found"],
        batch["photo"],
    )
    problems = list(zip(batch["product_id"].tolist(), batch["problem"].tolist(), strict=True))
    return ShardReport(
        shard=write_shard(out, f"part-{batch['product'][0]:09d}.arrow", shard),
        missing=sum(problem == "missing" for _, problem in problems),
        rois=int(batch["found"].sum()),
        clipped=clipped,
        reused=int(reused.sum()),
        broken=[(key, problem) for key, problem in problems if problem not in ("", "missing")],
    )
