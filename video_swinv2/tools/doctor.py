"""`doctor`: checks whether this machine is fit to train, and says what to do if it is not.

Wherever possible a check does on a small scale what training will do, such as a ZeRO step on all GPUs or decoding a
video, instead of asking libraries what they support. The checks of processes and their devices are in `group.py`, those
of what a run takes from the machine in `resources.py`.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from video_swinv2.bench.sample_clip import frame_number, write_clip
from video_swinv2.config import Config, load_config
from video_swinv2.data.decoders import LOADING, Decoder, open_video, why_missing
from video_swinv2.errors import UsageError
from video_swinv2.tools.demo import recipe
from video_swinv2.tools.findings import Finding, State, describe_error
from video_swinv2.tools.group import CPU_PROCESSES, compile_check, group_checks, run_group
from video_swinv2.tools.resources import (
    PlannedRun,
    check_disk,
    check_memory,
    check_open_files,
    check_shared_memory,
)

MIN_VERSIONS = {"torch": (2, 7), "torchvision": (0, 22), "deepspeed": (0, 19), "av": (17, 0)}  # as in pyproject.toml
DEFAULT_RECIPE = "kinetics400/base.yaml"  # whose run is assumed if none is given
# The frames of the generated clip that each decoder must return: the first and the last, one inside a group of pictures
# (GOP, 16 frames) and the key frame that starts the second one.
TEST_FRAMES = (0, 7, 16, 29)
# What a decoder that works is used for.
USES = {
    "pyav": "frames are exact; reads everything unless data.decoder names another",
    "torchcodec": "frames are exact, colours are swscale's default; for data.decoder: torchcodec",
    "decord": "frames are exact, colours are swscale's default; for data.decoder: decord",
}
FRAME_TOLERANCE = 0.4  # in frames: compression changes the grey that encodes the frame number a little


def run_doctor(folder: Path, run: PlannedRun, device_type: str) -> list[Finding]:
    """Run all checks, in the order in which a training run depends on them.

    folder: where runs will be written. run: for which the machine has to suffice. device_type: "cuda" or "cpu". No
    check stops the others: one that raises is a fault.
    """
    on_gpu = device_type == "cuda"
    # Counting GPUs does not initialise CUDA in this process.
    processes = torch.cuda.device_count() if on_gpu else CPU_PROCESSES
    checks: Sequence[tuple[str, Callable[[], list[Finding]]]] = (
        ("packages", check_packages),
        ("device", lambda: check_device(device_type, run.processes)),
        ("processes", lambda: run_group(group_checks(device_type), device_type, processes)),
        # On CPUs a single process: all would wait for the same compiler on the same cores.
        ("torch.compile", lambda: run_group([compile_check(device_type)], device_type, processes if on_gpu else 1)),
        ("decoders", check_decoders),
        ("disk", lambda: [check_disk(folder)]),
        ("shared memory", lambda: [check_shared_memory(Path("/dev/shm"), run)]),
        ("open files", lambda: [check_open_files(run)]),
        ("memory", lambda: [check_memory(run)]),
    )
    findings = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:  # a broken installation may raise anything
            findings.append(Finding(name, "fault", describe_error(error), "install the packages again (pip install .)"))
    return findings


def plan_run(config: Config | None, processes: int | None, device_type: str) -> PlannedRun:
    """The run to size the machine for: by default the shipped recipe for Kinetics-400, one process per GPU.

    Raises UsageError if `processes` is less than 1.
    """
    if processes is not None and processes < 1:
        raise UsageError(f"--processes {processes}: give 1 or more")
    origin = "your configuration"
    if config is None:
        config, origin = load_config(recipe(DEFAULT_RECIPE)), f"configs/{DEFAULT_RECIPE}, as no CONFIG is given"
    gpus = torch.cuda.device_count() if device_type == "cuda" else 0
    return PlannedRun(config, processes or gpus or 1, origin)


def check_packages() -> list[Finding]:
    """Whether the main dependencies are installed in the required versions."""
    found = []
    for name, oldest in MIN_VERSIONS.items():
        wanted = ".".join(map(str, oldest))
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, "fault", "not installed", f"pip install '{name}>={wanted}'"))
            continue
        # Major and minor version; a local version such as 2.7.0+cu126 is cut off at the plus sign.
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
        state: State = "ok" if numbers >= oldest else "fault"
        found.append(Finding(name, state, version, "" if state == "ok" else f"pip install '{name}>={wanted}'"))
    return found


def check_device(device_type: str, processes: int) -> list[Finding]:
    """How many GPUs there are for `processes` processes, and whether torch has NCCL; without a GPU, why there is none.

    Does not initialise CUDA: what works on the GPUs is found out by `group.py`, in processes of their own.
    """
    if device_type == "cuda":
        count = torch.cuda.device_count()
        text = f"{count} GPUs for {processes} processes, CUDA {torch.version.cuda}"
        fix = f"start at most {count} processes on this machine; nvidia-smi shows which GPUs the driver sees"
        fits = count >= processes
        found = [Finding("GPUs", "ok" if fits else "fault", text, "" if fits else fix)]
        if not dist.is_nccl_available():
            missing = "this build of torch has none"
            return [*found, Finding("NCCL", "fault", missing, "install PyPI's torch (pip install torch)")]
        return [*found, Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))]
    if torch.cuda.is_available():
        return [Finding("GPUs", "note", "not checked, because of --device cpu", "leave --device out to train on them")]
    # No GPU: torch was built without CUDA, or there is a driver that does not work with it, or the machine has none.
    if torch.version.cuda is None:
        return [Finding("GPUs", "note", "CPU only: this build of torch has no CUDA", "for GPUs: pip install torch")]
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        fix = f"install a driver that supports CUDA {torch.version.cuda}; start a container with --gpus all"
        return [Finding("GPUs", "fault", "there is a GPU, but torch cannot use it", fix)]
    return [Finding("GPUs", "note", "CPU only: no GPU found", "use a machine with GPUs for models of real size")]


def check_decoders() -> list[Finding]:
    """Whether each decoder of `data.decoder` returns the requested frames of a generated clip; PyAV alone is required.

    The grey in the middle of each frame encodes the frame's number (`bench/sample_clip.py`), so a decoder that is off
    by one frame is detected.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        count = write_clip(path, size=(64, 96), seconds=1)
        decoders: tuple[tuple[str, Decoder], ...] = (
            ("PyAV", "pyav"),
            ("torchcodec", "torchcodec"),
            ("decord", "decord"),
        )
        for name, decoder in decoders:
            fix = (
                "pip install av"
                if decoder == "pyav"
                else f"none needed: PyAV reads everything; else {LOADING[decoder]}"
            )
            if_missing: State = "fault" if decoder == "pyav" else "note"
            if decoder != "pyav" and (reason := why_missing(decoder)):
                found.append(Finding(name, if_missing, reason, fix))
                continue
            try:
                greys = _read(path, decoder)
            except Exception as error:  # libraries fail in many ways
                found.append(Finding(name, if_missing, describe_error(error), fix))
                continue
            seen = [frame_number(grey, count) for grey in greys]
            pairs = zip(TEST_FRAMES, seen, strict=True)
            wrong = [wanted for wanted, got in pairs if abs(wanted - got) > FRAME_TOLERANCE]
            text = f"returns wrong frames for {', '.join(map(str, wrong))}" if wrong else USES[decoder]
            found.append(Finding(name, "fault" if wrong else "ok", text, fix if wrong else ""))
    return found


def _read(path: Path, decoder: Decoder) -> list[float]:
    """The mean grey in the middle of each of TEST_FRAMES, which are (3, 64, 96)."""
    with open_video(path, decoder) as video:
        return [float(frame[:, 30:34, 44:52].float().mean()) for frame in video.frames(TEST_FRAMES)]
