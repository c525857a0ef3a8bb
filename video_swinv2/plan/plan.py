"""What a training run will take before it is started: memory of a device, work, steps, files, hours.

Weights, gradients and moments follow from the engine (`states.py`), activations from a micro-batch that goes through
the model without memory (`activations.py`); how fast this machine reads and computes is measured (`rates.py`).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from video_swinv2.config import Config
from video_swinv2.data.datasets import labelled, unlabelled
from video_swinv2.data.index import Member
from video_swinv2.data.loading import plan_batch
from video_swinv2.data.manifest import Entry
from video_swinv2.data.mixture import Mixture
from video_swinv2.engine.optimizer import freeze, linear_rule, parameter_groups
from video_swinv2.errors import UsageError
from video_swinv2.memory import free_memory_bytes
from video_swinv2.models.simmim import SimMIM
from video_swinv2.plan.activations import choose_backends, count_giga_macs, measure_pass, without_memory
from video_swinv2.plan.rates import ReadRate, device_speed, read_rate
from video_swinv2.plan.states import NUMBER, States, count, moments_of, states_of
from video_swinv2.training.flops import training_flops
from video_swinv2.training.tasks.base import build_model
from video_swinv2.training.tasks.simmim import resolved_mask
from video_swinv2.training.throughput import usable_cores

Samples = Sequence[Entry | Member] | Mixture


@dataclass(frozen=True)
class Layer:
    """Parameters that share a learning rate."""

    name: str
    parameters: int
    decayed: int
    """Of these, those with weight decay."""
    lr: float
    """At its peak, after the warm-up."""


@dataclass(frozen=True)
class Pace:
    """What the run needs of time, per step and in all; None where the speed of a device is not known."""

    flops_per_sample: int
    """Forward and backward, and what activation checkpointing computes again."""
    tflops: float | None
    """That a device is taken to reach."""
    step_seconds: float | None
    hours: float | None
    """Of training alone: validation, checkpoints and waiting for samples come on top."""
    samples_per_second: float | None
    """That each process has to be given."""
    workers: int
    read: ReadRate | None
    """By one core here; None where it was not measured."""

    @property
    def workers_needed(self) -> int | None:
        """Decoding processes per training process that keep up, on cores like one of these."""
        if self.samples_per_second is None or self.read is None:
            return None
        return math.ceil(self.samples_per_second / self.read.per_second)


@dataclass(frozen=True)
class Plan:
    """Bytes are per device. `steps` and `samples` are None where neither the data nor its size is known."""

    model: str
    device: str
    parameters: int
    trained: int
    giga_macs: float
    """Multiply-accumulates of one sample's forward pass, in 10^9."""
    backends: tuple[str, ...]
    """Attention of each stage."""
    engine: str
    processes: int
    batch: int
    micro_batch: int
    accumulation: int
    samples: int | None
    """Of an epoch, each of `augment.repeats` counted."""
    steps_per_epoch: float | None
    steps: int | None
    layers: tuple[Layer, ...]
    states: States
    activations: int
    """The most that forward and backward of a micro-batch hold at once beside all the others."""
    moments: dict[str, int]
    """Bytes on the device at the fullest moments of a step."""
    checkpoint: int
    """Bytes of one on disk; the first process holds as much in host memory while it is written."""
    files: int
    """Bytes of all that a run keeps on disk: checkpoints, one being written, two model files."""
    pace: Pace

    @property
    def peak(self) -> int:
        """The most a device holds at once."""
        return max(self.moments.values())


def make_plan(
    config: Config,
    *,
    processes: int = 1,
    samples: int | None = None,
    classes: int | None = None,
    pretraining: bool = False,
    tflops: float | None = None,
    measuring: bool = False,
) -> Plan:
    """The plan of `train` (or `pretrain`) with this configuration; `samples` and `classes` where the data is elsewhere.

    tflops: what a device reaches in training, as `bench train` measures it. With `measuring` this machine's reading
    and, without `tflops`, computing are tried for some seconds. `engine.device: auto` is planned as a GPU. UsageError
    for a configuration that could not be run.
    """
    if processes < 1:
        raise UsageError(f"--processes {processes}: give 1 or more")
    if config.engine.engine == "plain" and processes > 1:
        raise UsageError("engine: plain runs in one process; leave --processes away or use engine.engine=deepspeed")
    here, samples, classes = _data(config, samples, classes, pretraining)
    batch = plan_batch(config.optim.batch, config.optim.micro_batch, processes, config.augment.repeats)
    with torch.device("meta"):
        encoder = build_model(config, 0 if pretraining else classes)
        if pretraining:
            config = dataclasses.replace(config, mask=resolved_mask(config, encoder))
        module: nn.Module = SimMIM(encoder, config.mask.unit) if pretraining else encoder
    freeze(encoder, config.optim.frozen_stages)
    layers, sizes = _layers(module, encoder.depths, config)
    device = "cpu" if config.engine.device == "cpu" else "cuda"
    flops = training_flops(encoder, frozen_stages=config.optim.frozen_stages, pretraining=pretraining)
    backends = choose_backends(encoder, device)
    with without_memory(module):
        giga_macs = count_giga_macs(module, config)
        passed = measure_pass(module, config, device, batch.micro)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    counts = count(sizes, parameters, processes, batch.accumulation)
    states = states_of(config.engine, counts, ema=config.optim.ema > 0, device=device)
    steps = None if samples is None else max(1, round(config.optim.epochs * samples / batch.batch))
    checkpoint = NUMBER * (parameters + (3 if config.optim.ema else 2) * counts.trained)
    recomputed = 2e9 * giga_macs * min(config.model.checkpoint_blocks / sum(encoder.depths), 1)
    share = batch.batch // processes
    return Plan(
        model=encoder.name,
        device=device,
        parameters=parameters,
        trained=counts.trained,
        giga_macs=giga_macs,
        backends=backends,
        engine=_engine(config),
        processes=processes,
        batch=batch.batch,
        micro_batch=batch.micro,
        accumulation=batch.accumulation,
        samples=samples,
        steps_per_epoch=None if samples is None else samples / batch.batch,
        steps=steps,
        layers=layers,
        states=states,
        activations=passed.activations,
        moments=moments_of(states, passed, config.engine, counts, device),
        checkpoint=checkpoint,
        files=checkpoint * (config.keep_checkpoints + 1) + 2 * NUMBER * parameters,
        pace=_pace(config, device, processes, int(flops + recomputed), share, steps, here, tflops, measuring),
    )


def _data(
    config: Config, samples: int | None, classes: int | None, pretraining: bool
) -> tuple[Samples | None, int | None, int]:
    """The entries if the data is here; samples and classes as given, else counted, else unknown and Kinetics' 400."""
    # Of a pattern of shards (name-{000..146}.tar) the folder.
    here = all((Path(source).parent if "{" in str(source) else Path(source)).exists() for source in config.data.source)
    repeats = config.augment.repeats
    entries: Samples | None = None
    if here and pretraining:
        entries = unlabelled(config.data, validation=False, repeats=repeats)
        samples = len(entries) if samples is None else samples * repeats
    elif here:
        manifest = labelled(config.data, config.data.train_split)
        entries = manifest.entries
        samples = repeats * (len(entries) if samples is None else samples)
        classes = len(manifest.classes) if classes is None else classes
    elif samples is not None:
        samples *= repeats
    return entries, samples, 400 if classes is None else classes


def _layers(module: nn.Module, depths: Sequence[int], config: Config) -> tuple[tuple[Layer, ...], list[list[int]]]:
    """What shares a learning rate, shallow to deep, and the sizes of the parameters in each optimizer group."""
    optim = config.optim
    groups = parameter_groups(
        module,
        depths,
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
        backbone_lr=optim.backbone_lr,
    )
    sizes = [[parameter.numel() for parameter in group["params"]] for group in groups]
    found: dict[str, Layer] = {}
    for group, numbers in zip(groups, sizes, strict=True):
        decayed = not group["name"].endswith("_no_decay")
        name = group["name"].removesuffix("_decay").removesuffix("_no")
        before = found.get(name, Layer(name, 0, 0, optim.lr * linear_rule(optim) * group["lr_scale"]))
        total = sum(numbers)
        found[name] = dataclasses.replace(
            before, parameters=before.parameters + total, decayed=before.decayed + decayed * total
        )
    return tuple(found.values()), sizes


def _engine(config: Config) -> str:
    engine = config.engine
    name = "plain PyTorch" if engine.engine == "plain" else f"DeepSpeed ZeRO-{engine.zero_stage}"
    offloads = [("optimizer", engine.offload_optimizer), ("weights", engine.offload_parameters)]
    away = "".join(f", {what} offloaded to {where}" for what, where in offloads if where != "none")
    return f"{name}, {engine.precision}{away}"


def _pace(
    config: Config,
    device: str,
    processes: int,
    flops: int,
    share: int,
    steps: int | None,
    entries: Samples | None,
    tflops: float | None,
    measuring: bool,
) -> Pace:
    speed = None if tflops is None else 1e12 * tflops
    if speed is None and measuring:
        speed = device_speed(device, config.engine.precision, processes)
    seconds = None if speed is None else flops * share / speed
    return Pace(
        flops_per_sample=flops,
        tflops=None if speed is None else speed / 1e12,
        step_seconds=seconds,
        hours=None if seconds is None or steps is None else seconds * steps / 3600,
        samples_per_second=None if seconds is None else share / seconds / config.augment.repeats,
        workers=config.data.workers,
        read=read_rate(config, entries) if measuring else None,
    )


def shortfalls(plan: Plan, config: Config, memory: int | None) -> list[str]:
    """What will not fit, each with what to do about it; `memory` is that of a device, bytes, where it is known."""
    found = []
    if memory is not None and plan.peak > memory:
        found.append(f"memory: {plan.peak / 1e9:.1f} GB do not fit {memory / 1e9:.1f} GB; {_smaller(plan, config)}")
    folder = next(path for path in (Path(config.out).absolute(), *Path(config.out).absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if plan.files > free:
        found.append(
            f"disk: {plan.files / 1e9:.1f} GB of checkpoints and model files do not fit the {free / 1e9:.1f} GB free "
            f"in {folder}; choose another out, or fewer keep_checkpoints"
        )
    pace = plan.pace
    needed = pace.workers_needed
    if needed is not None and needed > pace.workers:
        mend = f"data.workers={needed}"
        if needed * plan.processes > usable_cores():
            mend += f" ({usable_cores()} cores here, for all processes), smaller prepared clips or augment.repeats=2"
        found.append(f"reading: {pace.workers} workers keep a device waiting; use {mend}")
    return found


def _smaller(plan: Plan, config: Config) -> str:
    """What makes the largest part smaller."""
    if plan.activations < plan.peak / 2:
        if config.engine.engine == "plain" or plan.processes == 1:
            return "use more devices with engine.engine=deepspeed engine.zero_stage=3, or engine.offload_optimizer=cpu"
        return "use engine.zero_stage=3, more --processes, or engine.offload_optimizer=cpu"
    if plan.micro_batch > 1:
        return f"lower optim.micro_batch from {plan.micro_batch} (steps stay the same) or raise model.checkpoint_blocks"
    return "raise model.checkpoint_blocks, or make data.frames or data.image_size smaller"


def memory_here(plan: Plan) -> int | None:
    """Bytes of a device of the planned kind on this machine, for each process its share; None where there is none."""
    if plan.device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    free = free_memory_bytes()
    return None if free is None else free // plan.processes
