"""Command-line verbs for getting started: `doctor` checks a machine, `demo` runs every step on generated clips."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from video_swinv2.command import Verbs, add_verb


def add_tools_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add `doctor` and `demo`."""
    text = "check whether this machine is fit for training, and how to fix what is not"
    verb = add_verb(verbs, "doctor", _doctor, text, "video-swinv2 doctor --folder /scratch/runs")
    verb.add_argument(
        "--folder", type=Path, default=Path("runs"), help="folder that will hold the runs (default: %(default)s)"
    )
    verb.add_argument("--json", action="store_true", help="print JSON")

    text = "prepare, train and test on generated clips, in minutes on a laptop"
    verb = add_verb(verbs, "demo", _demo, text, "video-swinv2 demo --out runs/demo")
    verb.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to (default: %(default)s)")


def _doctor(options: argparse.Namespace) -> int:
    """Run `doctor`. The exit code is 1 if there is a fault; notes do not count."""
    from video_swinv2.tools.doctor import findings_text, run_doctor

    findings = run_doctor(options.folder)
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print(findings_text(findings))
    return int(any(finding.state == "fault" for finding in findings))


def _demo(options: argparse.Namespace) -> None:
    from video_swinv2.tools.demo import run_demo

    run_demo(options.out)
