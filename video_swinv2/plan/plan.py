"""The plan of a training run: what it will need of a device's memory, of work, steps, disk space and hours.

The plan is put together from three sources. The memory of weights, gradients and Adam's moments follows from the engine
(`state_memory.py`). That of activations is found by running a micro-batch without memory (`activation_memory.py`); both
together are the memory of a step (`step_memory.py`). How fast this machine reads and computes is measured
(`machine_speed.py`).
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
from video_swinv2.data.index import AnyEntry
from video_swinv2.data.loading import BatchPlan, plan_batch
from video_swinv2.data.mixture import Mixture
from video_swinv2.data.sources import labelled_manifest, unlabelled_mixture
from video_swinv2.distributed.devices import choose_device
from video_swinv2.engine.optimizer import freeze_stages, linear_scaling, parameter_groups
from video_swinv2.errors import UsageError, UserError
from video_swinv2.models.simmim import SimMIM
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.plan.activation_memory import choose_backends, forward_giga_macs, micro_batch_memory, without_memory
from video_swinv2.plan.loader_memory import LOADERS, loader_bytes
from video_swinv2.plan.machine_speed import ReadingSpeed, measure_reading, training_flops_per_second
from video_swinv2.plan.state_memory import FP32_BYTES, StateMemory, gathering_memory
from video_swinv2.plan.step_memory import MEMORY_SHARE, divisions, largest_fitting, memory_here, plan_step
from video_swinv2.training.cadence import total_steps
from video_swinv2.training.flops import training_flops
from video_swinv2.training.tasks.base import build_model
from video_swinv2.training.tasks.simmim import resolved_mask
from video_swinv2.training.throughput import usable_cores

Samples = Sequence[AnyEntry] | Mixture
KINETICS_CLASSES = 400  # assumed if the data is not on this machine and no number of classes is given


@dataclass(frozen=True)
class RateGroup:
    """The parameters that share a learning rate: one row of the table that `plan` prints."""

    name: str
    parameters: int
    """Number of elements."""
    decayed: int
    """How many of these elements have weight decay."""
    lr: float
    """The peak learning rate, reached after the warm-up."""


@dataclass(frozen=True)
class TimeEstimate:
    """How long a step and the whole run take; values are None if the speed of the device is unknown."""

    flops_per_sample: int
    """Operations of the forward and backward pass, including what activation checkpointing recomputes."""
    tflops: float | None
    """The TFLOP/s that a device is assumed to reach in training."""
    step_seconds: float | None
    hours: float | None
    """Training alone; validation, checkpoints and waiting for samples take additional time."""
    samples_per_second: float | None
    """How many samples the loader of each process has to decode per second."""
    workers: int
    """`data.workers`, per process."""
    read: ReadingSpeed | None
    """The reading speed of one core of this machine; None if it was not measured."""

    @property
    def workers_needed(self) -> int | None:
        """Loader workers that each process needs to keep up with its device, on cores like those of this machine."""
        if self.samples_per_second is None or self.read is None:
            return None
        return math.ceil(self.samples_per_second / self.read.per_second)


@dataclass(frozen=True)
class Plan:
    """A planned run. Bytes are those of one device, unless stated otherwise."""

    model: str
    device: str
    parameters: int
    trained: int
    giga_macs: float
    """Multiply-accumulates of one sample's forward pass, in 10^9."""
    backends: tuple[str, ...]
    """The attention backend of each stage."""
    engine: str
    """The engine in words, with precision and offloading."""
    processes: int
    batch: int
    micro_batch: int
    accumulation: int
    samples: int | None
    """Samples of an epoch, with each repeat of `augment.repeats` counted; None, as are the steps, if unknown."""
    steps_per_epoch: float | None
    steps: int | None
    layers: tuple[RateGroup, ...]
    states: StateMemory
    activations: int
    """Peak bytes of the forward and backward pass of a micro-batch, without the states."""
    process: int
    """Bytes of the process without the model: Python and the libraries. 0 on GPUs, where only tensors are counted."""
    moments: dict[str, int]
    """Bytes at the two peaks of a step, from `step_peaks`. (Adam's moments are something else: part of `states`.)"""
    checkpoint: int
    """Bytes of a checkpoint on disk."""
    checkpoint_host: int
    """Bytes of host memory that the first process holds while a checkpoint is gathered and written."""
    loader: int
    """Shared memory (/dev/shm) that the loaders of one process can fill, in bytes."""
    files: int
    """Peak bytes of the run on disk: the checkpoints that are kept, one that is being written, and two model files."""
    pace: TimeEstimate

    @property
    def peak(self) -> int:
        """The most bytes that a device holds at once: what a run reports as its peak (`peak_memory_gb`)."""
        return max(self.moments.values()) + self.process


def make_plan(
    config: Config,
    *,
    processes: int = 1,
    samples: int | None = None,
    classes: int | None = None,
    pretraining: bool = False,
    tflops: float | None = None,
    memory: int | None = None,
    measuring: bool = False,
) -> Plan:
    """The plan of `train` (`pretraining`: of `pretrain`) with this config.

    samples, classes: the size of the data set, without repeats, in case the data is not on this machine.
    tflops: the TFLOP/s that a device reaches in training, as measured by `bench train`.
    memory: bytes of a device, for the largest micro-batch that fits if the config gives none; by default `memory_here`.
    measuring: measure for a few seconds how fast this machine reads and, unless `tflops` is given, computes.

    `engine.device: auto` is planned as what it is on this machine: a GPU if there is one, or else the CPU. Raises
    UsageError for a config that could not be run.
    """
    if processes < 1:
        raise UsageError(f"--processes {processes}: give 1 or more")
    if config.task in ("segmentation", "detection"):
        raise UsageError(
            f"task: {config.task} cannot be planned yet; start `train` with a small optim.micro_batch, which prints "
            "the memory and the time that a run takes"
        )
    pretraining = pretraining or config.task == "simmim"
    if config.engine.engine == "plain" and processes > 1:
        raise UsageError("engine: plain runs in one process; omit --processes or use engine.engine=deepspeed")
    # The same functions as in `train`, so that a config that `train` refuses is refused here with the same message.
    entries, samples, classes = _data(config, samples, classes, pretraining)
    whole = plan_batch(config.optim.batch, config.optim.micro_batch, processes, config.augment.repeats)
    config, encoder, module = _model_without_memory(config, classes, pretraining)
    layers, sizes = _rate_groups(module, encoder.depths, config)
    device = choose_device("auto").type if config.engine.device == "auto" else config.engine.device
    flops = training_flops(encoder, frozen_stages=config.optim.frozen_stages, pretraining=pretraining)
    backends = choose_backends(encoder, device)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    # From here on the weights of the module are fake tensors; their shapes, and so all counts below, stay the same.
    with without_memory(module):
        giga_macs = forward_giga_macs(module, config)
        memory_of = micro_batch_memory(module, config, device)
        choices = (plan_step(config, sizes, parameters, device, each, memory_of) for each in divisions(config, whole))
        step = largest_fitting(choices, config, memory_here(device, processes) if memory is None else memory)
    batch, counts, states, passed = step.batch, step.counts, step.states, step.passed
    steps = None if samples is None else total_steps(config, samples)
    # All weights, frozen ones included; then both moments and, with optim.ema, the average of the trained weights.
    checkpoint = FP32_BYTES * (parameters + (3 if config.optim.ema else 2) * counts.trained)
    # Recomputed blocks run forward a second time; all blocks are taken to be equally large. Two operations per MAC.
    recomputed = 2e9 * giga_macs * min(config.model.checkpoint_blocks / sum(encoder.depths), 1)
    # FLOP/s of one device: measured, as given, or unknown.
    if tflops is None and measuring:
        speed = training_flops_per_second(device, config.engine.precision, processes)
    else:
        speed = None if tflops is None else 1e12 * tflops
    read = measure_reading(config, entries) if measuring else None
    return Plan(
        model=encoder.name,
        device=device,
        parameters=parameters,
        trained=counts.trained,
        giga_macs=giga_macs,
        backends=backends,
        engine=_describe_engine(config),
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
        process=step.process,
        moments=step.moments,
        checkpoint=checkpoint,
        checkpoint_host=checkpoint + gathering_memory(config.engine, counts),
        loader=LOADERS * loader_bytes(config.data, batch.micro),
        # The checkpoints that are kept and one being written, model.safetensors and last.safetensors.
        files=checkpoint * (config.keep_checkpoints + 1) + 2 * FP32_BYTES * parameters,
        pace=_estimate_time(config, batch, int(flops + recomputed), steps, speed, read),
    )


def _data(
    config: Config, samples: int | None, classes: int | None, pretraining: bool
) -> tuple[Samples | None, int | None, int]:
    """The entries of the data set, None if it is not on this machine, and the numbers of samples and classes.

    Numbers that are not given are counted. Without the data, the number of samples stays None and that of classes is
    that of Kinetics-400. The returned number of samples includes the repeats of `augment.repeats`.
    """
    # A pattern of shards such as name-{000..146}.tar is no path, so its folder is looked for.
    here = all((Path(source).parent if "{" in str(source) else Path(source)).exists() for source in config.data.source)
    repeats = config.augment.repeats
    entries: Samples | None = None
    if here and pretraining:
        entries = unlabelled_mixture(config.data, validation=False, repeats=repeats)
        samples = len(entries) if samples is None else samples * repeats  # the length of a mixture includes repeats
    elif here:
        manifest = labelled_manifest(config.data, config.data.train_split)
        entries = manifest.entries
        samples = repeats * (len(entries) if samples is None else samples)
        classes = len(manifest.classes) if classes is None else classes
    elif samples is not None:
        samples *= repeats
    return entries, samples, KINETICS_CLASSES if classes is None else classes


def _model_without_memory(config: Config, classes: int, pretraining: bool) -> tuple[Config, SwinV2, nn.Module]:
    """The config with its mask resolved, the encoder, and the module that would be trained, both on the meta device."""
    # Parameters on the meta device have shapes and no memory, so even the largest model is built at once.
    with torch.device("meta"):
        encoder = build_model(config, 0 if pretraining else classes)
        if pretraining:
            config = dataclasses.replace(config, mask=resolved_mask(config, encoder))
        module: nn.Module = SimMIM(encoder, config.mask.unit) if pretraining else encoder
    freeze_stages(encoder, config.optim.frozen_stages)
    return config, encoder, module


def _rate_groups(
    module: nn.Module, depths: Sequence[int], config: Config
) -> tuple[tuple[RateGroup, ...], list[list[int]]]:
    """The rows of the table of learning rates, shallow to deep, and the parameter sizes of each optimizer group."""
    optim = config.optim
    groups = parameter_groups(
        module,
        depths,
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
        backbone_lr=optim.backbone_lr,
    )
    sizes = [[parameter.numel() for parameter in group["params"]] for group in groups]
    # For each learning rate the optimizer has two groups, NAME_decay and NAME_no_decay, which become one row NAME. The
    # dict keeps the rows in the order of the groups.
    found: dict[str, RateGroup] = {}
    for group, numbers in zip(groups, sizes, strict=True):
        decayed = not group["name"].endswith("_no_decay")
        name = group["name"].removesuffix("_decay").removesuffix("_no")
        # The peak learning rate of a group: optim.lr, scaled to the batch and by layer decay.
        before = found.get(name, RateGroup(name, 0, 0, optim.lr * linear_scaling(optim) * group["lr_scale"]))
        total = sum(numbers)
        found[name] = dataclasses.replace(
            before, parameters=before.parameters + total, decayed=before.decayed + decayed * total
        )
    return tuple(found.values()), sizes


def _describe_engine(config: Config) -> str:
    """The engine in words, such as "DeepSpeed ZeRO-1, bf16"."""
    engine = config.engine
    name = "plain PyTorch" if engine.engine == "plain" else f"DeepSpeed ZeRO-{engine.zero_stage}"
    offloads = [("optimizer", engine.offload_optimizer), ("weights", engine.offload_parameters)]
    offloaded = "".join(f", {what} offloaded to {where}" for what, where in offloads if where != "none")
    return f"{name}, {engine.precision}{offloaded}"


def _estimate_time(
    config: Config,
    batch: BatchPlan,
    flops_per_sample: int,
    steps: int | None,
    flops_per_second: float | None,
    read: ReadingSpeed | None,
) -> TimeEstimate:
    """The times that follow from the speed of a device, `flops_per_second`; None where it is unknown."""
    share = batch.batch // batch.world  # samples of one process in one step
    seconds = None if flops_per_second is None else flops_per_sample * share / flops_per_second
    return TimeEstimate(
        flops_per_sample=flops_per_sample,
        tflops=None if flops_per_second is None else flops_per_second / 1e12,
        step_seconds=seconds,
        hours=None if seconds is None or steps is None else seconds * steps / 3600,
        # The repeats of a clip are decoded once, so the loader has to read only that fraction of the samples.
        samples_per_second=None if seconds is None else share / seconds / config.augment.repeats,
        workers=config.data.workers,
        read=read,
    )


def shortfalls(plan: Plan, config: Config, memory: int | None) -> list[str]:
    """One line, with its fix, for each thing that does not suffice: memory, samples, disk space, loader workers.

    memory: the size of a device in bytes; None if unknown, and then it is not compared.
    """
    found = []
    if memory is not None and plan.peak > memory:
        found.append(
            f"memory: {plan.peak / 1e9:.1f} GB do not fit into {memory / 1e9:.1f} GB; {_memory_advice(plan, config)}"
        )
    if plan.samples is not None and plan.batch > plan.samples:
        found.append(
            f"batch: a step of {plan.batch} samples holds more than the {plan.samples} of an epoch, so that "
            f"{config.optim.epochs:g} epochs are {plan.steps} steps; lower optim.batch"
        )
    # The run folder may not exist yet: take the nearest existing folder above it.
    folder = next(path for path in (Path(config.out).absolute(), *Path(config.out).absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if plan.files > free:
        found.append(
            f"disk: {plan.files / 1e9:.1f} GB of checkpoints and model files do not fit into the {free / 1e9:.1f} GB "
            f"free in {folder}; choose another out, or fewer keep_checkpoints"
        )
    # The workers of all processes share the cores of a machine, so more workers help only up to that number.
    needed = plan.pace.workers_needed
    if needed is not None and needed > plan.pace.workers:
        fix = f"data.workers={needed}"
        if needed * plan.processes > usable_cores():
            fix += f" ({usable_cores()} cores here, for all processes), smaller prepared clips or augment.repeats=2"
        found.append(f"reading: {plan.pace.workers} workers keep a device waiting; use {fix}")
    return found


def _memory_advice(plan: Plan, config: Config) -> str:
    """How to reduce the largest part of the memory."""
    # States dominate: only partitioning or offloading makes them smaller.
    if plan.activations < (plan.peak - plan.process) / 2:
        if config.engine.engine == "plain" or plan.processes == 1:
            return "use more devices with engine.engine=deepspeed engine.zero_stage=3, or engine.offload_optimizer=cpu"
        return "use engine.zero_stage=3, more --processes, or engine.offload_optimizer=cpu"
    # Activations dominate: smaller micro-batches come first, because they change nothing about the steps.
    if plan.micro_batch > 1:
        return (
            f"lower optim.micro_batch from {plan.micro_batch} (the steps stay the same), or raise "
            "model.checkpoint_blocks"
        )
    return "raise model.checkpoint_blocks, or lower data.frames or data.image_size"


def plan_micro_batch(config: Config, processes: int, *, pretraining: bool = False) -> tuple[int, str]:
    """The default of `optim.micro_batch` for a run of `processes` processes on this machine, and the reason in words.

    It is the largest one that leaves some of the memory free. Raises UserError if none of them does.
    """
    plan = make_plan(config, processes=processes, pretraining=pretraining)
    memory = memory_here(plan.device, processes)
    if memory is None:
        return plan.micro_batch, "all of a process's share of the batch, as the memory of the device is unknown"
    words = f"{plan.peak / 1e9:.1f} GB of the {memory / 1e9:.1f} GB of each process"
    if plan.peak > MEMORY_SHARE * memory:
        raise UserError(
            f"memory: even micro-batches of {plan.micro_batch} need {words}, of which no more than "
            f"{100 * MEMORY_SHARE:.0f} % is planned for; end other programs, raise model.checkpoint_blocks, lower "
            "data.frames or data.image_size, or give optim.micro_batch to try all the same"
        )
    return plan.micro_batch, f"planned: it needs {words}"
