"""The preparation against the `ffmpeg` program at the same encode, a process a core; ours with its full verification.

python -m tests.data_prep.throughput SRC --rounds 5

Both in turn, so that a busy machine slows both; medians over the rounds. CPU seconds tell more than the clock there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from video_swinv2.data.media import VIDEO_SUFFIXES


def ffmpeg(sources: list[Path], out: Path, workers: int, short_side: int) -> None:
    """Encode everything with the program: one single-threaded process per worker."""
    out.mkdir()
    settings = {
        # Frames keep their times, as in ours; by default the program would make the rate constant.
        "fps_mode": "passthrough",
        "filter_threads": "1",
        "vf": f"scale='if(lt(iw,ih),min({short_side},iw),-2)':'if(lt(iw,ih),-2,min({short_side},ih))'",
        **{"c:v": "libx264", "preset": "medium", "crf": "23", "pix_fmt": "yuv420p", "threads": "1"},
        **{"g": "16", "keyint_min": "16", "sc_threshold": "0", "bf": "0"},
        **{"map": "0:v:0", "map_metadata": "-1", "movflags": "+faststart"},
    }

    def one(place: int) -> None:
        command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-i", str(sources[place])]
        command += [word for key, value in settings.items() for word in (f"-{key}", value)]
        subprocess.run([*command, str(out / f"{place}.mp4")], check=True)

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(one, range(len(sources))))


def ours(source: Path, out: Path, workers: int, short_side: int) -> None:
    """Prepare everything, including the start of Python and of the workers."""
    command = [sys.executable, "-m", "data_prep", "prepare", str(source), str(out), "--workers", str(workers)]
    subprocess.run([*command, "--short-side", str(short_side)], check=True, stdout=subprocess.DEVNULL)


def cost(work: Callable[..., None], *arguments: object) -> tuple[float, float]:
    """(wall seconds, CPU seconds of all child processes)."""
    before, started = os.times(), time.monotonic()
    work(*arguments)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - started, cpu


def main() -> int:
    """Measure and print. Returns 1 if our throughput is below nine tenths of that of the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--short-side", type=int, default=320)
    options = parser.parse_args()
    if shutil.which("ffmpeg") is None:
        print("error: no program ffmpeg to compare with; apt-get install ffmpeg", file=sys.stderr)
        return 2
    sources = sorted(path for path in options.source.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    ratios: list[tuple[float, float]] = []
    how = (options.workers, options.short_side)
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            theirs = cost(ffmpeg, sources, Path(folder) / "ffmpeg", *how)
            mine = cost(ours, options.source, Path(folder) / "ours", *how)
        ratios.append((theirs[0] / mine[0], theirs[1] / mine[1]))
        words = "; ".join(f"{who} {s:.1f} s, CPU {cpu:.1f} s" for who, (s, cpu) in (("ffmpeg", theirs), ("ours", mine)))
        print(f"round {number}: {words}", flush=True)
    wall, cpu = (statistics.median(ratio[kind] for ratio in ratios) for kind in (0, 1))
    print(f"{len(sources)} videos, {options.workers} workers: {wall:.2f} of ffmpeg's throughput, {cpu:.2f} by CPU time")
    return 0 if min(wall, cpu) >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
