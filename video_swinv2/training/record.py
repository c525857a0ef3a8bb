"""What a run leaves behind in words: run.json, the table at its end, and the next command to run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from video_swinv2.config import Config, OptimConfig, to_yaml
from video_swinv2.data.loading import BatchPlan
from video_swinv2.distributed.world import World
from video_swinv2.engine.optimizer import linear_rule
from video_swinv2.files import atomic_write, write_json
from video_swinv2.training.metrics import git_state, versions
from video_swinv2.training.tasks.base import Task
from video_swinv2.training.tasks.simmim import Pretraining
from video_swinv2.training.throughput import peak_memory, peak_tflops, training_flops, verdict

ADVISE_EVERY_SECONDS = 600.0


class Pace:
    """How fast the steps of this process were, since the run was started or resumed, and what held them up."""

    def __init__(self, task: Task, config: Config, world: World) -> None:
        self._task, self._config, self._world = task, config, world
        frozen = config.optim.frozen_stages
        flops = training_flops(task.encoder, frozen_stages=frozen, pretraining=isinstance(task, Pretraining))
        self._teraflop = flops / 1e12 / world.size
        self._peak = peak_tflops(world, config.engine.precision)
        self._samples = self._seconds = self._waited = 0.0
        self._last: dict[str, float] = {}
        self._windows = 0
        self._advised = -ADVISE_EVERY_SECONDS

    def add(self, samples: float, seconds: float, waited: float) -> dict[str, float]:
        """Count a window of so many samples of all processes; its figures."""
        self._windows += 1
        self._samples, self._seconds, self._waited = (
            self._samples + samples,
            self._seconds + seconds,
            self._waited + waited,
        )
        self._last = self._figures(samples, seconds, waited)
        return self._last

    def so_far(self) -> dict[str, float]:
        """The figures of all windows together."""
        return self._figures(self._samples, self._seconds, self._waited)

    def advice(self, slowest: tuple[float, str]) -> str | None:
        """A verdict on the loader after a window that it starved, now and then; not on the first: workers start."""
        if self._windows < 2 or self._seconds - self._advised < ADVISE_EVERY_SECONDS:
            return None
        text = verdict(self._config, self._last["data_wait"], slowest)
        if text:
            self._advised = self._seconds
        return text

    def _figures(self, samples: float, seconds: float, waited: float) -> dict[str, float]:
        rate = samples / seconds if seconds else 0.0
        figures = {
            "samples_per_second": rate,
            "data_wait": min(waited / seconds, 1.0) if seconds else 0.0,
            "tflops_per_device": rate * self._teraflop,
            "memory_gb": peak_memory(self._world),
        }
        if self._peak:
            figures["utilisation"] = figures["tflops_per_device"] / self._peak
        return figures


def batch_words(config: Config, plan: BatchPlan) -> str:
    """The global batch as the product it is."""
    repeats, pieces = config.augment.repeats, f"{plan.micro} samples"
    if repeats > 1:
        pieces = f"{plan.micro // repeats} clips x {repeats} repeats"
    return f"batch: {plan.batch} = {plan.world} processes x {pieces} x {plan.accumulation} accumulated"


def rate_words(optim: OptimConfig) -> str:
    """The highest learning rate, and by what rule it was scaled."""
    if not optim.lr_batch:
        return f"highest learning rate {optim.lr:g}, as given for this batch"
    scaled = f"optim.lr {optim.lr:g} x batch {optim.batch} / optim.lr_batch {optim.lr_batch}"
    return f"highest learning rate {optim.lr * linear_rule(optim):g} = {scaled} (linear rule)"


def write_record(folder: Path, config: Config, record: Mapping[str, Any]) -> None:
    """config.yaml and run.json, each complete or not at all: what this run is, and what it has cost so far."""
    folder.mkdir(parents=True, exist_ok=True)
    text = to_yaml(config)
    with atomic_write(folder / "config.yaml") as part:
        part.write_text(text, encoding="utf-8")
    outside = {"git": git_state(), "versions": versions(), "config": yaml.safe_load(text)}
    write_json(folder / "run.json", {**record, **outside})


def table(folder: Path, record: Mapping[str, Any], last: Mapping[str, float]) -> str:
    """What came of it, for the end of a run; `last` are the measures of the last validation."""
    speed = record["speed"]
    rows = [("last", ", ".join(f"{key} {value:.4f}" for key, value in last.items()) or "no validation split")]
    if record["best"] is not None:
        rows.insert(0, ("best", f"{record['best_metric']} {record['best']:.4f} at step {record['best_step']}"))
    used = f" ({speed['utilisation']:.0%} of its peak)" if speed.get("utilisation") else ""
    rows += [
        ("time", f"{record['hours']:.2f} h, {record['device_hours']:.2f} device hours on {record['device']}"),
        ("pace", f"{speed['samples_per_second']:.1f} samples/s, {speed['data_wait']:.0%} of the time waiting for them"),
        ("work", f"{speed['tflops_per_device']:.3g} TFLOP/s per device{used}"),
        ("memory", f"{speed['memory_gb']:.2f} GB per process at most"),
        ("skipped steps", f"{record['skipped_steps']}" + (", see skipped.jsonl" if record["skipped_steps"] else "")),
        ("broken files", f"{len(record['broken_files'])}" + (", see run.json" if record["broken_files"] else "")),
        ("slowest file", "{:.2f} s {}".format(*record["slowest_file"])),
    ]
    ended = " (stopped early)" if record["stopped_early"] else ""
    lines = [f"{folder}: done at step {record['step']} of {record['steps']}{ended}"]
    return "\n".join(lines + [f"  {name:14s}{text}" for name, text in rows])


def next_command(folder: Path, config: Config, pretraining: bool) -> str:
    """What a user runs after this."""
    model = shlex.quote(str(folder / "model.safetensors"))
    if pretraining:
        return f"next: video-swinv2 train CONFIG.yaml init={model}"
    protocol = "center-1x1" if config.data.frames is None else "videoswin-4x3"
    data, out = shlex.quote(str(config.data.source[0])), shlex.quote(str(folder / "test"))
    return f"next: video-swinv2 test {model} {data} --protocol {protocol} --out {out}"
