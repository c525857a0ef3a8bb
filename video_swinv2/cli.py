"""The verbs of `video-swinv2`: parse, call one function of one room, print."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from video_swinv2 import __version__
from video_swinv2.command import add_verb, run_verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb of the toolkit."""
    return run_verb(make_parser(), arguments)


def make_parser() -> argparse.ArgumentParser:
    """The command line: verbs, their arguments, an example for each."""
    parser = argparse.ArgumentParser(
        prog="video-swinv2",
        description="Swin Transformer V2 for video: train, test with many views, predict. Clips are prepared with "
        "`python -m data_prep`.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    # DeepSpeed's launcher puts it before the verb in every process; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    for name, run, text in (
        ("pretrain", _pretrain, "SimMIM on images, frames of videos, or clips"),
        ("train", _train, "supervised training, images or clips"),
    ):
        example = f"torchrun --nproc_per_node 8 -m video_swinv2 {name} CONFIG.yaml optim.lr=3e-4 out=runs/a"
        verb = add_verb(verbs, name, run, text, example)
        verb.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")

    example = "video-swinv2 test runs/a/model.safetensors data/k400 --protocol videoswin-4x3 --out runs/a/test"
    verb = add_verb(verbs, "test", _test, "multi-view accuracy with a report", example)
    verb.add_argument("model", type=Path, metavar="MODEL")
    verb.add_argument("data", type=Path, metavar="DATA")
    verb.add_argument("--protocol", default="videoswin-4x3", help="which views, default %(default)s")
    verb.add_argument("--split", default="test", help="default %(default)s")
    verb.add_argument("--out", type=Path, required=True, help="folder for scores, result.json and report.html")
    verb.add_argument("--json", action="store_true", help="print the whole result as JSON")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.frame_stride=4")

    verb = add_verb(
        verbs, "report", _report, "write the report again from saved scores", "video-swinv2 report runs/a/test"
    )
    verb.add_argument("folders", type=Path, nargs="+", metavar="DIR")

    example = "video-swinv2 predict runs/a/model.safetensors clip.mp4 folder/ --top 3"
    verb = add_verb(verbs, "predict", _predict, "the likeliest classes of files and folders", example)
    verb.add_argument("model", type=Path, metavar="MODEL")
    verb.add_argument("paths", type=Path, nargs="+", metavar="FILE|DIR")
    verb.add_argument("--top", type=int, default=5, help="answers per file, default %(default)s")
    verb.add_argument("--protocol", default="videoswin-4x3", help="which views, default %(default)s")
    verb.add_argument("--json", action="store_true", help="print JSON")

    example = "video-swinv2 demo --out runs/demo"
    verb = add_verb(verbs, "demo", _demo, "the whole path on generated clips, in minutes on a laptop", example)
    verb.add_argument("--out", type=Path, default=Path("runs/demo"), help="default %(default)s")
    return parser


def _pretrain(options: argparse.Namespace) -> None:
    from video_swinv2.config import load_config
    from video_swinv2.training.loop import run
    from video_swinv2.training.tasks import Pretraining

    run(load_config(options.config, options.overrides), Pretraining)


def _train(options: argparse.Namespace) -> None:
    from video_swinv2.config import load_config
    from video_swinv2.training.loop import run
    from video_swinv2.training.tasks import Classification

    run(load_config(options.config, options.overrides), Classification)


def _test(options: argparse.Namespace) -> None:
    from video_swinv2.evaluation.testing import parse_overrides, run_test, summary

    overrides = parse_overrides(options.overrides)
    result = run_test(
        options.model,
        options.data,
        protocol=options.protocol,
        split=options.split,
        out=options.out,
        overrides=overrides,
    )
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result, indent=1) if options.json else summary(result, options.out))


def _report(options: argparse.Namespace) -> None:
    from video_swinv2.evaluation.report import write_report

    for folder in options.folders:
        print(write_report(folder))


def _predict(options: argparse.Namespace) -> int:
    from video_swinv2.deploy.predict import predict, show

    answers = predict(options.model, options.paths, top=options.top, protocol=options.protocol)
    print(show(answers, as_json=options.json))
    return 1 if any(answer.error for answer in answers) else 0


def _demo(options: argparse.Namespace) -> None:
    from video_swinv2.tools.demo import run_demo

    run_demo(options.out)
