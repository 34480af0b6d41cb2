"""Image features on disk: shards that are written once and memory-mapped for random access.

    store = FeatureStore(stage.path)
    store.patches(rows)  # float16 [B, 16, D1]

A shard is an Arrow IPC file with one uncompressed record batch, so its columns are NumPy views of
the file: pages come in as rows are asked for and the kernel drops them again. A process holds 8
bytes a product, whatever the photos take. `shards.json` lists the shards, so that a lost or
truncated one is noticed when the store is opened, not in mid-epoch.
"""

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from acebert.data.image import decode
from acebert.errors import UserError

N_PATCHES = 16
SHARDS_FILE = "shards.json"


class ShardEntry(TypedDict):
    """A line of `shards.json`."""

    file: str
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
    """int32 [n]"""
    has_image: np.ndarray
    """bool [n]"""
    roi: np.ndarray
    """int32 [n, 4]: x0, y0, x1, y1 in the photo [px]"""
    patches: np.ndarray | None
    """float16 [n, 16, D1]"""
    pixels: np.ndarray | list[bytes] | None
    """uint8 [n, S, S, 3], or n JPEGs"""


def write_shard(directory: Path, name: str, shard: Shard) -> ShardEntry:
    """Write `directory/name`: aside, then renamed, so that it is whole or not there."""
    columns: dict[str, pa.Array] = {
        "product": pa.array(shard.product, pa.int32()),
        "has_image": pa.array(shard.has_image, pa.bool_()),
        "roi": _rows(shard.roi.astype(np.int32, copy=False)),
    }
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
    return {"file": name, "rows": batch.num_rows, "bytes": size}


def write_shard_list(
    directory: Path, shards: list[ShardEntry], patch_dim: int, pixel_side: int
) -> None:
    """Write `shards.json`; 0 says that no patches, or no pixels, are stored."""
    ordered = sorted(shards, key=lambda shard: shard["file"])
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
        """Map every shard of a `features` stage.

        Raises:
            UserError: a shard is missing or truncated, or products are; it names the file.
        """
        self.directory = Path(directory)
        listed = self.directory / SHARDS_FILE
        if not listed.is_file():
            raise UserError(f"{self.directory}: no image features (no {SHARDS_FILE} in it)")
        contents: ShardList = json.loads(listed.read_text())
        entries = contents["shards"]
        self.patch_dim, self.pixel_side = contents["patch_dim"], contents["pixel_side"]
        self.n_products = sum(entry["rows"] for entry in entries)
        self._shard = np.full(self.n_products, -1, np.int32)
        self._row = np.zeros(self.n_products, np.int32)
        self._has_image = np.zeros(self.n_products, bool)
        self._columns: dict[str, list[Any]] = {"roi": [], "patches": [], "pixels": []}
        for number, entry in enumerate(entries):
            self._open(number, entry)
        if (self._shard < 0).any():
            lost = int(np.flatnonzero(self._shard < 0)[0])
            raise UserError(f"{listed}: no shard has product {lost}; build the stage again")

    def _open(self, number: int, entry: ShardEntry) -> None:
        path = self.directory / entry["file"]
        if not path.is_file():
            raise UserError(f"{path}: missing; build the stage again")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise UserError(f"{path}: {size:,} bytes, {entry['bytes']:,} written; damaged")
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            product = batch["product"].to_numpy()
            self._has_image[product] = batch["has_image"].to_numpy(zero_copy_only=False)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise UserError(f"{path}: not a whole shard of image features ({error})") from error
        self._shard[product] = number
        self._row[product] = np.arange(len(product))
        for name, shards in self._columns.items():
            if name in batch.schema.names:
                shards.append(_view(batch[name]))

    def has_image(self, rows: np.ndarray) -> np.ndarray:
        """bool [B]"""
        return self._has_image[rows]

    def rois(self, rows: np.ndarray) -> np.ndarray:
        """int32 [B, 4]: x0, y0, x1, y1 of the region of interest in the photo [px]."""
        return self._gather("roi", rows, np.empty((len(rows), 4), np.int32))

    def patches(self, rows: np.ndarray) -> np.ndarray:
        """float16 [B, 16, D1]; zeros where there is no image."""
        out = np.empty((len(rows), N_PATCHES * self.patch_dim), np.float16)
        return self._gather("patches", rows, out).reshape(len(rows), N_PATCHES, self.patch_dim)

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """RGB uint8 [B, S, S, 3]; zeros where there is no image. JPEGs are decoded here."""
        S = self.pixel_side
        shards = self._columns["pixels"]
        if shards and not isinstance(shards[0], np.ndarray):
            return self._decoded(np.asarray(rows), shards)
        return self._gather("pixels", rows, np.empty((len(rows), S * S * 3), np.uint8)).reshape(
            len(rows), S, S, 3
        )

    def _gather(self, name: str, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Rows of a column into `out` [B, width]: one NumPy gather for each shard it meets."""
        shards = self._columns[name]
        if not shards:
            raise UserError(
                f"{self.directory}: no {name} stored; preprocess with the settings of this model"
            )
        shard_of, row_of = self._shard[rows], self._row[rows]
        # In the order of the file, so that what lies together is read together.
        order = np.lexsort((row_of, shard_of))
        cuts = np.flatnonzero(np.diff(shard_of[order])) + 1
        for slots in np.split(order, cuts) if len(order) else ():
            out[slots] = shards[shard_of[slots[0]]][row_of[slots]]
        return out

    def _decoded(self, rows: np.ndarray, shards: list[pa.LargeBinaryArray]) -> np.ndarray:
        S = self.pixel_side
        out = np.zeros((len(rows), S, S, 3), np.uint8)
        for slot in np.flatnonzero(self._has_image[rows]):
            row = rows[slot]
            jpeg = shards[self._shard[row]][int(self._row[row])].as_py()
            out[slot] = decode(jpeg, max_megapixels=S * S / 1e6)
        return out


def _view(column: pa.Array) -> np.ndarray | pa.Array:
    """[n, width] view of a column of fixed width; JPEGs stay an Arrow array."""
    if not isinstance(column, pa.FixedSizeListArray):
        return column
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)
