"""Image features on disk: shards that are written once and memory-mapped for random access.

    store = FeatureStore(stage.path)
    store.patches(rows)  # float16 [B, 16, D1]

A shard is an Arrow IPC file with one uncompressed record batch of consecutive products, so its
columns are NumPy views of the file: pages come in as rows are asked for and the kernel drops them
again. A process holds a line a shard and nothing a product, whatever the photos take.
`shards.json` lists the shards, so that a lost or truncated one is noticed when the store is opened,
not in mid-epoch; a shard is mapped when it is first asked for.
"""

import json
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from acebert.data.image import decode
from acebert.errors import UserError

N_PATCHES = 16
PHOTO_DIGEST = 16
MAX_MAPPED = 16_384  # shards mapped at a time: Linux allows a process 65,530 maps
DECODERS = min(16, len(os.sched_getaffinity(0)))  # threads that decode JPEGs, off Python's lock
SHARDS_FILE = "shards.json"


class ShardEntry(TypedDict):
    """A line of `shards.json`."""

    file: str
    first: int
    """its first product; the others follow it"""
    rows: int
    bytes: int


class ShardList(TypedDict):
    """`shards.json`."""

    patch_dim: int
    pixel_side: int
    shards: list[ShardEntry]


@dataclass
class Shard:
    """What a shard holds for its n products. Rows without an image are zeros."""

    product: np.ndarray
    """int32 [n], consecutive"""
    has_image: np.ndarray
    """bool [n]"""
    roi: np.ndarray
    """int32 [n, 4]: x0, y0, x1, y1 in the photo [px]"""
    patches: np.ndarray | None
    """float16 [n, 16, D1]"""
    pixels: np.ndarray | list[bytes] | None
    """uint8 [n, S, S, 3], or n JPEGs"""
    found: np.ndarray | None = None
    """bool [n]: the box is a region of interest, not the whole photo for want of one"""
    photo: np.ndarray | None = None
    """uint8 [n, 16]: digest of the photo's bytes (`photo_digest`)"""


def photo_digest(data: bytes) -> NDArray[np.uint8]:
    """What tells photos apart: 128 bits of BLAKE2b of their bytes → uint8 [16]."""
    return np.frombuffer(blake2b(data, digest_size=PHOTO_DIGEST).digest(), np.uint8)


def write_shard(directory: Path, name: str, shard: Shard) -> ShardEntry:
    """Write `directory/name`: aside, then renamed, so that it is whole or not there."""
    columns: dict[str, pa.Array] = {
        "product": pa.array(shard.product, pa.int32()),
        "has_image": pa.array(shard.has_image.view(np.uint8)),  # Arrow's bools are bits: no view
        "roi": _rows(shard.roi.astype(np.int32, copy=False)),
    }
    if shard.found is not None and shard.photo is not None:
        columns |= {"found": pa.array(shard.found.view(np.uint8)), "photo": _rows(shard.photo)}
    if shard.patches is not None:
        columns["patches"] = _rows(shard.patches)
    if isinstance(shard.pixels, list):
        columns["pixels"] = pa.array(shard.pixels, pa.large_binary())
    elif shard.pixels is not None:
        columns["pixels"] = _rows(shard.pixels)
    batch = pa.record_batch(columns)
    path = directory / name
    # A name of its own: a task that Ray runs twice must not write into the other's file.
    aside = directory / f".{name}.{uuid.uuid4().hex}"
    try:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        size = aside.stat().st_size
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    first = int(shard.product[0])
    return {"file": name, "first": first, "rows": batch.num_rows, "bytes": size}


def write_shard_list(
    directory: Path, shards: list[ShardEntry], patch_dim: int, pixel_side: int
) -> None:
    """Write `shards.json`; 0 says that no patches, or no pixels, are stored."""
    ordered = sorted(shards, key=lambda shard: shard["first"])
    listed: ShardList = {"patch_dim": patch_dim, "pixel_side": pixel_side, "shards": ordered}
    (directory / SHARDS_FILE).write_text(json.dumps(listed, indent=1) + "\n")


def _rows(values: np.ndarray) -> pa.FixedSizeListArray:
    """[n, …] as a list of fixed size a row; no copy."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), values[0].size)


class FeatureStore:
    """The features of all products, by product row; may be shared by threads.

    Attributes:
        n_products: rows of the catalogue.
        patch_dim: D1, or 0 where no patches are stored.
        pixel_side: S, or 0 where no pixels are stored.
    """

    def __init__(self, directory: Path | str) -> None:
        """Check that every shard of a `features` stage is there and whole.

        Raises:
            UserError: a shard is missing or truncated, or products are; it names the file.
        """
        self.directory = Path(directory)
        contents = read_shard_list(self.directory)
        self._shards = contents["shards"]
        self.patch_dim, self.pixel_side = contents["patch_dim"], contents["pixel_side"]
        check_shards(self.directory, self._shards)
        self._first = np.array([shard["first"] for shard in self._shards], np.int64)
        rows = np.array([shard["rows"] for shard in self._shards], np.int64)
        gaps = np.flatnonzero(self._first != np.cumsum(rows) - rows)
        if gaps.size:
            lost = int((np.cumsum(rows) - rows)[gaps[0]])
            listed = self.directory / SHARDS_FILE
            raise UserError(f"{listed}: no shard has product {lost}; build the stage again")
        self.n_products = int(rows.sum())
        self._columns = lru_cache(MAX_MAPPED)(self._map)

    def _map(self, number: int) -> dict[str, Any]:
        """Columns of a shard as views of its file: [rows, width], or an Arrow array of JPEGs."""
        entry = self._shards[number]
        path = self.directory / entry["file"]
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            return {name: _view(batch[name]) for name in batch.schema.names}
        except (pa.ArrowException, OSError, IndexError) as error:
            raise UserError(f"{path}: not a whole shard of image features ({error})") from error

    def has_image(self, rows: np.ndarray) -> np.ndarray:
        """bool [B]"""
        return self._gather("has_image", rows, np.empty((len(rows), 1), np.uint8)).view(bool)[:, 0]

    def rois(self, rows: np.ndarray) -> np.ndarray:
        """int32 [B, 4]: x0, y0, x1, y1 of the region of interest in the photo [px]."""
        return self._gather("roi", rows, np.empty((len(rows), 4), np.int32))

    @property
    def knows_photos(self) -> bool:
        """Whether `found` and `photos` are there, as `preprocess` writes them."""
        return "photo" in self._columns(0)

    def found(self, rows: np.ndarray) -> np.ndarray:
        """bool [B]: a region of interest was found."""
        return self._gather("found", rows, np.empty((len(rows), 1), np.uint8)).view(bool)[:, 0]

    def photos(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, 16]: digests of the photos' bytes; zeros where there is no image."""
        return self._gather("photo", rows, np.empty((len(rows), PHOTO_DIGEST), np.uint8))

    def patches(self, rows: np.ndarray) -> np.ndarray:
        """float16 [B, 16, D1]; zeros where there is no image."""
        out = np.empty((len(rows), N_PATCHES * self.patch_dim), np.float16)
        return self._gather("patches", rows, out).reshape(len(rows), N_PATCHES, self.patch_dim)

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """RGB uint8 [B, S, S, 3]; zeros where there is no image. JPEGs are decoded here."""
        S = self.pixel_side
        if self.pixel_side and isinstance(self._columns(0)["pixels"], pa.Array):
            return self._decoded(np.asarray(rows))
        return self._gather("pixels", rows, np.empty((len(rows), S * S * 3), np.uint8)).reshape(
            len(rows), S, S, 3
        )

    def stored_pixels(self, rows: np.ndarray) -> np.ndarray | list[bytes]:
        """Pixels as they are stored: uint8 [B, S, S, 3], or B JPEGs."""
        if not isinstance(self._columns(0)["pixels"], pa.Array):
            return self.pixels(rows)
        shards = self._shard_of(np.asarray(rows))
        return [
            self._columns(int(shard))["pixels"][int(row - self._first[shard])].as_py()
            for row, shard in zip(rows, shards, strict=True)
        ]

    def _gather(self, name: str, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Rows of a column into `out` [B, width]: one NumPy gather for each shard it meets."""
        rows = np.asarray(rows)
        order = np.argsort(rows, kind="stable")  # what lies together is read together
        shard_of = self._shard_of(rows)
        cuts = np.flatnonzero(np.diff(shard_of[order])) + 1
        for slots in np.split(order, cuts) if len(order) else ():
            shard = int(shard_of[slots[0]])
            columns = self._columns(shard)
            if name not in columns:
                raise UserError(
                    f"{self.directory}: no {name} stored; preprocess with the settings of this "
                    "model"
                )
            out[slots] = columns[name][rows[slots] - self._first[shard]]
        return out

    def _shard_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first, rows, side="right") - 1

    def _decoded(self, rows: np.ndarray) -> np.ndarray:
        S = self.pixel_side
        out = np.zeros((len(rows), S, S, 3), np.uint8)
        shard_of = self._shard_of(rows)

        def decode_some(slots: np.ndarray) -> None:
            for slot in slots:
                shard = int(shard_of[slot])
                jpeg = self._columns(shard)["pixels"][int(rows[slot] - self._first[shard])].as_py()
                out[slot] = decode(jpeg, max_megapixels=S * S / 1e6)

        slots = np.flatnonzero(self.has_image(rows))
        list(self._decoders.map(decode_some, np.array_split(slots, 4 * DECODERS)))
        return out

    @cached_property
    def _decoders(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(DECODERS, thread_name_prefix="jpeg")


def read_shard_list(directory: Path) -> ShardList:
    """`shards.json` of a `features` stage.

    Raises:
        UserError: there is none.
    """
    listed = directory / SHARDS_FILE
    if not listed.is_file():
        raise UserError(f"{directory}: no image features (no {SHARDS_FILE} in it)")
    return json.loads(listed.read_text())


def check_shards(directory: Path, shards: list[ShardEntry]) -> None:
    """
    Raises:
        UserError: a file is missing or not of its size; it names the first.
    """
    with os.scandir(directory) as entries:
        found = {entry.name: entry.stat().st_size for entry in entries}
    for shard in shards:
        path, size = directory / shard["file"], found.get(shard["file"])
        if size is None:
            raise UserError(f"{path}: missing; build the stage again")
        if size != shard["bytes"]:
            raise UserError(f"{path}: {size:,} bytes, {shard['bytes']:,} written; damaged")


def _view(column: pa.Array) -> np.ndarray | pa.Array:
    """[n, width] view of a column of fixed width; JPEGs stay an Arrow array."""
    if pa.types.is_large_binary(column.type):
        return column
    if not isinstance(column, pa.FixedSizeListArray):
        return column.to_numpy(zero_copy_only=True).reshape(-1, 1)
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)
