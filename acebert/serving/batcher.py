"""Requests that come while a batch is worked on share the next batch.

Nothing waits for others to come: an idle encoder takes one query at once, a busy one as many as
have come meanwhile. Ray Serve's own `@serve.batch` needs a replica around it; this runs wherever
the service does, so that the benchmark's plain twin differs from it by Ray alone.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any


class Batcher:
    """Calls `work(items)` for lists of items, in a thread, one list at a time.

    Args:
        work: items [n] → results [n]; an exception is every one's.
        executor: of its thread.
        batch_size: most items of a list.
        wait: how long a list waits for more items [s].
    """

    def __init__(
        self,
        work: Callable[[Sequence[Any]], Iterable[Any]],
        executor: Executor,
        batch_size: int,
        wait: float = 0.0,
    ) -> None:
        self._work, self._executor = work, executor
        self._batch_size, self._wait = batch_size, wait
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._running: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Items that no call of `work` has taken yet."""
        return len(self._waiting)

    async def __call__(self, item: Any) -> Any:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await done

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            if self._wait and len(self._waiting) < self._batch_size:
                await asyncio.sleep(self._wait)
            batch = [some for some in self._waiting[: self._batch_size] if not some[1].done()]
            del self._waiting[: self._batch_size]
            try:
                results = await loop.run_in_executor(
                    self._executor, self._work, [item for item, _ in batch]
                )
            except Exception as error:
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
                continue
            for (_, done), result in zip(batch, results, strict=True):
                if not done.done():
                    done.set_result(result)
