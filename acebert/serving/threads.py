"""Work in threads, for those who hold a lock meanwhile."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def to_its_end(work: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, but who is cancelled waits for the thread, which cannot be stopped:
    a lock around this is held for as long as the work goes on."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        running.exception()  # nobody asks for it any more
        raise cancelled
    return running.result()
