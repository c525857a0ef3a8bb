"""Before hours of work: is the machine fit for it, and what will it come to, judged by a sample that is really made."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av

from data_prep.jobs import TranscodeJob
from data_prep.pool import Allow, Crew, each
from data_prep.status import format_duration
from data_prep.transcode import transcode_video
from video_swinv2.errors import UserError
from video_swinv2.memory import free_memory_bytes, peak_memory_bytes

SAMPLE = 20
SAMPLE_COST = 50  # where nobody asked for it, the sample may take this part of the work at most: a fiftieth
FILES_PER_WORKER = 8  # of the parent: pipes and handles of a process
FILES_BESIDES = 64  # lists, state, libraries
DOUBT = 2.0  # standard errors of the sample's mean, either way


@dataclass(frozen=True)
class SampleResult:
    """A video of the sample: seconds on a worker, bytes written, why it failed ('' if not), most memory it took."""

    seconds: float
    size: int
    reason: str
    detail: str
    peak_bytes: int


@dataclass(frozen=True)
class PreflightReport:
    """What is expected of the work and what stands in its way.

    `hours` and `bytes` are (low, high): two standard errors of the sample either way. None without a sample.
    """

    pending: int
    workers: int
    trials: tuple[SampleResult, ...]
    hours: tuple[float, float] | None
    bytes: tuple[float, float] | None
    free_bytes: int
    problems: tuple[str, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """Failures of the sample by reason."""
        return dict(Counter(trial.reason for trial in self.trials if trial.reason))

    def as_text(self) -> str:
        """For people: the expectation, line by line, then the problems."""
        failed = sum(self.reasons.values())
        lines = [f"{self.pending} videos to prepare on {self.workers} workers"]
        if self.trials and self.hours and self.bytes:
            why = "".join(f", {n} {reason}" for reason, n in self.reasons.items())
            lines += [
                f"sample: {len(self.trials)} videos, {statistics.fmean(t.seconds for t in self.trials):.1f} s each on"
                f" one worker, {failed} failed ({failed / len(self.trials):.0%}{why})",
                f"expected: {_between(*(format_duration(3600 * hours) for hours in self.hours))},"
                f" {_between(*(_size(size) for size in self.bytes))} of output, {_size(self.free_bytes)} free",
            ]
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])


def sample_size(pending: int, *, asked: bool) -> int:
    """How many videos to try: all of the sample where it was asked for, else no more than is small beside the work."""
    return min(SAMPLE, pending if asked else pending // SAMPLE_COST)


def run_preflight(
    crew: Crew, tasks: Sequence[TranscodeJob], *, pending: int, workers: int, folder: Path
) -> PreflightReport:
    """Prepare `tasks`, a sample of the `pending` videos, in `folder` with the `crew` that is to do the work.

    The folder is one of its own below the data set; it is removed before and after, so that one left by a killed run
    goes too. Raises UserError where it cannot be made.
    """
    problems = [*_encoder(), *_open_files(workers)]
    memory = free_memory_bytes()
    trials = [] if problems else _try(crew, tasks, folder)
    free = shutil.disk_usage(folder.parent).free
    hours = size = None
    if trials:
        seconds, sizes = _mean([trial.seconds for trial in trials]), _mean([float(trial.size) for trial in trials])
        hours = (seconds[0] * pending / workers / 3600, seconds[1] * pending / workers / 3600)
        size = (sizes[0] * pending, sizes[1] * pending)
        problems += [f"{folder}: cannot be written ({t.detail}); mend that" for t in trials if t.reason == "disk"][:1]
        problems += _disk(folder.parent, size[0], free, pending)
        problems += _memory(max(trial.peak_bytes for trial in trials), workers, memory)
    return PreflightReport(pending, workers, tuple(trials), hours, size, free, tuple(problems))


def _try(crew: Crew, tasks: Sequence[TranscodeJob], folder: Path) -> list[SampleResult]:
    shutil.rmtree(folder, ignore_errors=True)
    if not tasks:
        return []
    try:
        folder.mkdir(parents=True)
        moved = [replace(task, target=folder / f"{task.row_id}.mp4") for task in tasks]
        return [
            outcome if isinstance(outcome, SampleResult) else SampleResult(0.0, 0, outcome.reason, outcome.detail, 0)
            for _, outcome in each(crew, measure_video, moved)
        ]
    except OSError as fault:
        raise UserError(f"{folder}: cannot be made ({fault.strerror}); choose another folder") from fault
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_video(task: TranscodeJob, allow: Allow) -> SampleResult:
    """Prepare a video as in earnest, note what it took and remove it."""
    outcome = transcode_video(task, allow)
    size = 0
    with contextlib.suppress(OSError):
        size = task.target.stat().st_size
        task.target.unlink()
    return SampleResult(outcome.seconds, size, outcome.reason, outcome.detail, peak_memory_bytes())


def _encoder() -> list[str]:
    try:
        av.codec.Codec("libx264", "w")
    except (av.FFmpegError, ValueError):
        return [
            "this PyAV has no encoder libx264; install the wheel: pip install --force-reinstall --only-binary av av"
        ]
    return []


def _open_files(workers: int) -> list[str]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    need = FILES_BESIDES + FILES_PER_WORKER * workers
    if limit == resource.RLIM_INFINITY or limit >= need:
        return []
    return [f"{limit} open files are allowed, {workers} workers need {need}; run `ulimit -n {need}` first"]


def _disk(folder: Path, need: float, free: int, pending: int) -> list[str]:
    found = []
    if need > free:
        found.append(
            f"{folder}: {_size(free)} are free, at least {_size(need)} are needed;"
            " free space, choose another folder or a smaller --short-side"
        )
    files = os.statvfs(folder)
    if files.f_files and files.f_favail < pending:
        found.append(f"{folder}: room for {files.f_favail} more files, {pending} are to come; choose another folder")
    return found


def _memory(peak_bytes: int, workers: int, available: int | None) -> list[str]:
    if available is None or workers * peak_bytes <= available:
        return []
    fit = max(1, int(available / peak_bytes))
    return [
        f"a worker took {_size(peak_bytes)} of memory, {workers} of them take {_size(workers * peak_bytes)},"
        f" {_size(available)} are available; use --workers {fit}"
    ]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean, less and more by the doubt that a sample leaves."""
    mean = statistics.fmean(values)
    error = DOUBT * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return max(0.0, mean - error), mean + error


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _size(number: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
