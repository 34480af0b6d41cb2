"""What glibc's malloc does with freed memory, read from the process's own resident size."""

import platform
import subprocess
import sys

import pytest

PROBE = """
import psutil, torch
from acebert.training.allocator import keep_freed_memory
if {keep}:
    keep_freed_memory()
block = torch.ones(50, 2**20)  # 200 MiB
before = psutil.Process().memory_info().rss
del block
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_goes_back_to_the_system_unless_it_is_kept() -> None:
    given_back = [
        int(subprocess.check_output([sys.executable, "-c", PROBE.format(keep=keep)], text=True))
        for keep in (False, True)
    ]
    assert given_back[0] > 150 * 2**20
    assert given_back[1] < 50 * 2**20
