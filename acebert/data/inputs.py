"""Inputs as a job first saw them.

A report, a sweep or a comparison asks for its catalogue's stages again for every training, for
hours. A file that its owner adds meanwhile must not make other data of the rows that follow.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_seen: dict[str, Any] | None = None


@contextmanager
def as_first_seen(before: Mapping[str, Any] | None = None) -> Iterator[None]:
    """In the block, `first_seen` looks at each input once. `before`: what a process has `seen`
    that this one does a part of the work for."""
    global _seen
    outside, _seen = _seen, dict(before or {})
    try:
        yield
    finally:
        _seen = outside


def first_seen(what: str, look: Callable[[], T]) -> T:
    """What `look()` returned when it was first asked for `what`; outside of such a block, now."""
    if _seen is None:
        return look()
    if what not in _seen:
        _seen[what] = look()
    found: T = _seen[what]
    return found


def seen() -> dict[str, Any]:
    """What was seen so far, for a process that does a part of the work."""
    return dict(_seen or {})
