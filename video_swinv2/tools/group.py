"""Checks of `doctor` in one process per GPU, all at once, which do on a small scale what the processes of a run do.

Each check has a time limit, because what is wrong between GPUs shows as a hang more often than as an error. The
processes are apart from doctor's own, so that neither a hang nor a crash ends doctor. Without a GPU, two processes do
the same on the CPU, over gloo instead of NCCL.
"""

from __future__ import annotations

import importlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from video_swinv2.config import EngineConfig
from video_swinv2.distributed.devices import has_native_bf16
from video_swinv2.distributed.world import World, join_world, leave_world
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups
from video_swinv2.killable import REAP_SECONDS, KillableProcess, NoAnswerError, ProcessDiedError
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.tools.findings import Finding, State, describe_error

CPU_PROCESSES = 2
POLL_SECONDS = 0.05
# How long the others may take to notice that one process has failed a check that they do together.
GRACE_SECONDS = 10.0
REDUCED_BYTES = 64 * 2**20  # as much as a bucket of gradients of a large model
NORM_TOLERANCE = 0.1  # relative; bf16 has 8 significant bits


@dataclass(frozen=True)
class Place:
    """A process of the group and its device; all processes share the folder, in which they find each other."""

    rank: int
    processes: int
    device_type: str
    folder: str

    @property
    def device(self) -> torch.device:
        """GPU number `rank`, or the CPU."""
        return torch.device("cuda", self.rank) if self.device_type == "cuda" else torch.device("cpu")


@dataclass(frozen=True)
class Check:
    """What every process of the group does at the same time.

    work: raises, or returns a finding without a name, which is the check's. It must be importable.
    together: whether the processes need each other, so that the failure of one ends the check for all.
    """

    name: str
    work: Callable[[Place], Finding]
    fix: str
    """What to do if it raises, crashes or hangs."""
    seconds: float = 120.0
    """How long it may take."""
    if_failed: State = "fault"
    together: bool = False


def group_checks(device_type: str) -> tuple[Check, ...]:
    """The checks that any run depends on, in the order in which they depend on each other."""
    on_gpu = device_type == "cuda"
    broken = (
        "look for Xid errors in dmesg, and run nvidia-smi; leave the GPU out with CUDA_VISIBLE_DEVICES"
        if on_gpu
        else "install torch again"
    )
    network = (
        "start with NCCL_DEBUG=INFO to see where it stops; if NCCL_P2P_DISABLE=1 helps, switch IOMMU and PCIe ACS off; "
        "NCCL_SOCKET_IFNAME names the network interface to use; NCCL also needs free /dev/shm (--shm-size)"
        if on_gpu
        else "make the host name resolve, keep the firewall off the loopback, or set GLOO_SOCKET_IFNAME=lo"
    )
    return (
        # The longest limit: it includes the start of the process, of torch and of the driver.
        Check("device", look_at_device, broken, seconds=300.0),
        Check("training step", take_step, broken),
        Check("process group", form_group, network, together=True),
        Check("all-reduce", all_reduce, network, together=True),
        Check(
            "DeepSpeed",
            take_zero_step,
            "pip install 'deepspeed>=0.19.8', or use engine.engine=plain in one process",
            together=True,
        ),
    )


def compile_check(device_type: str) -> Check:
    """The check that matters to runs with engine.compile only; it may end its processes, so it gets its own."""
    tool = "triton" if device_type == "cuda" else "g++"
    fix = f"install {tool} and a C compiler, or keep engine.compile=false"
    return Check("torch.compile", take_compiled_step, fix, seconds=300.0, if_failed="note")


def run_group(checks: Sequence[Check], device_type: str, processes: int) -> list[Finding]:
    """Let `processes` new processes run the checks, and return what they found, with the name of each GPU.

    A process that fails takes no part in the checks that follow, and a check that needs it is not tried.
    """
    findings = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        members: dict[int, KillableProcess] = {}
        for rank in range(processes):
            place = Place(rank, processes, device_type, folder)
            members[rank] = KillableProcess(_serve, place, method="spawn")
            stack.callback(members[rank].end)
        lost: set[int] = set()
        for check in checks:
            if check.together and lost:
                found = f"not tried: {_names(lost, device_type)} failed before"
                findings.append(Finding(check.name, "note", found, "fix that first"))
                continue
            answers = _ask(check, {rank: member for rank, member in members.items() if rank not in lost})
            lost |= {rank for rank, answer in answers.items() if answer.state == "fault"}
            findings += _merge(check.name, answers, device_type)
        for rank in members.keys() - lost:
            with suppress(ProcessDiedError):
                members[rank].send(None)
        for rank in members.keys() - lost:
            members[rank].end(REAP_SECONDS)
    return findings


def _ask(check: Check, members: Mapping[int, KillableProcess]) -> dict[int, Finding]:
    """Let the members run a check at the same time; returns the answer of each, by rank.

    Members that died or did not answer in time are ended. If the members need each other, only those are returned that
    caused a failure: of dead ones and others only the dead, and not those that still waited for a failed one.
    """

    def failure(found: str) -> Finding:
        return Finding(check.name, check.if_failed, found, check.fix)

    answers: dict[int, Finding] = {}
    dead: dict[int, Finding] = {}
    until = time.monotonic() + check.seconds
    for rank, member in members.items():
        try:
            member.send(check.work)
        except ProcessDiedError as error:
            answers[rank] = dead[rank] = failure(f"its process died ({error})")
    failed = False
    while (waiting := members.keys() - answers.keys()) and time.monotonic() < until:
        for rank in sorted(waiting):
            try:
                answer = members[rank].receive(POLL_SECONDS)
            except NoAnswerError:
                continue
            except ProcessDiedError as error:
                answers[rank] = dead[rank] = failure(f"its process died ({error})")
            else:
                answers[rank] = answer if isinstance(answer, Finding) else failure(str(answer))
            if check.together and not failed and answers[rank].state != "ok":
                failed, until = True, min(until, time.monotonic() + GRACE_SECONDS)
    for rank in members.keys() - answers.keys():
        members[rank].end()
        if not failed:
            answers[rank] = failure(f"no answer within {check.seconds:g} s")
    return dead if check.together and dead else answers


def _merge(name: str, answers: Mapping[int, Finding], device_type: str) -> list[Finding]:
    """One finding for each different answer, in the order of ranks, with the names of those that gave it."""
    ranks: dict[Finding, list[int]] = {}
    for rank in sorted(answers):
        ranks.setdefault(answers[rank], []).append(rank)
    return [
        Finding(name, answer.state, f"{_names(same, device_type)}: {answer.found}", answer.fix)
        for answer, same in ranks.items()
    ]


def _names(ranks: Iterable[int], device_type: str) -> str:
    """Such as "GPU 3" or "processes 0, 1"."""
    numbers = ", ".join(map(str, sorted(ranks)))
    one, many = ("GPU", "GPUs") if device_type == "cuda" else ("process", "processes")
    return f"{many if ',' in numbers else one} {numbers}"


def _serve(pipe: Connection, place: Place) -> None:
    """What each process runs: the work that doctor sends, one after another, until it sends None."""
    # What libraries print goes to the error output, because doctor's own output may have to be JSON.
    os.dup2(2, 1)
    os.environ["LOCAL_RANK"] = str(place.rank)  # for join_world and DeepSpeed
    while (work := pipe.recv()) is not None:
        try:
            answer = work(place)
        except Exception as error:  # a broken installation may raise anything
            answer = describe_error(error)
        pipe.send(answer)
    leave_world()


def look_at_device(place: Place) -> Finding:
    """Make the device this process's own, and let it compute a number that is exact in any precision."""
    device = place.device
    if device.type == "cpu":
        text = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
        return Finding("", "ok", text)
    torch.cuda.set_device(device)
    ones = torch.ones(8, 8, device=device)
    if (total := float((ones @ ones).sum())) != 512:
        raise RuntimeError(f"a matrix product gave {total}, not 512")
    free, memory = torch.cuda.mem_get_info(device)
    text = f"{torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {memory / 1e9:.1f} GB free"
    if free < 0.9 * memory:  # the CUDA context of this process takes less than a tenth
        return Finding("", "note", text, "end the other programs on it (nvidia-smi lists them)")
    return Finding("", "ok", text)


def take_step(place: Place) -> Finding:
    """Take two training steps of a small model in the precision that a run would use; the second one is timed."""
    device = place.device
    precision = _precision(device)
    model, clips, labels = _small_training()
    # The same gradients in fp32 on the CPU, because a device that computes wrongly need not give NaN. The loss would
    # not tell: at random weights it is near log(classes), whatever the input.
    F.cross_entropy(model(clips), labels).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    expected = float(torch.nn.utils.get_total_norm(gradients))
    model.zero_grad()
    loss, norm, seconds = _two_steps(model, clips, labels, device, precision)
    if abs(norm - expected) > NORM_TOLERANCE * expected:
        raise RuntimeError(f"the gradient norm is {norm:.3f} in {precision}, but {expected:.3f} in fp32 on the CPU")
    text = f"loss {loss:.4f}, gradient norm {norm:.3f}, {seconds:.3f} s in {precision}"
    if precision == "bf16":
        return Finding("", "ok", text)
    return Finding("", "note", f"{text}; bf16 is not supported by this GPU", "use engine.precision=fp16")


def take_compiled_step(place: Place) -> Finding:
    """Take two steps of the small model with compiled parts, and report how long the first one took to compile."""
    model, clips, labels = _small_training()
    started = time.perf_counter()
    on_gpu = place.device_type == "cuda"
    if not on_gpu:
        # C++ takes minutes to compile whole blocks, and a fraction of it for a part; the compiler is the same.
        for block in model.blocks():
            block.mlp.compile()
    loss, _, seconds = _two_steps(model, clips, labels, place.device, _precision(place.device), compiled=on_gpu)
    total = time.perf_counter() - started
    return Finding("", "ok", f"loss {loss:.4f}, {seconds:.3f} s after {total - seconds:.0f} s of compilation")


def _precision(device: torch.device) -> Literal["bf16", "fp16"]:
    return "bf16" if has_native_bf16(device) else "fp16"


def _small_training() -> tuple[SwinV2, torch.Tensor, torch.Tensor]:
    """A model of two blocks, the second one shifted, a batch of two clips (2, 3, 4, 32, 32), and their labels (2,)."""
    torch.manual_seed(0)
    model = SwinV2(embed_dim=32, depths=(2,), num_heads=(2,), num_classes=10, frames=4, image_size=32, window=(2, 4, 4))
    return model.train(), torch.randn(2, 3, 4, 32, 32), torch.tensor([1, 2])


def _two_steps(
    model: SwinV2,
    clips: torch.Tensor,
    labels: torch.Tensor,
    device: torch.device,
    precision: Literal["bf16", "fp16"],
    compiled: bool = False,
) -> tuple[float, float, float]:
    """The loss and the gradient norm of the first step, and the seconds of the second. Raises unless all is finite."""
    config = EngineConfig(engine="plain", precision=precision, compile=compiled)
    groups = parameter_groups(model, model.depths, weight_decay=0.05)
    # A world of its own: the plain engine computes in one process.
    engine = make_engine(
        model,
        groups,
        config,
        StepSettings(clip_norm=5.0),
        World(0, 1, 0, device),
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    steps = []
    for _ in range(2):
        started = time.perf_counter()
        loss = F.cross_entropy(engine.forward(clips.to(device)).float(), labels.to(device))
        engine.backward(loss)
        outcome = engine.step()
        # float() waits for the device, so the time is that of all its work.
        steps.append((float(loss.detach()), outcome.grad_norm if outcome else math.nan, time.perf_counter() - started))
        if outcome is None or not outcome.applied or not all(map(math.isfinite, steps[-1])):
            raise RuntimeError(f"loss {steps[-1][0]}, gradient norm {steps[-1][1]}: not finite")
    return *steps[0][:2], steps[1][2]


def form_group(place: Place) -> Finding:
    """Form the process group over NCCL or gloo, and let every process hear from every other."""
    backend = "nccl" if place.device_type == "cuda" else "gloo"
    # The processes find each other through a file, so no port for this can be taken or blocked. The backend then
    # connects them, through the network interface of the host name if it is gloo. doctor's own limit is shorter than
    # the group's, so that a hang is reported in doctor's words.
    dist.init_process_group(
        backend,
        init_method=f"file://{place.folder}/store",
        rank=place.rank,
        world_size=place.processes,
        timeout=timedelta(minutes=10),
    )
    ranks = torch.tensor([place.rank], device=place.device)
    found = [torch.empty_like(ranks) for _ in range(place.processes)]
    dist.all_gather(found, ranks)  # NCCL connects the GPUs only now
    if (numbers := [int(rank) for rank in found]) != list(range(place.processes)):
        raise RuntimeError(f"the ranks are {numbers}")
    return Finding("", "ok", f"formed over {backend}")


def all_reduce(place: Place) -> Finding:
    """Sum a tensor over all processes, check every element, and measure the rate."""
    elements = REDUCED_BYTES // 4
    # Whole numbers up to 251 times the sum of the ranks: exact in fp32, and wrong if parts are exchanged.
    pattern = (torch.arange(elements, device=place.device) % 251).float()
    summed = pattern * (place.rank + 1)
    dist.all_reduce(summed)
    wrong = int((summed != pattern * (place.processes * (place.processes + 1) // 2)).sum())
    started = time.perf_counter()
    dist.all_reduce(pattern)
    if place.device_type == "cuda":
        torch.cuda.synchronize(place.device)
    # All processes report the time of the slowest.
    seconds = torch.tensor([time.perf_counter() - started], device=place.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    if wrong:  # raised only now, so that the others need not wait in vain
        raise RuntimeError(f"{wrong} of {elements} elements of an all-reduce are wrong")
    text = f"{REDUCED_BYTES // 2**20} MiB over {dist.get_backend()} in {1e3 * seconds.item():.1f} ms"
    if place.processes == 1:
        return Finding("", "ok", f"{text}, alone")
    # What each device sends and receives in the best algorithm, as NCCL's own tests count it ("bus bandwidth").
    rate = 2 * (place.processes - 1) / place.processes * REDUCED_BYTES / seconds.item()
    return Finding("", "ok", f"{text}, {rate / 1e9:.1f} GB/s per device; every sum is right")


def take_zero_step(place: Place) -> Finding:
    """Take a ZeRO-1 step over all processes, and see whether the weights change."""
    world = join_world(place.device_type)
    module = nn.Linear(4, 1)
    groups = parameter_groups(module, (1,), weight_decay=0.0)
    config = EngineConfig(zero_stage=1, precision="fp32")
    engine = make_engine(module, groups, config, StepSettings(), world, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    engine.backward(engine.forward(torch.ones(1, 4, device=world.device)).square().mean())
    outcome = engine.step()
    moved = any(not torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))
    if outcome is None or not outcome.applied or not moved:
        raise RuntimeError("a ZeRO-1 step changed no weight")
    # Operators that were compiled when DeepSpeed was installed. Our engines use none of them.
    operators = importlib.import_module("deepspeed.git_version_info").installed_ops
    built = ", ".join(name for name, installed in operators.items() if installed) or "none"
    return Finding("", "ok", f"a ZeRO-1 step works; compiled operators: {built} (none is needed)")
