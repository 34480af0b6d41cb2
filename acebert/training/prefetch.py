"""Make the next batch while the last one trains."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar


class Awaited(Protocol):
    """A batch that notes how long training waited for it [s]."""

    waited: float


T = TypeVar("T", bound=Awaited)


def prefetched(make: Callable[[int], T], start: int, stop: int) -> Iterator[T]:
    """make(start) … make(stop − 1), each made in a thread while the one before is used."""
    asked = time.perf_counter()
    with ThreadPoolExecutor(1) as maker:
        ahead = maker.submit(make, start) if start < stop else None
        for step in range(start, stop):
            assert ahead is not None
            ready = ahead.result()
            ahead = maker.submit(make, step + 1) if step + 1 < stop else None
            ready.waited = time.perf_counter() - asked
            yield ready
            asked = time.perf_counter()
