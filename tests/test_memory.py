"""Memory as the kernel tells it."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import REPOSITORY
from video_swinv2.memory import free_memory_bytes, peak_memory_bytes


def test_free_memory_is_a_likely_number() -> None:
    free = free_memory_bytes()
    assert free is None or 2**24 < free < 2**50


def test_memory_is_that_of_the_process_itself() -> None:
    """getrusage would count what its parent held when it was started."""
    held = bytearray(400 * 2**20)
    code = "from video_swinv2.memory import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 2**23 < int(done.stdout) < len(held)
    assert peak_memory_bytes() > len(held)
