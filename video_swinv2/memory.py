"""Memory in bytes, as the kernel reports it: how much is free on this machine and how much this process has used."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

_KERNEL_FILES = {"VmHWM": "/proc/self/status", "VmRSS": "/proc/self/status", "MemAvailable": "/proc/meminfo"}
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int | None:
    """Memory that processes may still allocate: the machine's or what our control group allows, whichever is less.

    None if neither is known.
    """
    found = []
    if (available := kernel_bytes("MemAvailable")) is not None:
        found.append(available)
    # In a container the machine's free memory says little: the control group's limit is what kills a process. Without
    # a limit memory.max reads "max", int() raises ValueError, and the machine's number stands alone.
    with contextlib.suppress(OSError, ValueError, StopIteration):
        limit, used = ((_CONTROL_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = (_CONTROL_GROUP / "memory.stat").read_text().splitlines()
        # memory.current counts the page cache too. The inactive part of it is reclaimed on demand, so it is free.
        reclaimable = next(line for line in statistics if "inactive_file" in line)
        found.append(int(limit) - int(used) + int(reclaimable.split()[1]))
    return min(found) if found else None


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    # VmHWM first: a forked child inherits its parent's ru_maxrss, so after a large parent getrusage reports the
    # parent's peak. It is the fallback where there is no /proc.
    found = kernel_bytes("VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def kernel_bytes(key: str) -> int | None:
    """The value of a line `key: N kB` of /proc, in bytes; None where there is no such line, as outside Linux."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path(_KERNEL_FILES[key]).read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])
    return None
