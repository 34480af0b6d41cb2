"""Make the next batch while the last one trains."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[int], T], start: int, stop: int) -> Iterator[T]:
    """make(start) … make(stop − 1), each made in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as maker:
        ahead = maker.submit(make, start) if start < stop else None
        for step in range(start, stop):
            assert ahead is not None
            ready = ahead.result()
            ahead = maker.submit(make, step + 1) if step + 1 < stop else None
            yield ready
