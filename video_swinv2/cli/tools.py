"""Command-line verbs for getting started: `doctor` checks a machine, `demo` runs every step on generated clips."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from video_swinv2.command import Verbs, add_verb, whole_number
from video_swinv2.files import json_text


def add_tools_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add `doctor` and `demo`."""
    text = "check whether this machine is fit for training, and how to fix what is not"
    example = "video-swinv2 doctor CONFIG.yaml data.workers=12 --processes 8"
    verb = add_verb(verbs, "doctor", _doctor, text, example)
    help_text = "YAML file of the run to size the checks for (default: the recipe for Kinetics-400 with SwinV2-B)"
    verb.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help=help_text)
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="override values of the file")
    verb.add_argument(
        "--processes",
        type=whole_number(),
        metavar="N",
        help="processes of the run on this machine (default: one per GPU)",
    )
    verb.add_argument("--folder", type=Path, help="folder that will hold the runs (default: the CONFIG's out, or runs)")
    verb.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what to check, all GPUs or the CPU (default: %(default)s)",
    )
    verb.add_argument("--json", action="store_true", help="print JSON")

    text = "prepare, train and test on generated clips, in minutes on a laptop"
    verb = add_verb(verbs, "demo", _demo, text, "video-swinv2 demo --out runs/demo")
    verb.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to (default: %(default)s)")


def _doctor(options: argparse.Namespace) -> int:
    """Run `doctor`. The exit code is 1 if there is a fault; notes do not count."""
    from video_swinv2.config import load_config
    from video_swinv2.distributed.devices import choose_device
    from video_swinv2.tools.doctor import plan_run, run_doctor
    from video_swinv2.tools.findings import findings_text

    config = load_config(options.config, options.overrides) if options.config else None
    device_type = choose_device(options.device).type
    run = plan_run(config, options.processes, device_type)
    findings = run_doctor(options.folder or Path(config.out if config else "runs"), run, device_type)
    if options.json:
        print(json_text([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print(findings_text(findings))
    return int(any(finding.state == "fault" for finding in findings))


def _demo(options: argparse.Namespace) -> None:
    from video_swinv2.tools.demo import run_demo

    run_demo(options.out)
