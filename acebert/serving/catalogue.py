"""The writer: takes changes of products, encodes them, logs them, hands them on to replicas.

There is one of it for all replicas. A change is encoded before it is acknowledged, by the model
that is published, so that a photo that cannot be read is refused at once. A replica asks for
changes by the bundle that it serves; products that have no vector of that bundle's model yet, as
after a swap, are encoded then.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from acebert.serving.bundle import small_photo
from acebert.serving.changes import ChangeLog, Source
from acebert.serving.products import Change

LIMIT = 500  # changes in one answer

Encode = Callable[[Path, Sequence[str], Sequence[bytes | None]], Awaitable[NDArray[np.float32]]]
"""bundle, titles [n], photos [n] → vectors [n, d]"""


class Unavailable(Exception):  # noqa: N818 - what it is, not what went wrong in the code
    """A part of the service is not there right now; the same request may do later."""


class Products(Protocol):
    """What a search service asks of the writer and of the product encoder."""

    async def put(self, sources: Sequence[Source]) -> int: ...

    async def delete(self, product_id: str) -> int: ...

    async def changes(self, since: int, bundle: Path, version: str) -> list[Change]: ...

    async def before(self, moment: datetime) -> int: ...

    async def photo(self, product_id: str) -> bytes | None: ...

    async def encode(
        self, bundle: Path, titles: Sequence[str], photos: Sequence[bytes | None]
    ) -> NDArray[np.float32]: ...


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
        self._encoding = asyncio.Lock()

    async def put(self, sources: Sequence[Source]) -> int:
        """Add or replace products; durable when it returns. `seq` of the last.

        Raises:
            BrokenImage: a photo is none, or too large; none of the products is taken then.
        """
        bundle, version = self._bundle()
        vectors = await self._vectors(bundle, sources)
        kept = [Source(s.product, self._small(s.photo)) for s in sources]
        return await asyncio.to_thread(self._log.put, kept, vectors, version)

    def _small(self, photo: bytes | None) -> bytes | None:
        return None if photo is None else small_photo(photo, self._max_megapixels)

    async def delete(self, product_id: str) -> int:
        """Durable when it returns; `seq`."""
        return await asyncio.to_thread(self._log.delete, product_id)

    async def changes(self, since: int, bundle: Path, version: str) -> list[Change]:
        """What comes after `since`, with vectors of `version`, the model of `bundle`."""
        async with self._encoding:  # replicas that ask at once wait for the first one's vectors
            lacking = await asyncio.to_thread(self._log.lacking, since, version, LIMIT)
            if lacking:
                vectors = await self._vectors(bundle, [source for _, source in lacking])
                seqs = [seq for seq, _ in lacking]
                await asyncio.to_thread(self._log.add_vectors, seqs, vectors, version)
        return await asyncio.to_thread(self._log.since, since, version, LIMIT)

    async def before(self, moment: datetime) -> int:
        """`seq` of the last change made before `moment`; 0: there is none."""
        return await asyncio.to_thread(self._log.before, moment)

    async def photo(self, product_id: str) -> bytes | None:
        return await asyncio.to_thread(self._log.photo, product_id)

    async def _vectors(self, bundle: Path, sources: Sequence[Source]) -> NDArray[np.float32]:
        titles = [source.product.title for source in sources]
        return await self.encode(bundle, titles, [source.photo for source in sources])
