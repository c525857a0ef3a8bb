"""`doctor`: checks whether this machine is fit to train, and says what to do if it is not.

Wherever possible a check does on a small scale what training will do, such as a ZeRO step or decoding a video, instead
of asking libraries what they support.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from video_swinv2.bench.sample_clip import frame_number, write_clip
from video_swinv2.data.decode import VideoReader
from video_swinv2.distributed.devices import has_native_bf16
from video_swinv2.memory import free_memory_bytes
from video_swinv2.training.throughput import usable_cores

MIN_VERSIONS = {"torch": (2, 7), "torchvision": (0, 22), "deepspeed": (0, 19), "av": (17, 0)}  # as in pyproject.toml
# For each pair below: a fault if there is less than the first, a note if there is less than the second.
# A checkpoint of the base model takes 1 GB. By default a run keeps two, and has a third while that is written.
DISK_FAULT_BYTES, DISK_NOTE_BYTES = 2e9, 50e9
# In /dev/shm: eight workers with four batches each, of 8 clips of 32x224x224 (uint8), hold 1.2 GB.
SHARED_MEMORY_FAULT_BYTES = 1e9
OPEN_FILES_FAULT, OPEN_FILES_NOTE = 1024, 4096
MEMORY_FAULT_BYTES = 4e9
# The frames of the generated clip that each decoder must return: the first and the last, one inside a group of pictures
# (GOP, 16 frames) and the key frame that starts the second one.
TEST_FRAMES = (0, 7, 16, 29)
FRAME_TOLERANCE = 0.4  # in frames: compression changes the grey that encodes the frame number a little

State = Literal["ok", "note", "fault"]
"""note: training works, but something is missing or could be better. fault: training is likely to fail."""


@dataclass(frozen=True)
class Finding:
    """The result of one check; `fix` says what to do about a note or a fault."""

    name: str
    state: State
    found: str
    fix: str = ""


def run_doctor(folder: Path) -> list[Finding]:
    """Run all checks, in the order in which a training run depends on them.

    folder: where runs will be written. No check stops the others: one that raises is a fault.
    """
    checks: Sequence[tuple[str, Callable[[], list[Finding]]]] = (
        ("packages", check_packages),
        ("device", check_device),
        ("bf16", check_bf16),
        ("processes", check_processes),
        ("deepspeed", check_deepspeed),
        ("compile", check_compiler),
        ("decoders", check_decoders),
        ("disk", lambda: [check_disk(folder)]),
        ("shared memory", lambda: [check_shared_memory(Path("/dev/shm"))]),
        ("open files", lambda: [check_open_files()]),
        ("memory", lambda: [check_memory()]),
    )
    findings = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:  # a broken installation may raise anything
            findings.append(Finding(name, "fault", _last_line(error), "install the packages again (pip install .)"))
    return findings


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


def check_device() -> list[Finding]:
    """Whether a GPU and NCCL work; without a GPU, why there is none."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        # The sum of 64 elements, each a sum of 8 products of ones: 512, which is exact in any precision.
        total = float((torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum())
        if total != 512:
            return [
                Finding("device", "fault", f"a matrix product on the GPU gave {total}, not 512", "check the driver")
            ]
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else ""
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        text = f"{count} x {torch.cuda.get_device_name(0)}, {memory:.0f} GB, CUDA {torch.version.cuda}"
        missing = Finding("NCCL", "fault", "this build of torch has none", "install PyPI's torch (pip install torch)")
        return [Finding("device", "ok", text), Finding("NCCL", "ok", nccl) if nccl else missing]
    # No GPU: torch was built without CUDA, or there is a driver that does not work with it, or the machine has none.
    if torch.version.cuda is None:
        return [Finding("device", "note", "CPU only: this build of torch has no CUDA", "for GPUs: pip install torch")]
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        fix = f"install a driver that supports CUDA {torch.version.cuda}; start a container with --gpus all"
        return [Finding("device", "fault", "there is a GPU, but torch cannot use it", fix)]
    return [Finding("device", "note", "CPU only: no GPU found", "use a machine with GPUs for models of real size")]


def check_bf16() -> list[Finding]:
    """Whether bf16 works, and if not, in which precision to train."""
    if torch.cuda.is_available():
        if has_native_bf16(torch.device("cuda")):
            return [Finding("bf16", "ok", "on the GPU")]
        return [Finding("bf16", "note", "not supported by this GPU", "use engine.precision=fp16")]
    with torch.autocast("cpu", torch.bfloat16):
        finite = bool(torch.isfinite(nn.Linear(64, 64)(torch.randn(8, 64))).all())
    if not finite:
        return [Finding("bf16", "fault", "a matrix product gave NaN or Inf", "use engine.precision=fp32")]
    capability = torch.backends.cpu.get_cpu_capability()
    return [Finding("bf16", "ok", f"on the CPU ({capability}); fp32 is often as fast there")]


def check_processes() -> list[Finding]:
    """Whether two processes on this machine can form a process group and sum a number over it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            # The processes find each other through a file, so no port for this can be taken or blocked. gloo then
            # connects them through the network interface of the host name, which misconfigured machines do not allow.
            spawn(_sum_ranks, (folder,), 2)
        except Exception as error:  # there are many ways to fail
            fix = "make the host name resolve, keep the firewall off the loopback, or set GLOO_SOCKET_IFNAME=lo"
            return [Finding("processes", "fault", f"two processes cannot form a group ({_last_line(error)})", fix)]
    return [Finding("processes", "ok", "two processes formed a group over gloo")]


def _sum_ranks(rank: int, folder: str) -> None:
    """What each of the two processes runs; raises if the sum is wrong."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    number = torch.tensor([rank + 1.0])
    dist.all_reduce(number)
    dist.destroy_process_group()
    if number.item() != 3.0:
        raise RuntimeError(f"1 + 2 over two processes gave {number.item()}")


def check_deepspeed() -> list[Finding]:
    """Whether a ZeRO-1 step in one process changes the weights, and which compiled operators DeepSpeed has."""
    # Imported here, so that an import that fails becomes a finding of this check and the other checks still run.
    from video_swinv2.config import EngineConfig
    from video_swinv2.distributed.world import join_world, leave_world
    from video_swinv2.engine.base import StepSettings
    from video_swinv2.engine.factory import make_engine
    from video_swinv2.engine.optimizer import parameter_groups

    fix = "pip install 'deepspeed>=0.19.8', or use engine.engine=plain in one process"
    try:
        world = join_world()
        try:
            module = nn.Linear(4, 1)
            groups = parameter_groups(module, (1,), weight_decay=0.0)
            config = EngineConfig(zero_stage=1, precision="fp32")
            engine = make_engine(module, groups, config, StepSettings(), world, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
            before = {name: tensor.clone() for name, tensor in (engine.weights() or {}).items()}
            engine.backward(engine.forward(torch.ones(1, 4, device=world.device)).square().mean())
            outcome = engine.step()
            moved = any(not torch.equal(tensor, before[name]) for name, tensor in (engine.weights() or {}).items())
        finally:
            leave_world()
    except Exception as error:  # it may fail to import or to run
        return [Finding("DeepSpeed", "fault", _last_line(error), fix)]
    if outcome is None or not outcome.applied or not moved:
        return [Finding("DeepSpeed", "fault", "a ZeRO-1 step changed no weight", fix)]
    # Operators that were compiled when DeepSpeed was installed. Our engines use none of them.
    built = [
        name
        for name, installed in importlib.import_module("deepspeed.git_version_info").installed_ops.items()
        if installed
    ]
    text = f"a ZeRO-1 step works; compiled operators: {', '.join(built) or 'none'} (none is needed)"
    return [Finding("DeepSpeed", "ok", text)]


def check_compiler() -> list[Finding]:
    """Whether the compiler that engine.compile needs is installed: Triton for GPUs, a C++ compiler for CPUs."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton"):
            return [Finding("torch.compile", "ok", "Triton is installed")]
        return [Finding("torch.compile", "note", "no Triton", "pip install triton, or keep engine.compile=false")]
    compiler = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)
    if compiler:
        return [Finding("torch.compile", "ok", f"{compiler} is installed")]
    return [Finding("torch.compile", "note", "no C++ compiler", "install g++, or keep engine.compile=false")]


def check_decoders() -> list[Finding]:
    """Whether each decoder returns the requested frames of a generated clip; only PyAV is required.

    The grey in the middle of each frame encodes the frame's number (`bench/sample_clip.py`), so a decoder that is off
    by one frame is detected.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        count = write_clip(path, size=(64, 96), seconds=1)
        for name, read in (("PyAV", _read_av), ("decord", _read_decord), ("torchcodec", _read_torchcodec)):
            fix = "pip install av" if name == "PyAV" else "none needed: PyAV is used instead"
            if_missing: State = "fault" if name == "PyAV" else "note"
            try:
                greys = read(path)
            except Exception as error:  # libraries fail to load in many ways
                found.append(Finding(name, if_missing, _last_line(error), fix))
                continue
            seen = [frame_number(grey, count) for grey in greys]
            pairs = zip(TEST_FRAMES, seen, strict=True)
            wrong = [wanted for wanted, got in pairs if abs(wanted - got) > FRAME_TOLERANCE]
            text = f"returns wrong frames for {', '.join(map(str, wrong))}" if wrong else "frames are exact"
            found.append(Finding(name, "fault" if wrong else "ok", text, fix if wrong else ""))
    return found


def _read_av(path: Path) -> list[float]:
    """The mean grey in the middle of each of TEST_FRAMES, decoded by PyAV. Frames are (3, 64, 96)."""
    with VideoReader(path) as video:
        return [float(frame[:, 30:34, 44:52].float().mean()) for frame in video.frames(TEST_FRAMES)]


def _read_decord(path: Path) -> list[float]:
    """The same by decord, whose frames are (64, 96, 3)."""
    decord = importlib.import_module("decord")
    frames = decord.VideoReader(str(path)).get_batch(list(TEST_FRAMES)).asnumpy()
    return [float(frame[30:34, 44:52].mean()) for frame in frames]


def _read_torchcodec(path: Path) -> list[float]:
    """The same by torchcodec, whose frames are (3, 64, 96)."""
    decoders = importlib.import_module("torchcodec.decoders")
    frames = decoders.VideoDecoder(str(path)).get_frames_at(indices=list(TEST_FRAMES)).data
    return [float(frame[:, 30:34, 44:52].float().mean()) for frame in frames]


def check_disk(folder: Path) -> Finding:
    """Whether `folder`, or the nearest existing folder above it, is writable and has enough free space."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    # Writing a file is the only reliable test: permissions say nothing about read-only mounts.
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(
            "disk", "fault", f"{existing} is not writable ({error.strerror})", "choose another folder with out="
        )
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:.0f} GB free in {existing}" if free >= 1e9 else f"{free / 1e6:.0f} MB free in {existing}"
    state: State = "fault" if free < DISK_FAULT_BYTES else "note" if free < DISK_NOTE_BYTES else "ok"
    return Finding("disk", state, text, "" if state == "ok" else "free some space, or choose another folder with out=")


def check_shared_memory(folder: Path) -> Finding:
    """Whether there is enough shared memory, through which loader workers pass their batches."""
    if not folder.is_dir():
        return Finding("shared memory", "note", f"no {folder}", "if loader workers fail, use data.workers=0")
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.2f} GB free in {folder}"
    fix = "start the container with --shm-size=8g, or use fewer data.workers and a smaller optim.micro_batch"
    return (
        Finding("shared memory", "ok", text)
        if free >= SHARED_MEMORY_FAULT_BYTES
        else Finding("shared memory", "fault", text, fix)
    )


def check_open_files() -> Finding:
    """Whether enough files may be open at once: loader workers use pipes, shared batches and videos."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    state: State = "ok" if unlimited or soft >= OPEN_FILES_NOTE else "note" if soft >= OPEN_FILES_FAULT else "fault"
    text = "no limit" if unlimited else f"at most {soft}"
    # A user may raise the soft limit up to the hard one, which only an administrator can raise.
    wanted = OPEN_FILES_NOTE if hard == resource.RLIM_INFINITY else min(hard, 65536)
    fix = f"ulimit -n {wanted}" + (
        ""
        if wanted >= OPEN_FILES_NOTE
        else " is the hard limit: ask the administrator for more, or use fewer data.workers"
    )
    return Finding("open files", state, text, "" if state == "ok" else fix)


def check_memory() -> Finding:
    """Whether the host has enough free memory; also reports the number of usable cores."""
    free = free_memory_bytes()
    if free is None:
        return Finding("memory", "ok", f"unknown; {usable_cores()} cores")
    text = f"{free / 1e9:.1f} GB free, {usable_cores()} cores"
    fix = "end other programs, or use fewer data.workers"
    return Finding("memory", "ok", text) if free >= MEMORY_FAULT_BYTES else Finding("memory", "fault", text, fix)


def _last_line(error: BaseException) -> str:
    """The last line of an error's message that is not empty, or its type; at most 160 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:160]


def findings_text(findings: Sequence[Finding]) -> str:
    """The findings as text, with the fix below each note and fault, and a verdict."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:6s}{finding.name:15s}{finding.found}")
        if finding.fix:
            lines.append(f"{'':21s}fix: {finding.fix}")
    faults = sum(finding.state == "fault" for finding in findings)
    lines.append("this machine is fit to train" if not faults else f"{faults} fault(s): fix them first")
    return "\n".join(lines)
