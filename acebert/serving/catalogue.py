"""The writer: takes changes of products, encodes them, logs them, hands them on to replicas.

There is one of it for all replicas. A change is encoded before it is acknowledged, by the model
that is published, so that a photo that cannot be read is refused at once. A replica asks for
changes by the bundle that it serves; products that have no vector of that bundle's model yet, as
after a swap, are encoded then. Changes of price or stock alone need no encoding.
"""

import asyncio
import logging
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from acebert.errors import UserError
from acebert.serving.bundle import ProductTable, small_photo
from acebert.serving.changes import ChangeLog, Logged, Source
from acebert.serving.products import Change, Patch
from acebert.serving.threads import to_its_end

log = logging.getLogger(__name__)

LIMIT = 500  # changes in one answer
TOGETHER = 32  # products encoded at a time, so that others get their turn

Encode = Callable[[Path, Sequence[Source]], Awaitable[NDArray[np.float32]]]
"""bundle, products [n] → vectors [n, d]"""
T = TypeVar("T")


class Unavailable(Exception):  # noqa: N818 - what it is, not what went wrong in the code
    """A part of the service is not there right now; the same request may do later."""


class Products(Protocol):
    """What a search service asks of the writer and of the product encoder."""

    async def put(self, sources: Sequence[Source]) -> int: ...

    async def patch(self, product_id: str, patch: Patch) -> int | None: ...

    async def delete(self, product_id: str) -> int: ...

    async def changes(self, since: int, bundle: Path, version: str) -> list[Change]: ...

    async def begin(self, catalogue: datetime | None) -> tuple[int, list[str]]: ...

    async def photo(self, product_id: str) -> bytes | None: ...

    async def encode(self, bundle: Path, sources: Sequence[Source]) -> NDArray[np.float32]: ...


class Catalogue:
    """`Products` in this process, over one change log.

    Args:
        log: of this service.
        encode: the product side of a bundle.
        bundle: the one that is published, and its version; asked at every change.
        max_megapixels: of a photo.
    """

    def __init__(
        self,
        log: ChangeLog,
        encode: Encode,
        bundle: Callable[[], tuple[Path, str]],
        max_megapixels: float,
    ) -> None:
        self._log = log
        self.encode = encode
        self._bundle = bundle
        self._max_megapixels = max_megapixels
        self._encoding: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by model
        self._busy: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._writing = asyncio.Lock()
        self._table = lru_cache(2)(ProductTable)

    async def put(self, sources: Sequence[Source]) -> int:
        """Add or replace products; durable when it returns. `seq` of the last. A product that comes
        without a photo keeps the one that it has.

        Raises:
            BrokenImage: a photo is none, or too large; none of the products is taken then.
            Unavailable: no bundle is published that can be read, or the log cannot be written.
        """
        async with self._alone(source.product.product_id for source in sources):
            bundle, version, table = await asyncio.to_thread(self._published)
            whole = await asyncio.to_thread(lambda: [self._with_photo(table, s) for s in sources])
            vectors = await self.encode(bundle, whole)

            def shrink() -> list[Source]:
                small = (s.photo and small_photo(s.photo, self._max_megapixels) for s in whole)
                return [Source(s.product, photo) for s, photo in zip(whole, small, strict=True)]

            kept = await asyncio.to_thread(shrink)
            return await self._written(lambda: self._log.put(kept, vectors, version))

    def _published(self) -> tuple[Path, str, ProductTable]:
        """The bundle that is published, its version and its products.

        Raises:
            Unavailable: there is none that can be read, which no client can mend.
        """
        try:
            bundle, version = self._bundle()
            return bundle, version, self._table(bundle)
        except UserError as error:
            log.warning("changes are refused: %s", error)
            raise Unavailable("no bundle is published that can be read: try again") from error

    async def _written(self, write: Callable[[], T]) -> T:
        """What `write` returns, which writes to the log after those that came before it: a change
        whose request was cancelled undoes no later one.

        Raises:
            Unavailable: the log cannot be written, as on a full disk.
        """
        async with self._writing:
            try:
                return await to_its_end(write)
            except sqlite3.OperationalError as error:
                log.warning("changes are refused: %s", error)
                raise Unavailable(f"the change log cannot be written: {error}") from error

    @asynccontextmanager
    async def _alone(self, product_ids: Iterable[str]) -> AsyncIterator[None]:
        """Until the end nobody else puts or deletes these: who comes without a photo reads the one
        that there is, and writes it again."""
        async with AsyncExitStack() as stack:
            for name in sorted(set(product_ids)):
                lock = self._busy.setdefault(name, asyncio.Lock())
                await stack.enter_async_context(lock)
            yield

    def _with_photo(self, table: ProductTable, source: Source) -> Source:
        if source.photo is not None:
            return source
        product_id = source.product.product_id
        logged = self._logged(table, product_id)
        photo = table.photo_of(product_id) if logged is None else logged.photo
        return Source(source.product, photo)

    def _logged(self, table: ProductTable, product_id: str) -> Logged | None:
        """The change of a product, unless the bundle supersedes it."""
        logged, written = self._log.logged(product_id), table.made.get("catalogue")
        superseded = logged is not None and written is not None and logged.at < written
        return None if superseded else logged

    async def patch(self, product_id: str, patch: Patch) -> int | None:
        """Change price or stock of a product, which keeps its vector; durable when it returns.
        `seq`; None: there is no such product.

        Raises:
            Unavailable: as `put`.
        """
        _, _, table = await asyncio.to_thread(self._published)

        def write() -> int | None:
            logged = self._logged(table, product_id)
            if logged.deleted if logged else table.row_of(product_id) is None:
                return None
            return self._log.patch(product_id, patch)

        return await self._written(write)

    async def delete(self, product_id: str) -> int:
        """Durable when it returns; `seq`. A product that nobody knows is deleted all the same: a
        catalogue that a bundle is being made of may have it.

        Raises:
            Unavailable: the log cannot be written.
        """
        async with self._alone([product_id]):
            return await self._written(lambda: self._log.delete(product_id))

    async def changes(self, since: int, bundle: Path, version: str) -> list[Change]:
        """What comes after `since`, with vectors of `version`, the model of `bundle`."""
        if await asyncio.to_thread(self._log.lacking, since, version, LIMIT):
            async with self._encoding[version]:  # who asks meanwhile waits for the first's vectors
                lacking = await asyncio.to_thread(self._log.lacking, since, version, LIMIT)
                for start in range(0, len(lacking), TOGETHER):
                    seqs, sources = zip(*lacking[start : start + TOGETHER], strict=True)
                    vectors = await self.encode(bundle, sources)
                    await asyncio.to_thread(self._log.add_vectors, seqs, vectors, version)
        return await asyncio.to_thread(self._log.since, since, version, LIMIT)

    async def begin(self, catalogue: datetime | None) -> tuple[int, list[str]]:
        """Where who serves a bundle begins, by when its catalogue was written (None: not known):
        `seq` of the last change that it supersedes, and what was out of stock then."""
        if catalogue is None:
            return 0, []
        seq = await asyncio.to_thread(self._log.before, catalogue)
        return seq, await asyncio.to_thread(self._log.out_of_stock, seq)

    async def photo(self, product_id: str) -> bytes | None:
        return await asyncio.to_thread(self._log.photo, product_id)
