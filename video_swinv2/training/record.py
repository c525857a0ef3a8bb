"""What a run records about itself: config.yaml, run.json with versions and git state, and the table at its end."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from video_swinv2.config import Config, OptimConfig, to_yaml
from video_swinv2.data.loading import BatchPlan
from video_swinv2.distributed.devices import computing_precision
from video_swinv2.distributed.world import World
from video_swinv2.engine.optimizer import linear_scaling
from video_swinv2.files import atomic_write, write_json
from video_swinv2.progress import duration_text
from video_swinv2.report.training_run import metric_text
from video_swinv2.training.best import metrics_text

MAX_TITLE = 24  # characters, to leave room for figures on a line of 80
# Packages whose version can change a result.
PACKAGES = ("video-swinv2", "torch", "torchvision", "deepspeed", "av", "pytorchvideo", "numpy", "scikit-learn")


def write_record(folder: Path, config: Config, record: Mapping[str, Any]) -> None:
    """Write config.yaml and run.json, replacing older ones.

    run.json holds `record`, the environment (git state, package versions) and the config once more, so that this one
    file describes the run. Each file is written atomically, so a kill leaves the old or the new one, never half of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = to_yaml(config)
    with atomic_write(folder / "config.yaml") as part:
        part.write_text(text, encoding="utf-8")
    # Read back from the text, so that run.json and config.yaml hold the same plain values.
    environment = {"git": git_state(), "versions": package_versions(), "config": yaml.safe_load(text)}
    write_json(folder / "run.json", {**record, **environment})


def package_versions() -> dict[str, str]:
    """The installed version of Python and of each of PACKAGES, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def arithmetic(world: World, precision: str) -> dict[str, str]:
    """What decides how this run's sums are rounded, by name. A checkpoint records it, for `arithmetic_changes`.

    precision: the setting `engine.precision`; of `auto`, what it stands for on this device is recorded.
    """
    on_gpu = world.device.type == "cuda"
    found = {
        "processes": str(world.size),
        "device": torch.cuda.get_device_name(world.device) if on_gpu else "CPU",
        "precision": computing_precision(precision, world.device),
        "torch": torch.__version__,
    }
    if not on_gpu:  # on a GPU the CPU computes nothing but the samples, each in one worker with one thread
        found |= {"threads": str(torch.get_num_threads()), "instructions": torch.backends.cpu.get_cpu_capability()}
    return found


def arithmetic_changes(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """One line that says which of the values of `arithmetic` differ from the checkpoint's; "" if none does.

    then: empty for a checkpoint that was written before these values were recorded, for which nothing can be said.
    """
    changed = [
        f"{name} {then.get(name, 'none')} then, {now.get(name, 'none')} now"
        for name in {**then, **now}
        if then and then.get(name) != now.get(name)
    ]
    if not changed:
        return ""
    return f"the run goes on with other rounding ({'; '.join(changed)}): losses will not repeat bit for bit"


def git_state() -> str:
    """The commit of the running code, with `-dirty` if tracked files were changed; "" outside a git checkout."""
    try:
        # In the folder of this file: the current folder may belong to another repository.
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def describe_batch(config: Config, plan: BatchPlan) -> str:
    """One line that shows the global batch as processes x micro-batch x accumulation."""
    # With repeats a micro-batch is described as clips x repeats, since that is how it is read.
    repeats, micro_batch = config.augment.repeats, f"{plan.micro} samples"
    if repeats > 1:
        micro_batch = f"{plan.micro // repeats} clips x {repeats} repeats"
    return f"batch: {plan.batch} = {plan.world} processes x {micro_batch} x {plan.accumulation} accumulated"


def describe_learning_rate(optim: OptimConfig) -> str:
    """One line with the peak learning rate and how it was scaled to the batch, if it was."""
    if not optim.lr_batch:
        return f"peak learning rate {optim.lr:g}, as configured for this batch"
    scaled = f"optim.lr {optim.lr:g} x batch {optim.batch} / optim.lr_batch {optim.lr_batch}"
    return f"peak learning rate {optim.lr * linear_scaling(optim):g} = {scaled} (linear rule)"


def run_title(folder: Path) -> str:
    """What tells a run apart from others on one line: the end of its folder's path, such as `kinetics400/tiny`."""
    title = "/".join(folder.parts[-2:])
    return title if len(title) <= MAX_TITLE else f"...{title[3 - MAX_TITLE :]}"


def finished_line(config: Config, step: int, steps: int) -> str:
    """One line for a run that has nothing left to do: at which step it finished, and the setting with which it goes on.

    step: the last one of the run, of `steps`. It is less if the run has ended early.
    """
    if step < steps:
        fix = f"to go on, raise or omit early_stop_epochs, now {config.early_stop_epochs:g}"
    else:
        # The schedule of the learning rate spans the run, so it is another one in a longer run.
        fix = f"to go on, raise optim.epochs, now {config.optim.epochs:g}, and add --accept-changes"
    return f"{config.out}: finished at step {step} of {steps}; {fix}; for a new run, choose another out"


def end_table(folder: Path, record: Mapping[str, Any], last: Mapping[str, float]) -> list[str]:
    """The outcome of a finished run as lines of text.

    record: the contents of run.json. last: the metrics of the last validation, empty without a validation split.
    """
    speed = record["speed"]
    # Best and last validation, then costs, then faults, with the file to look into if there were any.
    rows = [("last", metrics_text(last))]
    if record["best"] is not None:
        best = metric_text(record["best_metric"], record["best"])
        rows.insert(0, ("best", f"{best} at step {record['best_step']}"))
    waiting = f"{100 * speed['data_wait']:.0f}"
    used = f" ({100 * speed['utilisation']:.0f} % of its peak)" if speed.get("utilisation") else ""
    alone, together = (duration_text(3600 * record[key]) for key in ("hours", "device_hours"))
    rows += [
        ("time", f"{alone}, {together} of device time on {record['device']}"),
        ("speed", f"{speed['samples_per_second']:.1f} samples/s, {waiting} % of the time waiting for data"),
        ("work", f"{speed['tflops_per_device']:.3g} TFLOP/s per device{used}"),
        ("memory", f"{speed['memory_gb']:.2f} GB per process at the peak"),
        ("skipped steps", f"{record['skipped_steps']}" + (", see skipped.jsonl" if record["skipped_steps"] else "")),
        ("broken files", f"{len(record['broken_files'])}" + (", see run.json" if record["broken_files"] else "")),
        ("slowest file", "{:.2f} s {}".format(*record["slowest_file"])),
    ]
    ended = " (stopped early)" if record["stopped_early"] else ""
    lines = [f"{folder}: done at step {record['step']} of {record['steps']}{ended}"]
    return lines + [f"  {name:14s}{text}" for name, text in rows]
