"""Runs the GPU tests and then the benchmarks, the most telling first, in at most eight minutes. `make gpu` calls it.

    python -m tests.gpu [--out gpu.json] [--device cuda|cpu] [--minutes 8]

Each item runs in processes of its own with a limit, so that a crash or a hang costs only that item. An item that would
not fit into the time that is left is recorded as left out. The JSON file is replaced after every row that an item has
written, so whatever ends this program, the file holds everything measured until then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OUTPUT_TAIL = 6000  # characters of an item's output that are kept if it fails
CPU_PATIENCE = 8  # how many times longer an item may take on a CPU, although everything is small there


@dataclass(frozen=True)
class Item:
    """Something to run. `estimate` is what it should take, in seconds; at `limit` it is killed."""

    name: str
    what: str
    command: tuple[str, ...]
    estimate: float
    limit: float


def pytest_command(*arguments: str) -> tuple[str, ...]:
    """Run tests of this folder."""
    return ("-m", "pytest", "-q", "-m", "gpu", "--color=no", "-p", "no:cacheprovider", *arguments)


def benchmark(name: str, what: str, estimate: float, limit: float) -> Item:
    """One of `benchmarks.BENCHMARKS`; device and file are added when it runs."""
    return Item(name, what, ("-m", "tests.gpu.benchmarks", name), estimate, limit)


# In the order of what one would want to know if only the first could be known. Estimates are for one H100 or H200.
ITEMS = (
    benchmark("products", "the rate of large matrix products", 12, 40),
    Item(
        "tests",
        "all tests of this folder but the giant",
        pytest_command(
            "--numprocesses", "8", "--dist", "loadgroup", "tests/gpu", "--ignore", "tests/gpu/test_giant.py"
        ),
        230,
        300,
    ),
    benchmark("training-ours", "training steps of base by batch", 30, 60),
    benchmark("training-torchvision", "training steps of torchvision's swin3d_b by batch", 30, 60),
    benchmark("inference-ours", "forward passes of base by batch", 20, 40),
    benchmark("inference-torchvision", "forward passes of torchvision's swin3d_b by batch", 20, 40),
    Item("giant", "a training step of the giant", pytest_command("tests/gpu/test_giant.py"), 40, 80),
    benchmark("backends", "attention backends in one layer", 60, 100),
    benchmark("dense", "training steps of detectors and a segmenter by batch", 60, 100),
    benchmark("training-compiled", "training steps of base, blocks compiled", 75, 120),
    benchmark("engines", "training steps of base at each ZeRO stage", 60, 120),
    benchmark("inference-compiled", "forward passes of base, blocks compiled", 60, 100),
    benchmark("races", "bench model: tiny beside swin3d_t in fp32 and bf16", 60, 100),
)


class Record:
    """The JSON file. Every change is on disk at once, and the file is never half written."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        self.write()

    def write(self) -> None:
        """Replace the file."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


def machine_facts() -> dict[str, Any]:
    """What the figures were measured with. Asked in a fresh process, because this one must not hold a GPU."""
    script = (
        "import json, torch\n"
        "cuda = torch.cuda.is_available()\n"
        "names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []\n"
        "memory = torch.cuda.get_device_properties(0).total_memory if cuda else None\n"
        "nccl = '.'.join(map(str, torch.cuda.nccl.version())) if cuda else None\n"
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, 'gpus': names,\n"
        "                  'gpu_memory_bytes': memory, 'nccl': nccl}))\n"
    )
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "driver": _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _line("git", "rev-parse", "HEAD"),
        "changed_files": len((_output("git", "status", "--porcelain") or "").splitlines()),
    }
    return facts | json.loads(_line(sys.executable, "-c", script) or "{}")


def _output(*command: str) -> str | None:
    """What a command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _line(*command: str) -> str | None:
    lines = (_output(*command) or "").splitlines()
    return lines[0].strip() if lines else None


def run_all(items: Sequence[Item], device: str, seconds: float, out: Path) -> int:
    """Run the items in order within `seconds`; returns how many did not get through."""
    started, patience = time.monotonic(), CPU_PATIENCE if device == "cpu" else 1
    record = Record(out, {"device": device, "seconds_allowed": seconds, "facts": machine_facts(), "items": []})
    print(json.dumps(record.content["facts"]), flush=True)
    for item in items:
        left = seconds - (time.monotonic() - started)
        entry: dict[str, Any] = {"name": item.name, "what": item.what, "estimate": item.estimate, "limit": item.limit}
        record.content["items"].append(entry)
        if left < item.estimate:
            entry |= {"status": "left out", "why": f"{left:.0f} s were left, and it takes about {item.estimate:.0f}"}
            record.write()
        else:
            run_item(item, entry, record, device, min(item.limit * patience, left))
        print(f"{item.name}: {entry['status']}{_summary(entry)}", flush=True)
    record.content["seconds"] = round(time.monotonic() - started, 1)
    record.write()
    return sum(entry["status"] in ("failed", "killed at its limit") for entry in record.content["items"])


def run_item(item: Item, entry: dict[str, Any], record: Record, device: str, limit: float) -> None:
    """Run one item, and keep its rows as they come."""
    started = time.monotonic()
    entry |= {"status": "running", "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows", Path(folder) / "log"
        environment = os.environ | {
            "GPU_TEST_DEVICE": device,
            "GPU_ROWS": str(rows),
            "PYTHONUNBUFFERED": "1",
            # `--numprocesses auto`. A test process takes a gigabyte of GPU memory and much of two cores.
            "PYTEST_XDIST_AUTO_NUM_WORKERS": "8" if device == "cuda" else "2",
            # Several test processes compile at once, each with its own pool.
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
        }
        if device == "cuda":
            environment["REQUIRE_GPU"] = "1"
        arguments = (device, str(rows)) if "tests.gpu.benchmarks" in item.command else ()
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, *item.command, *arguments],
                stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY, start_new_session=True,
            )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                time.sleep(0.2)
                _take_rows(rows, entry, record)
            entry["status"] = {None: "killed at its limit", 0: "done"}.get(process.poll(), "failed")
        finally:
            # Whatever it started is in its session, and is ended with it, also if this program is interrupted.
            _kill_group(process)
        _take_rows(rows, entry, record)
        entry["seconds"] = round(time.monotonic() - started, 1)
        if entry["status"] != "done":
            entry["output"] = log.read_text(encoding="utf-8", errors="replace")[-OUTPUT_TAIL:]
    record.write()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _take_rows(file: Path, entry: dict[str, Any], record: Record) -> None:
    """Move new complete lines of the item's file into the record."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    complete = [json.loads(line) for line in lines if line.endswith("\n")]
    if len(complete) > len(entry["rows"]):
        entry["rows"] = complete
        record.write()


def _summary(entry: dict[str, Any]) -> str:
    """A few words about the rows of an item."""
    rows = entry.get("rows", [])
    outcomes = [row["outcome"] for row in rows if "outcome" in row]
    text = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped") if kind in outcomes)
    return f" ({entry.get('why') or text or f'{len(rows)} figures'})"


def main() -> int:
    """See the docstring of this module."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON file (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small sizes, to try it out")
    parser.add_argument("--minutes", type=float, default=8, help="what all items may take together (default: 8)")
    parser.add_argument("--only", nargs="*", choices=[item.name for item in ITEMS], help="only these items")
    options = parser.parse_args()
    # Ended by the launcher of a batch job: leave through `finally`, so that no item runs on.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = [item for item in ITEMS if not options.only or item.name in options.only]
    return 1 if run_all(chosen, options.device, 60 * options.minutes, options.out) else 0


if __name__ == "__main__":
    sys.exit(main())
