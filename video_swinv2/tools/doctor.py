"""Is this machine fit to train, and if not, what mends it: every check does the thing it asks about, in little."""

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

from video_swinv2.bench.sample_clip import number_of, write_clip
from video_swinv2.data.decode import VideoReader
from video_swinv2.memory import free_memory_bytes
from video_swinv2.training.throughput import cores

OLDEST = {"torch": (2, 7), "torchvision": (0, 22), "deepspeed": (0, 19), "av": (17, 0)}  # as pyproject.toml asks
DISK_FAULT, DISK_NOTE = 2e9, 50e9  # bytes: a checkpoint of base is 1 GB, and three are kept while one is written
SHARED = 1e9  # bytes of /dev/shm: eight workers, four batches each, of 8 clips of 32x224x224 are 1.2 GB
FILES_FAULT, FILES_NOTE = 1024, 4096
MEMORY = 4e9
FRAMES_ASKED = (0, 7, 16, 29)  # of the made clip: ends, within and at the start of a group of pictures

State = Literal["ok", "note", "fault"]


@dataclass(frozen=True)
class Finding:
    """What one check found; `mend` says what to do about a note or a fault."""

    name: str
    state: State
    found: str
    mend: str = ""


def run_doctor(folder: Path) -> list[Finding]:
    """All checks, in the order in which a run would need them; `folder` is where runs are to be written."""
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
        except Exception as error:  # whatever a broken installation does is what is to be told
            findings.append(Finding(name, "fault", _words(error), "install the packages again (pip install .)"))
    return findings


def check_packages() -> list[Finding]:
    """Versions that the package needs."""
    found = []
    for name, oldest in OLDEST.items():
        wanted = ".".join(map(str, oldest))
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, "fault", "not installed", f"pip install '{name}>={wanted}'"))
            continue
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
        state: State = "ok" if numbers >= oldest else "fault"
        found.append(Finding(name, state, version, "" if state == "ok" else f"pip install '{name}>={wanted}'"))
    return found


def check_device() -> list[Finding]:
    """GPUs that work, with NCCL; without any, why."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        total = float((torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum())
        if total != 512:
            return [Finding("device", "fault", f"a product on the GPU gave {total}, not 512", "check the driver")]
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else ""
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        text = f"{count} x {torch.cuda.get_device_name(0)}, {memory:.0f} GB, CUDA {torch.version.cuda}"
        missing = Finding("NCCL", "fault", "this torch has none", "install PyPI's torch (pip install torch)")
        return [Finding("device", "ok", text), Finding("NCCL", "ok", nccl) if nccl else missing]
    if torch.version.cuda is None:
        return [Finding("device", "note", "CPU only: this torch is built without CUDA", "for GPUs: pip install torch")]
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        mend = f"the driver must be new enough for CUDA {torch.version.cuda}; in a container start it with --gpus all"
        return [Finding("device", "fault", "there is a GPU that torch cannot use", mend)]
    return [Finding("device", "note", "CPU only: no GPU here", "use a machine with GPUs for real sizes")]


def check_bf16() -> list[Finding]:
    """What precision to train in."""
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return [Finding("bf16", "ok", "on the GPU")]
        return [Finding("bf16", "note", "this GPU has none", "use engine.precision=fp16")]
    with torch.autocast("cpu", torch.bfloat16):
        finite = bool(torch.isfinite(nn.Linear(64, 64)(torch.randn(8, 64))).all())
    if not finite:
        return [Finding("bf16", "fault", "a product gave NaN or Inf", "use engine.precision=fp32")]
    capability = torch.backends.cpu.get_cpu_capability()
    return [Finding("bf16", "ok", f"on the CPU ({capability}); fp32 is often as fast there")]


def check_processes() -> list[Finding]:
    """Two processes that add a number each."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_meet, (folder,), 2)
        except Exception as error:  # whatever keeps processes apart
            mend = (
                "see that the machine's own name resolves and no firewall cuts off the loopback; GLOO_SOCKET_IFNAME=lo"
            )
            return [Finding("processes", "fault", f"two cannot meet ({_words(error)})", mend)]
    return [Finding("processes", "ok", "two met over gloo and agreed")]


def _meet(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    number = torch.tensor([rank + 1.0])
    dist.all_reduce(number)
    dist.destroy_process_group()
    if number.item() != 3.0:
        raise RuntimeError(f"the sum of 1 and 2 came as {number.item()}")


def check_deepspeed() -> list[Finding]:
    """A step of ZeRO-1 in one process, and which of DeepSpeed's own operators are there."""
    from video_swinv2.distributed.world import join_world, leave_world
    from video_swinv2.engine.deepspeed import EngineSettings, make_engine
    from video_swinv2.engine.optimizer import parameter_groups

    mend = "pip install 'deepspeed>=0.19.8', or use engine.engine=plain in one process"
    try:
        world = join_world()
        try:
            module = nn.Linear(4, 1)
            groups = parameter_groups(module, (1,), weight_decay=0.0)
            settings = EngineSettings(zero_stage=1, precision="fp32")
            engine = make_engine(module, groups, settings, world, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
            before = {name: tensor.clone() for name, tensor in (engine.weights() or {}).items()}
            engine.backward(engine.forward(torch.ones(1, 4, device=world.device)).square().mean())
            outcome = engine.step()
            moved = any(not torch.equal(tensor, before[name]) for name, tensor in (engine.weights() or {}).items())
        finally:
            leave_world()
    except Exception as error:  # a package that does not import, or does not run
        return [Finding("DeepSpeed", "fault", _words(error), mend)]
    if outcome is None or not outcome.applied or not moved:
        return [Finding("DeepSpeed", "fault", "a step of ZeRO-1 changed no weight", mend)]
    built = [
        name for name, there in importlib.import_module("deepspeed.git_version_info").installed_ops.items() if there
    ]
    text = f"a step of ZeRO-1 works; operators built: {', '.join(built) or 'none'} (none is needed)"
    return [Finding("DeepSpeed", "ok", text)]


def check_compiler() -> list[Finding]:
    """What engine.compile needs."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton"):
            return [Finding("torch.compile", "ok", "Triton is there")]
        return [Finding("torch.compile", "note", "no Triton", "pip install triton, or leave engine.compile false")]
    compiler = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)
    if compiler:
        return [Finding("torch.compile", "ok", f"{compiler} is there")]
    return [Finding("torch.compile", "note", "no C++ compiler", "install g++, or leave engine.compile false")]


def check_decoders() -> list[Finding]:
    """Each decoder on a clip made now, whose frames tell their numbers; only PyAV is needed."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        count = write_clip(path, size=(64, 96), seconds=1)
        for name, read in (("PyAV", _read_av), ("decord", _read_decord), ("torchcodec", _read_torchcodec)):
            mend = "pip install av" if name == "PyAV" else "nothing, unless you want it: PyAV is used without it"
            absent: State = "fault" if name == "PyAV" else "note"
            try:
                greys = read(path)
            except Exception as error:  # libraries fail to load in many ways
                found.append(Finding(name, absent, _words(error), mend))
                continue
            seen = [number_of(grey, count) for grey in greys]
            wrong = [asked for asked, got in zip(FRAMES_ASKED, seen, strict=True) if abs(asked - got) > 0.4]
            text = (
                f"gives other frames than were asked for ({', '.join(map(str, wrong))})"
                if wrong
                else "frames are exact"
            )
            found.append(Finding(name, "fault" if wrong else "ok", text, mend if wrong else ""))
    return found


def _read_av(path: Path) -> list[float]:
    """The grey in the middle of each frame asked for."""
    with VideoReader(path) as video:
        return [float(frame[:, 30:34, 44:52].float().mean()) for frame in video.frames(FRAMES_ASKED)]


def _read_decord(path: Path) -> list[float]:
    decord = importlib.import_module("decord")
    frames = decord.VideoReader(str(path)).get_batch(list(FRAMES_ASKED)).asnumpy()
    return [float(frame[30:34, 44:52].mean()) for frame in frames]


def _read_torchcodec(path: Path) -> list[float]:
    decoders = importlib.import_module("torchcodec.decoders")
    frames = decoders.VideoDecoder(str(path)).get_frames_at(indices=list(FRAMES_ASKED)).data
    return [float(frame[:, 30:34, 44:52].float().mean()) for frame in frames]


def check_disk(folder: Path) -> Finding:
    """Room where runs are written, and that they can be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding("disk", "fault", f"{there} cannot be written ({error.strerror})", "name another folder as out")
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:.0f} GB free in {there}" if free >= 1e9 else f"{free / 1e6:.0f} MB free in {there}"
    state: State = "fault" if free < DISK_FAULT else "note" if free < DISK_NOTE else "ok"
    return Finding("disk", state, text, "" if state == "ok" else "free space, or name another folder as out")


def check_shared_memory(folder: Path) -> Finding:
    """Through it loader workers hand over their batches."""
    if not folder.is_dir():
        return Finding("shared memory", "note", f"no {folder} here", "if loader workers fail use data.workers=0")
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.2f} GB free in {folder}"
    mend = "start the container with --shm-size=8g, or use fewer data.workers and a smaller optim.micro_batch"
    return Finding("shared memory", "ok", text) if free >= SHARED else Finding("shared memory", "fault", text, mend)


def check_open_files() -> Finding:
    """Loader workers hold pipes, shared batches and videos open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    state: State = "ok" if unlimited or soft >= FILES_NOTE else "note" if soft >= FILES_FAULT else "fault"
    text = "no limit" if unlimited else f"at most {soft}"
    wanted = FILES_NOTE if hard == resource.RLIM_INFINITY else min(hard, 65536)
    mend = f"ulimit -n {wanted}" + (
        "" if wanted >= FILES_NOTE else " is all that is allowed: ask for more, use fewer workers"
    )
    return Finding("open files", state, text, "" if state == "ok" else mend)


def check_memory() -> Finding:
    """Of the host, and its cores."""
    free = free_memory_bytes()
    if free is None:
        return Finding("memory", "ok", f"not known here; {cores()} cores")
    text = f"{free / 1e9:.1f} GB free, {cores()} cores"
    mend = "end other programs; use fewer data.workers"
    return Finding("memory", "ok", text) if free >= MEMORY else Finding("memory", "fault", text, mend)


def _words(error: BaseException) -> str:
    """The last line of an error that says something, not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:160]


def show(findings: Sequence[Finding]) -> str:
    """The findings for people, faults with their mends."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:6s}{finding.name:15s}{finding.found}")
        if finding.mend:
            lines.append(f"{'':21s}mend: {finding.mend}")
    faults = sum(finding.state == "fault" for finding in findings)
    lines.append("this machine is fit to train" if not faults else f"{faults} fault(s): mend them first")
    return "\n".join(lines)
