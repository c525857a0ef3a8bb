"""What the kernel tells of memory, in bytes: free on this machine, and held by this process."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

KERNEL_LINES = {"VmHWM": "/proc/self/status", "VmRSS": "/proc/self/status", "MemAvailable": "/proc/meminfo"}


def memory_free() -> int | None:
    """What processes may still take, by the kernel and by the limit of our control group; None if unknown."""
    found = []
    if (available := kernel_says("MemAvailable")) is not None:
        found.append(available)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        files = next(line for line in (group / "memory.stat").read_text().splitlines() if "inactive_file" in line)
        # `max`, no limit, is no number. What was read from files and lies idle is given back when wanted.
        found.append(int(limit) - int(used) + int(files.split()[1]))
    return min(found) if found else None


def memory_peak() -> int:
    """The most this process has held so far."""
    found = kernel_says("VmHWM")
    if found is not None:
        return found
    # Only where the kernel says nothing better: a process started by a large one counts that one's memory as its own.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def kernel_says(key: str) -> int | None:
    """A line `key: N kB` of the kernel's; None where there is none, as outside Linux."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path(KERNEL_LINES[key]).read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])
    return None
