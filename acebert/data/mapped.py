"""New arrays in mapped files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike


def new_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A .npy file of zeros, mapped to be written.

    The disk sets aside all of it here: a page that found no room when it is first written to would
    kill the process (SIGBUS).

    Raises:
        OSError: the disk is full.
    """
    array = open_memmap(path, "w+", dtype, shape)
    with path.open("rb+") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
