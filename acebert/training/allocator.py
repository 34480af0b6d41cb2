"""The C library's allocator, as a CPU that trains wants it."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """From now on glibc keeps what this process frees for what it allocates next.

    By default a large tensor's memory goes back to the system when it is freed, and the next step's
    tensors are given pages that the system has to clear first (docs/decisions.md, 'Speed'). Does
    nothing where the C library has no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
