"""Memory in bytes: how much is free on this machine, the most that this process has used, and a limit on its growth."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

# What reading one file may take. A clip of 16 frames of 8K that is not resized takes 2.4 GB.
READING_BYTES = 4 * 2**30
# The file of each key that is read. VmHWM is the peak resident size of this process ("high water mark"), VmRSS its
# current one, VmSize its address space. MemAvailable is the kernel's estimate of what can be allocated without
# swapping.
_KERNEL_FILES = {
    "VmHWM": "/proc/self/status",
    "VmRSS": "/proc/self/status",
    "VmSize": "/proc/self/status",
    "MemAvailable": "/proc/meminfo",
}
# Control groups version 2. In a container this folder describes the container's own group.
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int | None:
    """Memory that this process may still allocate: what the machine has or its control group allows, if that is less.

    None if neither is known, as on systems other than Linux.
    """
    found = []
    if (available := kernel_bytes("MemAvailable")) is not None:
        found.append(available)
    # In a container the free memory of the machine means little, because a process that exceeds the limit of its
    # control group is killed. If there is no limit, memory.max contains "max", int() raises ValueError, and only the
    # machine's value is used.
    with contextlib.suppress(OSError, ValueError, StopIteration):
        limit, used = ((_CONTROL_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = (_CONTROL_GROUP / "memory.stat").read_text().splitlines()
        # memory.current includes the page cache. The kernel reclaims the inactive part of it on demand, so that part
        # counts as free.
        reclaimable = next(line for line in statistics if "inactive_file" in line)
        found.append(int(limit) - int(used) + int(reclaimable.split()[1]))
    return min(found) if found else None


def peak_memory_bytes() -> int:
    """The largest resident size that this process has had so far."""
    # VmHWM first, and getrusage only where there is no /proc: a forked child inherits ru_maxrss, so the child of a
    # large process would report the peak of its parent.
    found = kernel_bytes("VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def growth_limit(size_bytes: int) -> Iterator[None]:
    """Inside the context, the address space of this process may grow by `size_bytes`; beyond, there is a MemoryError.

    The limit is on growth, because a process that has used a GPU has reserved far more address space than the machine
    has memory. It holds for all threads. Without /proc nothing is limited.
    """
    size = kernel_bytes("VmSize")
    if size is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = (size + size_bytes, soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (min(n for n in limits if n != resource.RLIM_INFINITY), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def kernel_bytes(key: str) -> int | None:
    """The value of the line `key: N kB` in a file of /proc, in bytes; None if there is no such line or no /proc."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path(_KERNEL_FILES[key]).read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])
    return None
