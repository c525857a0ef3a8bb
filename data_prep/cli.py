"""The verbs of `python -m data_prep`: parse, call one function, print. No logic."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from video_swinv2.command import Verbs, add_verb, run_verb
from video_swinv2.errors import UsageError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb of the preparation."""
    return run_verb(make_parser(), arguments)


def make_parser() -> argparse.ArgumentParser:
    """The command line: verbs, their arguments, an example for each."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="Raw clips in, a checked and quickly read data set out."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_synth(verbs)
    _add_prepare(verbs)
    _add_status(verbs)
    _add_split(verbs)
    return parser


def _add_synth(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "make a data set whose classes are motions and nothing else: no single frame tells them apart"
    verb = add_verb(
        verbs, "synth", _synth, text, "python -m data_prep synth data/motions --level hard --train 300 --workers 8"
    )
    verb.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    verb.add_argument(
        "--level", choices=("easy", "hard"), default="easy", help="easy: bright on dim; default %(default)s"
    )
    for split, count in (("train", 300), ("val", 20), ("test", 20)):
        verb.add_argument(
            f"--{split}", type=int, default=count, metavar="N", help="clips per class, default %(default)s"
        )
    verb.add_argument("--size", type=int, default=64, metavar="PIXELS", help="height and width, default %(default)s")
    verb.add_argument("--frames", type=int, default=16, metavar="N", help="default %(default)s")
    verb.add_argument("--seed", type=int, default=0, help="default %(default)s")
    _add_workers(verb)


def _add_prepare(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "turn raw videos into checked, small, quickly read ones; run again to go on after an interruption"
    verb = add_verb(
        verbs,
        "prepare",
        _prepare,
        text,
        "python -m data_prep prepare raw/k400 data/k400 --annotations k400_val.csv --workers 16",
    )
    verb.add_argument("source", type=Path, metavar="SRC", help="class folders, a folder of lists, a list or a CSV")
    verb.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    verb.add_argument("--annotations", type=Path, metavar="CSV|TXT", help="list whose paths are relative to SRC")
    verb.add_argument("--short-side", type=int, default=320, metavar="PIXELS", help="at most, default %(default)s")
    verb.add_argument("--gop", type=int, default=16, metavar="FRAMES", help="from key frame to key frame, default 16")
    verb.add_argument("--name", help="of the data set, default that of SRC")
    text = "exit with 1 when more of the videos failed, default %(default)s"
    verb.add_argument("--max-fail-rate", type=float, default=0.05, metavar="SHARE", help=text)
    verb.add_argument("--retry-failed", action="store_true", help="try failed videos again")
    _add_workers(verb)


def _add_status(verbs: Verbs[argparse.ArgumentParser]) -> None:
    verb = add_verb(
        verbs,
        "status",
        _status,
        "what a preparation has come to, also while it runs",
        "python -m data_prep status data/k400",
    )
    verb.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _add_split(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "set aside a share of each class of train as val; files stay, lists change"
    verb = add_verb(verbs, "split", _split, text, "python -m data_prep split data/mine --val 0.1")
    verb.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    verb.add_argument("--val", type=float, required=True, metavar="SHARE", help="for instance 0.1")
    verb.add_argument("--seed", type=int, default=0, help="default %(default)s")


def _add_workers(verb: argparse.ArgumentParser) -> None:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    verb.add_argument("--workers", type=_positive, default=count, metavar="N", help="processes, default one a core")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _synth(options: argparse.Namespace) -> None:
    from data_prep.synth import CLASSES, synthesise

    counts = {"train": options.train, "val": options.val, "test": options.test}
    made = synthesise(
        options.out.absolute(),
        counts,
        level=options.level,
        size=options.size,
        frames=options.frames,
        seed=options.seed,
        workers=options.workers,
    )
    total = sum(counts.values()) * len(CLASSES)
    print(
        f"{options.out}: {total} clips of {len(CLASSES)} classes"
        + ("" if made else ", made before with these settings")
    )


def _prepare(options: argparse.Namespace) -> int:
    from data_prep.prepare import Settings, prepare
    from data_prep.status import table

    if not 0 <= options.max_fail_rate <= 1:
        raise UsageError(f"--max-fail-rate {options.max_fail_rate}: is a share, from 0 to 1")
    report = prepare(
        options.source,
        options.out,
        Settings(options.short_side, options.gop),
        annotations=options.annotations,
        name=options.name,
        workers=options.workers,
        retry_failed=options.retry_failed,
    )
    for note in report.notes:
        print(note)
    print(table(report.counts))
    share = report.failed_share()
    if share > options.max_fail_rate:
        limit = f"more than --max-fail-rate {options.max_fail_rate:.1%}"
        raise UserError(f"{share:.1%} of the videos failed, {limit}; {options.out / 'failed.csv'} names them")
    return 0


def _status(options: argparse.Namespace) -> None:
    from data_prep.state import State
    from data_prep.status import status, table

    if options.json:
        print(json.dumps(status(options.out), indent=1))
        return
    with State(options.out) as state:
        counts, rate = state.counts(), state.clips_per_second()
    print(table(counts) + (f"\n{rate:.1f} clips/s" if rate else ""))


def _split(options: argparse.Namespace) -> None:
    from data_prep.split import split_validation

    train, val = split_validation(options.out, options.val, options.seed)
    print(f"{options.out}: {train} videos in train, {val} in val")
