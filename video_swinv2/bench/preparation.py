"""Benchmark of `prepare`: the whole command against the `ffmpeg` program, and how long it takes to start.

The program makes the same files: the same frames at the same times, of the same size and colours, by the same encoder
with the same settings. It does less: it hashes nothing, keeps no state and does not look at what it has written. A
third contender leaves the colours of BT.709 sources as they are, which `prepare` converts to BT.601.
"""

from __future__ import annotations

import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from av.video.reformatter import Colorspace
from numpy.typing import NDArray

from data_prep.encode import difference_from_prepared_form, muxer_options, x264_options
from data_prep.jobs import TranscodeSettings
from data_prep.sources import plan_preparation
from data_prep.state import PreparationState
from video_swinv2.bench.measuring import median_ratio, peak_bytes_of, run_in_fresh_process, table_text, take_turns
from video_swinv2.bench.sample_clip import write_clip
from video_swinv2.data.decode import VideoReader, open_container
from video_swinv2.data.media import VIDEO_SUFFIXES
from video_swinv2.errors import UsageError, UserError

OURS, SAME, NO_COLOURS = "prepare", "ffmpeg, the same files", "ffmpeg, colours as they are"
GENERATED_SIZE, GENERATED_SECONDS = (720, 1280), 3.0
MAX_DIFFERENCE = 2.0  # levels of 0..255, on average over a picture


def bench_preparation(data: Path | None, *, clips: int, workers: int, rows: int, rounds: int) -> dict[str, Any]:
    """CPU seconds, child processes included, of preparing at most `clips` videos of the folder `data` in each way.

    data: a folder of videos, at any depth, or None for generated ones. `workers` videos are worked on at once. Also
    measured, once, is the start of a preparation of `rows` videos. Raises UsageError if there is no program `ffmpeg` or
    no video, UserError if the files that come out differ.
    """
    if shutil.which("ffmpeg") is None:
        raise UsageError("bench prepare: there is no program ffmpeg to compare with; apt-get install ffmpeg")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = _collect(data, folder / "source", clips)
        outputs = {name: folder / str(number) for number, name in enumerate((OURS, SAME, NO_COLOURS))}
        work = {
            OURS: partial(_prepare, folder / "source", outputs[OURS], workers),
            SAME: partial(_run_ffmpeg, sources, outputs[SAME], workers, True),
            NO_COLOURS: partial(_run_ffmpeg, sources, outputs[NO_COLOURS], workers, False),
        }
        # A turn begins without the files of the turn before, which `prepare` would not make again. There is no warm-up
        # round: each turn starts its own processes.
        seconds = take_turns(
            {name: partial(_cpu_seconds, run, outputs[name]) for name, run in work.items()}, rounds, warm_up_rounds=0
        )
        difference = max(_check_pair(outputs, source, number) for number, source in enumerate(sources))
    return {
        "videos": len(sources),
        "data": "generated" if data is None else str(data),
        "workers": workers,
        "rounds": rounds,
        "seconds": seconds,
        "throughput": {name: median_ratio(seconds[name], seconds[OURS]) for name in (SAME, NO_COLOURS)},
        "difference": difference,
        "start": measure_start(rows),
    }


def measure_start(rows: int) -> dict[str, float]:
    """What a preparation does before its first video, for a Kinetics list of `rows` videos: CPU seconds and bytes.

    `plan_seconds`: the lists are read and every video gets its place. `state_seconds`: prep.sqlite is written.
    `peak_bytes`: the most memory that both take.
    """
    result: dict[str, float] = run_in_fresh_process(_start, rows, device="cpu")
    return result


def _start(rows: int) -> dict[str, float]:
    """`measure_start`, in a process of its own."""
    import torch

    figures: dict[str, float] = {"rows": rows}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_kinetics_list(folder / "train.csv", rows)

        def start() -> None:
            started = time.process_time()
            plan = plan_preparation(folder)
            planned = time.process_time()
            with PreparationState(folder, create=True) as state:
                state.sync_with_plan(plan.videos)
            figures["plan_seconds"], figures["state_seconds"] = planned - started, time.process_time() - planned

        figures["peak_bytes"] = peak_bytes_of(start, torch.device("cpu"))
    return figures


def write_kinetics_list(path: Path, rows: int) -> None:
    """Write a list as Kinetics has it, of `rows` videos in 400 classes."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("label", "youtube_id", "time_start", "time_end", "split"))
        writer.writerows((f"class {n % 400}", f"{n:011d}", n % 600, n % 600 + 10, "train") for n in range(rows))


def _collect(data: Path | None, folder: Path, clips: int) -> list[Path]:
    """A folder of links to at most `clips` videos, evenly spaced over those of `data`, or of generated ones."""
    folder.mkdir()
    if data is None:
        write_clip(folder / "0000.mp4", size=GENERATED_SIZE, seconds=GENERATED_SECONDS)
        for number in range(1, clips):
            (folder / f"{number:04d}.mp4").symlink_to(folder / "0000.mp4")
        return sorted(folder.iterdir())
    found = sorted(path for path in data.absolute().rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise UsageError(f"{data}: contains no videos; name a folder of raw videos")
    chosen = found[:: max(1, len(found) // clips)][:clips]
    links = [folder / f"{number:04d}{path.suffix}" for number, path in enumerate(chosen)]
    for link, path in zip(links, chosen, strict=True):
        link.symlink_to(path)
    return links


def _cpu_seconds(run: Callable[[], None], out: Path) -> float:
    """The CPU seconds of all child processes of `run`, which writes to `out`."""
    shutil.rmtree(out, ignore_errors=True)
    before = os.times()
    run()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def _prepare(source: Path, out: Path, workers: int) -> None:
    """The whole command, with the start of Python and of the workers."""
    command = [sys.executable, "-m", "data_prep", "prepare", str(source), str(out), "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"prepare failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:500]}")


def _run_ffmpeg(sources: Sequence[Path], out: Path, workers: int, colours: bool) -> None:
    """Encode everything with the program, `workers` single-threaded processes at a time."""
    out.mkdir()
    settings = TranscodeSettings()
    short = settings.short_side
    scale = f"scale='if(lt(iw,ih),min({short},iw),-2)':'if(lt(iw,ih),-2,min({short},ih))'"
    options = {
        # Frames keep their times: by default the program makes the rate constant, and rounds times to its frames.
        "fps_mode": "passthrough",
        "enc_time_base": "-1",  # that of the source
        "filter_threads": "1",
        "c:v": "libx264",
        "pix_fmt": "yuv420p",
        **x264_options(settings.encoding),
        **muxer_options(settings.encoding),
        **{"map": "0:v:0", "map_metadata": "-1"},
    }

    def encode(number: int) -> None:
        source = sources[number]
        # The cheapest of the program's filters that convert the colours; it must be told from what.
        filters = f"{scale},colormatrix=bt709:bt601" if colours and _is_bt709(source) else scale
        command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-i", str(source), "-vf", filters]
        command += [word for key, value in options.items() for word in (f"-{key}", value)]
        done = subprocess.run([*command, str(out / f"{number:04d}.mp4")], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{source.resolve()}: ffmpeg failed ({done.stderr.strip()[-300:]}); leave it out")

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(encode, range(len(sources))))


def _is_bt709(source: Path) -> bool:
    with open_container(str(source)) as container:
        context = container.streams.video[0].codec_context
        return bool(context.colorspace == Colorspace.ITU709)


def _check_pair(outputs: dict[str, Path], source: Path, number: int) -> float:
    """How many levels the middle pictures of two outputs of one video differ on average, colours included.

    Raises UserError if size, number or times of the frames differ, or the pictures by more than two encodings of one
    picture do, or if a file has not the prepared form.
    """
    ours = next(outputs[OURS].rglob(f"{number:04d}.mp4"), None)
    theirs = outputs[SAME] / f"{number:04d}.mp4"
    if ours is None:
        raise UserError(f"{source.resolve()}: was not prepared; leave it out")
    settings = TranscodeSettings()
    if fault := difference_from_prepared_form(ours, short_side=settings.short_side, gop=settings.gop):
        raise UserError(f"{source.resolve()}: what prepare made is not in the prepared form ({fault})")
    mine, other = _read(ours), _read(theirs)
    if mine.key_frames != other.key_frames or mine.picture.shape != other.picture.shape:
        raise UserError(
            f"{source.resolve()}: the files differ in size or key frames, so their costs cannot be compared"
        )
    if len(mine.times) != len(other.times) or abs(mine.times - other.times).max() > 1e-3:
        raise UserError(f"{source.resolve()}: the files differ in frames, so their costs cannot be compared")
    difference = float(np.abs(mine.picture.astype(int) - other.picture).mean())
    if difference > MAX_DIFFERENCE:
        raise UserError(f"{source.resolve()}: the pictures differ by {difference:.1f} levels, so their colours do")
    return difference


@dataclass(frozen=True)
class _Written:
    """What is compared of a written file: the seconds of its frames from the first on, and which are key frames.

    `picture` is the middle one as stored, uint8 (H * 3 / 2, W): Y, and below it Cb and Cr.
    """

    times: NDArray[np.float64]
    key_frames: list[int]
    picture: NDArray[np.uint8]


def _read(path: Path) -> _Written:
    with VideoReader(path) as reader:
        middle = len(reader) // 2
        frames = dict(reader.sequence())
        keys = [index for index, frame in frames.items() if frame.key_frame]
        return _Written(reader.times - reader.times[0], keys, np.asarray(frames[middle].to_ndarray()))


def preparation_table(result: dict[str, Any]) -> str:
    """The result of `bench_preparation` as text."""
    start = result["start"]
    rows = []
    for name, seconds in result["seconds"].items():
        ratio = f"{result['throughput'][name]:.2f}" if name in result["throughput"] else ""
        rows.append([name, f"{statistics.median(seconds):.2f}", ratio])
    return "\n".join(
        [
            f"{result['videos']} videos ({result['data']}), {result['workers']} worker(s), "
            f"{result['rounds']} rounds taking turns",
            "",
            table_text(["", "CPU seconds", "throughput of prepare / of this"], rows),
            "",
            f"pictures of the same files differ by at most {result['difference']:.2f} levels on average",
            f"start with a list of {start['rows']:,} rows: {start['plan_seconds']:.2f} s to plan, "
            f"{start['state_seconds']:.2f} s to write the state, {start['peak_bytes'] / 2**20:.0f} MiB",
        ]
    )
