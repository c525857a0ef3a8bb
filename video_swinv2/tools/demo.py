"""The demo: the whole path on generated clips, from pre-training to a test report, small enough for a laptop.

The steps are: generate clips, pre-train on single frames, inflate to a clip model, fine-tune, test, report. Each step
is a command that a user could type, run in a process of its own.

The classes of the clips are motions, and each motion has its time reversal as another class. A model that ignores the
order of the frames can therefore get at most half of the clips right. To show that the order is used, each model is
also tested on the same frames shuffled in time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_swinv2.errors import UserError
from video_swinv2.files import create_folder, write_json
from video_swinv2.records import read_json

PROTOCOL = "videoswin-4x3"
PROCESSES = 2  # DeepSpeed processes in fine-tuning
ORDERS = ("in-order", "shuffled")  # values of data.frame_order


@dataclass(frozen=True)
class Trial:
    """One way to initialise the clip model for fine-tuning."""

    key: str
    """For file names and result.json."""
    title: str
    settings: tuple[str, ...]
    """Settings for `train`, as KEY=VALUE."""


def run_demo(out: Path) -> None:
    """Run all steps, print a table and write OUT/result.json.

    If it was interrupted, it can be run again: each command finds what it has finished before and continues from there.
    Raises UserError if a step fails.
    """
    started = time.monotonic()
    create_folder(out, "--out")
    data, pretrained = out / "data", out / "pretrain" / "model.safetensors"
    if not (data / "dataset.json").is_file():
        _step("generated clips: 8 motions, 2,720 clips", "-m", "data_prep", "synth", str(data))
    settings = [f"data.source={data}", f"out={pretrained.parent}"]
    _step("SimMIM on single frames", *_verb("pretrain"), str(recipe("demo/pretrain.yaml")), *settings)
    trials = [
        Trial("scratch", "from scratch", ("init=scratch",)),
        # Inflated weights are symmetric in time. Without noise to break the symmetry, four epochs are too few to learn
        # to tell a motion from its reversal (docs/results/demo.md).
        Trial("simmim", "from SimMIM", (f"init={pretrained}", "init_time_noise=2")),
    ]
    results: dict[str, Any] = {}
    for trial in trials:
        results[trial.key] = _finetune_and_test(trial, data, out)
    # Chosen by the accuracy on the validation split, because the test split must not influence any choice.
    chosen = max(results, key=lambda key: float(results[key]["val_top1"]))
    best = results[chosen]
    report = out / f"test-{chosen}-in-order" / "report.html"
    minutes = (time.monotonic() - started) / 60
    write_json(
        out / "result.json",
        {
            "chosen": chosen,
            "top1": best["in-order"]["top1"],
            "top1_interval": best["in-order"]["top1_interval"],
            "top1_shuffled": best["shuffled"]["top1"],
            "protocol": PROTOCOL,
            "results": results,
            "report": str(report),
            "minutes": minutes,
        },
    )
    print(_table(trials, results))
    print(f"\n{minutes:.1f} minutes; report: {report}")


def _finetune_and_test(trial: Trial, data: Path, out: Path) -> dict[str, Any]:
    """Fine-tune one trial and test it. Returns the results by order of frames, and the best validation accuracy."""
    folder = out / f"finetune-{trial.key}"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES))
    settings = [f"data.source={data}", f"out={folder}", *trial.settings]
    title = f"fine-tuning {trial.title}, {PROCESSES} DeepSpeed processes"
    _step(title, *launcher, *_verb("train"), str(recipe("demo/finetune.yaml")), *settings)
    result: dict[str, Any] = {order: _test(folder, data, out / f"test-{trial.key}-{order}", order) for order in ORDERS}
    return result | {"val_top1": read_json(folder / "run.json")["best"]}


def recipe(name: str) -> Path:
    """The path of the recipe `name` below `configs/`. Raises UserError if it is missing."""
    package = Path(__file__).resolve().parents[1]
    # An installed package contains the recipes; in the repository they are next to the package.
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"configs/{name}: not found; install the package again")


def _verb(name: str) -> tuple[str, str, str]:
    return "-m", "video_swinv2", name


def _step(title: str, *arguments: str) -> None:
    """Run a Python command in a process of its own. Raises UserError if it fails."""
    # Several processes on the same cores get one thread each, as they would otherwise slow each other down.
    print(f"\n== {title}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in arguments else os.environ
    code = subprocess.run([sys.executable, *arguments], env=environment, check=False).returncode
    if code:
        raise UserError(f"{title}: failed with exit code {code}; see its message above")


def _test(folder: Path, data: Path, out: Path, order: str) -> dict[str, Any]:
    """Test the best model of a run folder with its frames in the given order; returns the main results."""
    model = str(folder / "model.safetensors")
    settings = [f"data.frame_order={order}", "engine.device=cpu"]
    title = f"test of {folder.name}, {PROTOCOL}, frames {order}"
    _step(title, *_verb("test"), model, str(data), "--protocol", PROTOCOL, "--out", str(out), *settings)
    result: dict[str, Any] = read_json(out / "results.json")
    keys = ("top1", "top1_interval", "top5", "mean_class_accuracy", "videos")
    return {key: result[key] for key in keys}


def _table(trials: list[Trial], results: dict[str, Any]) -> str:
    """Top-1 accuracy of each trial, with frames in order and shuffled; the interval is for frames in order."""
    lines = ["", f"{PROTOCOL} top-1 on unseen clips        in order    shuffled in time"]
    for trial in trials:
        orders = [results[trial.key][order] for order in ORDERS]
        in_order, shuffled = (result["top1"] for result in orders)
        low, high = orders[0]["top1_interval"]
        lines.append(f"{trial.title:38s}{in_order:8.1%} {shuffled:12.1%}     95 % interval {low:.1%} to {high:.1%}")
    lines.append(f"chance {1 / 8:.1%}; at most 50 % for a model that ignores the order of frames")
    return "\n".join(lines)
