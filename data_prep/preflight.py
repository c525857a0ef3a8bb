"""The preflight of a preparation: checks the machine, and estimates time, disk and memory from a sample.

The sample consists of some of the videos themselves, prepared by the same workers and in the same way as the rest will
be. The estimate therefore includes whatever is slow here: the disk, the codec of the sources, or other users.
"""

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
from video_swinv2.escaping import terminal_lines
from video_swinv2.memory import free_memory_bytes, peak_memory_bytes

SAMPLE_SIZE = 20  # videos
# A sample that the user did not ask for may be at most one fiftieth of the work: there is none below 50 videos, and a
# full one from 1,000 on.
MIN_PENDING_PER_SAMPLE = 50
# Files that the parent process has open: the pipes and handles of each worker, and the lists, the state and libraries.
OPEN_FILES_PER_WORKER = 8
OTHER_OPEN_FILES = 64
STANDARD_ERRORS = 2.0  # half the width of the reported ranges, in standard errors of the mean of the sample


@dataclass(frozen=True)
class SampleResult:
    """What preparing one video of the sample took.

    `seconds` on one worker; `size`, the bytes written, 0 if it failed; `reason` ('' if it was prepared) and `detail` of
    a failure; `peak_bytes`, the largest memory of its process so far, earlier videos included.
    """

    seconds: float
    size: int
    reason: str
    detail: str
    peak_bytes: int


@dataclass(frozen=True)
class PreflightReport:
    """What the work is expected to take, and the problems that would make it fail.

    `trials` are the results of the sample. `hours` and `bytes` (of output) are ranges (low, high), two standard errors
    around the estimate on either side; None without a sample. `free_bytes` is the free space on the disk. Each problem
    is a line that says what is wrong and what to do.
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
        """The failures of the sample, by reason."""
        return dict(Counter(trial.reason for trial in self.trials if trial.reason))

    def as_text(self) -> str:
        """The estimate, one item per line, then the problems."""
        lines = [f"{self.pending} videos to prepare on {self.workers} workers"]
        if self.trials and self.hours and self.bytes:
            failed = sum(self.reasons.values())
            by_reason = "".join(f", {n} {reason}" for reason, n in self.reasons.items())
            mean_seconds = statistics.fmean(trial.seconds for trial in self.trials)
            lines += [
                f"sample: {len(self.trials)} videos, {mean_seconds:.1f} s each on one worker,"
                f" {failed} failed ({failed / len(self.trials):.0%}{by_reason})",
                f"expected: {_range(*(format_duration(3600 * hours) for hours in self.hours))},"
                f" {_range(*(_format_bytes(size) for size in self.bytes))} of output,"
                f" {_format_bytes(self.free_bytes)} free",
            ]
        return terminal_lines([*lines, *(f"problem: {problem}" for problem in self.problems)])


def sample_size(pending: int, *, requested: bool) -> int:
    """How many videos to try: a full sample if the user requested it, otherwise at most a small part of the work."""
    return min(SAMPLE_SIZE, pending if requested else pending // MIN_PENDING_PER_SAMPLE)


def run_preflight(
    crew: Crew, jobs: Sequence[TranscodeJob], *, pending: int, workers: int, folder: Path
) -> PreflightReport:
    """Check the machine, and prepare `jobs`, a sample of the `pending` videos, with the `crew` of the run.

    The sample is written to `folder`, a temporary folder inside the data set, on whose disk the real files will be too.
    The folder is deleted afterwards, and also before, in case a killed run left it. Without jobs only the machine is
    checked. Raises UserError if the folder cannot be created.
    """
    problems = [*_check_encoder(), *_check_open_files(workers)]
    free_memory = free_memory_bytes()  # measured before the sample runs, whose processes take some of it
    # There is no point in a sample if the encoder is missing or the workers cannot be started.
    trials = [] if problems else _prepare_sample(crew, jobs, folder)
    free_disk = shutil.disk_usage(folder.parent).free
    hours = size = None
    if trials:
        # The mean of the sample times the number of videos; the workers share the time.
        seconds = _mean_range([trial.seconds for trial in trials])
        sizes = _mean_range([float(trial.size) for trial in trials])
        hours = (seconds[0] * pending / workers / 3600, seconds[1] * pending / workers / 3600)
        size = (sizes[0] * pending, sizes[1] * pending)
        # One failure is reported, since the others have the same cause. Space is compared with the lower end of the
        # range, so that a run is refused only if its output will almost certainly not fit.
        disk_failures = [trial for trial in trials if trial.reason == "disk"]
        problems += [f"{folder}: cannot be written ({trial.detail}); fix that" for trial in disk_failures[:1]]
        problems += _check_disk(folder.parent, size[0], free_disk, pending)
        problems += _check_memory(max(trial.peak_bytes for trial in trials), workers, free_memory)
    return PreflightReport(pending, workers, tuple(trials), hours, size, free_disk, tuple(problems))


def _prepare_sample(crew: Crew, jobs: Sequence[TranscodeJob], folder: Path) -> list[SampleResult]:
    """Prepare the jobs with their targets moved to `folder`. A job that is Lost has no measurements, and gets zeros."""
    shutil.rmtree(folder, ignore_errors=True)
    if not jobs:
        return []
    try:
        folder.mkdir(parents=True)
        redirected = [replace(job, target=folder / f"{job.row_id}.mp4") for job in jobs]
        return [
            result if isinstance(result, SampleResult) else SampleResult(0.0, 0, result.reason, result.detail, 0)
            for _, result in each(crew, measure_video, redirected)
        ]
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error.strerror}); choose another folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_video(job: TranscodeJob, allow: Allow) -> SampleResult:
    """Executed by a worker: prepare a video as the real run does, measure what that took, and delete the file."""
    outcome = transcode_video(job, allow)
    # If the video failed there is no file, and 0 bytes are written, as in the real run.
    size = 0
    with contextlib.suppress(OSError):
        size = job.target.stat().st_size
        job.target.unlink()
    return SampleResult(outcome.seconds, size, outcome.reason, outcome.detail, peak_memory_bytes())


# Each check below returns a list of problems, which is empty if there are none.


def _check_encoder() -> list[str]:
    """PyAV may have been built against an FFmpeg without x264; its wheels have it."""
    try:
        av.codec.Codec("libx264", "w")
    except (av.FFmpegError, ValueError):
        return [
            "this PyAV has no encoder libx264; install the wheel: pip install --force-reinstall --only-binary av av"
        ]
    return []


def _check_open_files(workers: int) -> list[str]:
    """The limit is the soft limit of this process, which users can raise with ulimit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = OTHER_OPEN_FILES + OPEN_FILES_PER_WORKER * workers
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return []
    return [f"{limit} open files are allowed, {workers} workers need {needed}; run `ulimit -n {needed}` first"]


def _check_disk(folder: Path, needed_bytes: float, free_bytes: int, pending: int) -> list[str]:
    """A file system can be full in two ways: no space for bytes, or no inodes for further files."""
    problems = []
    if needed_bytes > free_bytes:
        problems.append(
            f"{folder}: {_format_bytes(free_bytes)} are free, but at least {_format_bytes(needed_bytes)} are needed;"
            " free space, choose another folder or use a smaller --short-side"
        )
    files = os.statvfs(folder)
    if files.f_files and files.f_favail < pending:  # f_files is 0 where the number of inodes is not fixed
        problems.append(
            f"{folder}: has room for {files.f_favail} more files, {pending} are needed; choose another folder"
        )
    return problems


def _check_memory(peak_bytes: int, workers: int, available_bytes: int | None) -> list[str]:
    """Assumes the worst: that all workers need as much at the same time as the largest one of the sample did."""
    if available_bytes is None or workers * peak_bytes <= available_bytes:
        return []
    fitting = max(1, int(available_bytes / peak_bytes))
    return [
        f"a worker took {_format_bytes(peak_bytes)} of memory, {workers} of them take"
        f" {_format_bytes(workers * peak_bytes)}, {_format_bytes(available_bytes)} are available;"
        f" use --workers {fitting}"
    ]


def _mean_range(values: Sequence[float]) -> tuple[float, float]:
    """(low, high): the mean, minus and plus STANDARD_ERRORS standard errors; both are the mean for a single value."""
    mean = statistics.fmean(values)
    error = STANDARD_ERRORS * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return max(0.0, mean - error), mean + error


def _range(low: str, high: str) -> str:
    """Both ends of a range as text, or one if they read the same."""
    return low if low == high else f"{low} to {high}"


def _format_bytes(number: float) -> str:
    """Bytes as text with a decimal unit, to three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
