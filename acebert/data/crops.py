"""Photos → crops → a shard of features: the work of one step of preprocessing, without Ray.

    batch = prepare(rows, spec)          # decode, RoI, crops: CPU work, no torch
    report = encode(batch, cnn, out)     # CNN, and the shard written under `out`

Between the two lies a batch as Ray Data carries them, a dict of arrays, for they run in one process
where the CNN runs on the CPU, and in two where it has a GPU.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from acebert.data.features import N_PATCHES, Shard, ShardEntry, write_shard
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
    broken: list[tuple[str, str]]
    """product_id and reason of photos that could not be read"""


def prepare(rows: Rows, spec: CropSpec) -> Batch:
    """Read and cut the photos of n catalogue rows.

    Returns:
        `product` int32 [n], `product_id` str [n], `has_image` bool [n], `found` bool [n] (a RoI),
        `roi` int32 [n, 4], `problem` str [n] ('' for good photos, 'missing', or why it is broken),
        and by the spec `crops` uint8 [n, cnn_side, cnn_side, 3] and `pixels` uint8
        [n, pixel_side, pixel_side, 3] or JPEGs as bytes [n]. Zeros where there is no image.
    """
    n = rows.count
    batch: Batch = {
        "product": np.zeros(n, np.int32),
        "product_id": np.full(n, "", object),
        "has_image": np.zeros(n, bool),
        "found": np.zeros(n, bool),
        "roi": np.zeros((n, 4), np.int32),
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
        if spec.cnn_side:
            batch["crops"][i] = crop_resize(image, box, spec.cnn_side)
        if spec.pixel_side:
            shown = box if spec.pixel_source == "roi" else whole
            pixels = crop_resize(image, shown, spec.pixel_side)
            batch["pixels"][i] = _jpeg(pixels) if spec.pixel_format == "jpeg" else pixels
    return batch


def _decode(photo: Photo, max_megapixels: float) -> np.ndarray | None:
    if photo.problem:
        raise BrokenImage(photo.problem)
    return None if photo.data is None else decode(photo.data, max_megapixels)


def _jpeg(pixels: np.ndarray) -> bytes:
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def encode(batch: Batch, cnn: "PatchCNN | None", out: Path) -> ShardReport:
    """Run the CNN on the crops of a batch and write its shard; the file is named by its first row.

    Raises:
        OSError: the shard cannot be written.
    """
    has_image = batch["has_image"]
    patches, clipped = None, 0
    if cnn is not None:
        before = cnn.clipped
        patches = np.zeros((len(has_image), N_PATCHES, cnn.patch_dim), np.float16)
        patches[has_image] = cnn(batch["crops"][has_image])
        clipped = cnn.clipped - before
    pixels: Any = batch.get("pixels")
    if pixels is not None and pixels.dtype == object:
        pixels = pixels.tolist()
    shard = Shard(batch["product"], has_image, batch["roi"], patches, pixels)
    problems = list(zip(batch["product_id"].tolist(), batch["problem"].tolist(), strict=True))
    return ShardReport(
        shard=write_shard(out, f"part-{batch['product'][0]:09d}.arrow", shard),
        missing=sum(problem == "missing" for _, problem in problems),
        rois=int(batch["found"].sum()),
        clipped=clipped,
        broken=[(key, problem) for key, problem in problems if problem not in ("", "missing")],
    )
