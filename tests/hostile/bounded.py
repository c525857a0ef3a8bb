"""Runs a command in a child process of limited time and memory, and measures what it took.

CPU time is bounded and measured, not wall time, so that the verdict does not depend on what else the machine does.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30
# A process that waits for ever instead of computing uses no CPU time. This limit is for giving up only.
SECONDS = 600


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    `cpu_seconds` is that of the command and of the processes it has waited for; `peak_bytes` is the largest resident
    memory of any one of them.
    """

    code: int
    out: str
    err: str
    cpu_seconds: float
    peak_bytes: int


def run_bounded(*command: str | Path, cpu_seconds: int = 120, memory_gib: float = 64, cwd: Path | None = None) -> Ended:
    """Run `python *command`; a process of it that uses more CPU time or address space fails or is killed."""
    read, write = os.pipe()
    try:
        # The measuring process is small: a process inherits the peak memory of the one that started it.
        ended = subprocess.run(
            [sys.executable, __file__, str(write), str(cpu_seconds), str(memory_gib), *map(str, command)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            pass_fds=(write,),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    finally:
        os.close(write)
        with os.fdopen(read) as pipe:
            measured = pipe.read()
    return Ended(ended.returncode, ended.stdout, ended.stderr, **json.loads(measured))


def reading(imports: str) -> str:
    """A program that gives each of its arguments to the function `read`, which it imports, and prints the error."""
    return f"""
import sys
from pathlib import Path
from video_swinv2.errors import UserError
{imports}
for path in map(Path, sys.argv[1:]):
    try:
        read(path)
        print(f"{{path}}: was read")
    except UserError as error:
        print(error)
"""


def _measure(write: int, cpu_seconds: int, memory_gib: float, command: list[str]) -> int:
    """Run `python *command` and write what it took to the pipe `write`."""
    limits = {resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_AS: int(memory_gib * GIB), resource.RLIMIT_CORE: 0}

    def limit() -> None:
        for kind, value in limits.items():
            resource.setrlimit(kind, (value, value))

    code = subprocess.call([sys.executable, *command], preexec_fn=limit)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    measured = {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}
    os.write(write, json.dumps(measured).encode())
    return code


if __name__ == "__main__":
    sys.exit(_measure(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
