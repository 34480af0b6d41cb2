"""Photos of the catalogue as bytes: from the row itself, or from the file that it names.

A file is read only from the catalogue's own storage, for a row is data from elsewhere: the
directory of the products file (symbolic links followed), or its bucket.
"""

import logging
import os
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acebert.data.image import BrokenImage

log = logging.getLogger(__name__)

THREADS = 16  # files are read at once: object stores take long to answer, but answer many
STAMPS = 1_000  # files that a thread asks for before it takes others


@dataclass(frozen=True)
class Rows:
    """A run of catalogue rows, small enough to be worked on at once."""

    path: str
    """a Parquet file of ingest"""
    row_group: int
    start: int
    """first row, in the row group"""
    count: int


@dataclass
class Photo:
    """A catalogue row's photo, undecoded."""

    product: int
    product_id: str
    data: bytes | None
    """None: there is none, or it cannot be read"""
    problem: str = ""
    """why it cannot be read: 'outside the catalogue', 'not found', 'too large', 'unreadable'"""


@dataclass(frozen=True)
class PhotoStorage:
    """Where photos may be read from.

    Attributes:
        catalogue: path or URI of the products file or directory; None: photos are in the rows.
        max_bytes: larger files are not read.
    """

    catalogue: str | None
    max_bytes: int

    def read(self, rows: Rows) -> Iterator[Photo]:
        """The photos of these rows, in order."""
        with pq.ParquetFile(rows.path) as file:
            table = file.read_row_group(
                rows.row_group, columns=["product", "product_id", "image", "image_uri"]
            ).slice(rows.start, rows.count)
        uris = table["image_uri"].to_pylist()
        named = [i for i, uri in enumerate(uris) if uri and not table["image"][i].is_valid]
        fetched: dict[int, tuple[bytes | None, str]] = {}
        if named:
            with ThreadPoolExecutor(THREADS) as pool:
                answers = pool.map(self._try, [uris[i] for i in named])
                fetched = dict(zip(named, answers, strict=True))
        products, ids = table["product"].to_pylist(), table["product_id"].to_pylist()
        for i, (product, product_id) in enumerate(zip(products, ids, strict=True)):
            data, problem = fetched.get(i) or (table["image"][i].as_py(), "")
            yield Photo(product, product_id, data, problem)

    def fingerprint(self, products: Path) -> str | None:
        """A digest of the sizes and times of the files that the rows of ingest's `products` name:
        another one where a photo was replaced. No byte of them is read.

        None where rows name none, or files that a network would have to be asked for one by one.
        """
        if self.catalogue is None:
            return None
        digest = None
        with ThreadPoolExecutor(THREADS) as pool:
            for part in sorted(products.glob("part-*.parquet")):
                uris = pq.read_table(part, columns=["image_uri"])["image_uri"].drop_null()
                if not len(uris):
                    continue
                filesystem, directory = _storage(self.catalogue)
                if not isinstance(filesystem, pafs.LocalFileSystem):
                    log.info(
                        "photos: one that is replaced under its image_uri in %s is not noticed: "
                        "give it another address, or write the products file again",
                        directory,
                    )
                    return None
                digest = digest or blake2b(digest_size=16)
                starts = range(0, len(uris), STAMPS)
                some = (uris.slice(start, STAMPS).to_pylist() for start in starts)
                for stamps in pool.map(partial(_stamps, directory), some):
                    digest.update(stamps.tobytes())
        return digest and digest.hexdigest()

    def _try(self, uri: str) -> tuple[bytes | None, str]:
        try:
            return self.fetch(uri), ""
        except BrokenImage as error:
            return None, error.reason

    def fetch(self, uri: str) -> bytes:
        """Bytes of the file at `uri`, which may be relative to the catalogue's directory.

        Raises:
            BrokenImage: outside the catalogue, not there, too large, or not to be read.
        """
        filesystem, path = self._locate(uri)
        try:
            info = filesystem.get_file_info(path)
            if info.type != pafs.FileType.File:  # a directory, a pipe, a device
                raise BrokenImage("not found", uri)
            if info.size > self.max_bytes:
                raise BrokenImage("too large", f"{info.size:,} bytes")
            with filesystem.open_input_file(path) as file:
                return file.read(self.max_bytes)
        except (OSError, pa.ArrowException) as error:
            raise BrokenImage("unreadable", f"{uri}: {error}") from error

    def _locate(self, uri: str) -> tuple[pafs.FileSystem, str]:
        outside = BrokenImage("outside the catalogue", uri)
        if self.catalogue is None:
            raise outside
        filesystem, directory = _storage(self.catalogue)
        local = isinstance(filesystem, pafs.LocalFileSystem)
        try:
            theirs, ours = urlsplit(uri) if "://" in uri else None, urlsplit(self.catalogue)
        except ValueError as error:
            raise BrokenImage("unreadable", f"{uri}: {error}") from error
        if theirs is None:
            path = posixpath.join(directory, uri)
        elif local and theirs.scheme == "file" and theirs.netloc in ("", "localhost"):
            path = unquote(theirs.path)
        elif not local and (theirs.scheme, theirs.netloc) == (ours.scheme, ours.netloc):
            bucket = ours.netloc if directory.startswith(ours.netloc) else ""  # HDFS has none
            path = bucket + unquote(theirs.path)
        else:  # never opened, for asking a foreign server tells it something
            raise outside
        if "\0" in path:
            raise outside
        if local:
            path = os.path.realpath(path)
            inside = Path(path).is_relative_to(os.path.realpath(directory))
        else:
            path = posixpath.normpath(path)
            inside = (
                PurePosixPath(path).is_relative_to(posixpath.normpath(directory))
                if directory.startswith("/")  # HDFS: the whole cluster is one tree
                else path.split("/")[0] == directory.split("/")[0]  # one bucket
            )
        if not inside:
            raise outside
        return filesystem, path


def _stamps(directory: str, uris: list[str]) -> NDArray[np.int64]:
    """Size and time of modification [ns] of local files → int64 [n, 2]; -1 of those not there."""
    found = np.full((len(uris), 2), -1)
    for row, uri in enumerate(uris):
        with suppress(OSError, ValueError):  # no file, or no address
            path = unquote(urlsplit(uri).path) if "://" in uri else posixpath.join(directory, uri)
            status = os.stat(path)
            found[row] = status.st_size, status.st_mtime_ns
    return found


@cache
def _storage(catalogue: str) -> tuple[pafs.FileSystem, str]:
    """The catalogue's filesystem, and the directory that relative addresses start from."""
    if "://" in catalogue:
        filesystem, path = pafs.FileSystem.from_uri(catalogue)
    else:
        filesystem, path = pafs.LocalFileSystem(), str(Path(catalogue).expanduser().absolute())
    is_directory = filesystem.get_file_info(path).type == pafs.FileType.Directory
    return filesystem, path if is_directory else posixpath.dirname(path)
