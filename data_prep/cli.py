"""The verbs of `python -m data_prep`: parse, call one function, print. No logic."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from video_swinv2.command import Verbs, add_verb, run_verb
from video_swinv2.errors import UsageError, UserError

if TYPE_CHECKING:
    from data_prep.prepare import PreparationReport


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
    _add_download(verbs)
    _add_prepare(verbs)
    _add_merge(verbs)
    _add_status(verbs)
    _add_verify(verbs)
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


def _add_download(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "bring Kinetics here: archives, lists and the clips out of them; run again to go on after an interruption"
    example = "python -m data_prep download kinetics400 --split val --to raw/k400 --delete-archives"
    verb = add_verb(verbs, "download", _download, text, example)
    versions = ("kinetics400", "kinetics600", "kinetics700_2020")
    verb.add_argument("dataset", choices=versions, metavar="DATASET", help=", ".join(versions))
    verb.add_argument(
        "--split",
        action="extend",
        nargs="+",
        choices=("train", "val", "test"),
        metavar="SPLIT",
        help="train, val, test, or several; default all",
    )
    verb.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder for it, then the SRC of prepare")
    text = "what stands for https://s3.amazonaws.com/kinetics, in the same layout"
    verb.add_argument("--source", metavar="URL|FOLDER", help=text)
    verb.add_argument("--workers", type=_positive, default=4, metavar="N", help="archives at a time, default 4")
    verb.add_argument("--delete-archives", action="store_true", help="delete every archive once its clips are out")
    verb.add_argument("--no-extract", action="store_true", help="leave the clips in the archives")


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
    text = "list whose paths are relative to SRC; may be given several times"
    verb.add_argument("--annotations", type=Path, action="append", default=[], metavar="CSV|TXT", help=text)
    text = "list of videos, by YouTube id, that must not be in train; may be given several times"
    verb.add_argument("--held-out", type=Path, action="append", default=[], metavar="CSV", help=text)
    text = "which of the three official splits of UCF101 or HMDB51, default %(default)s"
    verb.add_argument("--official-split", type=int, choices=(1, 2, 3), default=1, metavar="N", help=text)
    verb.add_argument("--short-side", type=int, default=320, metavar="PIXELS", help="at most, default %(default)s")
    verb.add_argument("--gop", type=int, default=16, metavar="FRAMES", help="from key frame to key frame, default 16")
    text = "make the rate constant; without it every frame keeps its own time"
    verb.add_argument("--fps", type=float, metavar="RATE", help=text)
    text = "keep the bytes of sources that are already as asked, without sound and metadata"
    verb.add_argument("--copy", action="store_true", help=text)
    text = "shorter videos fail as too_short, default %(default)s"
    verb.add_argument("--min-seconds", type=float, default=0.0, metavar="S", help=text)
    verb.add_argument("--name", help="of the data set, default that of SRC")
    text = "exit with 1 when more of the videos failed, default %(default)s"
    verb.add_argument("--max-fail-rate", type=float, default=0.05, metavar="SHARE", help=text)
    text = "try failed videos again, all of them or those of the reasons named"
    verb.add_argument("--retry-failed", nargs="*", metavar="REASON", help=text)
    text = "only this part, so that n machines share the work: 0/8 ... 7/8, or slurm in a job array; then merge"
    verb.add_argument("--shard", metavar="I/N", help=text)
    text = "local processes (default), dask (a cluster of --workers here) or dask:tcp://HOST:PORT (one that runs)"
    verb.add_argument("--executor", default="local", metavar="WHERE", help=text)
    text = "only say what it will come to: hours, output, failures, by a sample of 20 videos; prepare nothing"
    verb.add_argument("--preflight", action="store_true", help=text)
    _add_workers(verb)


def _add_merge(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "make one data set of the shards prepared in OUT, and in other folders"
    verb = add_verb(verbs, "merge", _merge, text, "python -m data_prep merge data/k400")
    verb.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    verb.add_argument("others", type=Path, nargs="*", metavar="OTHER", help="folder with more shards")


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
    verb.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots")


def _add_verify(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "look whether every prepared video is still whole; run again to go on after an interruption"
    verb = add_verb(verbs, "verify", _verify, text, "python -m data_prep verify data/k400 --level full --workers 16")
    verb.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    text = "header: opens, right by its index; full: every frame decodes; hash (default): header, and the very bytes"
    verb.add_argument("--level", choices=("header", "full", "hash"), default="hash", help=text)
    verb.add_argument("--json", action="store_true", help="print JSON")
    _add_workers(verb)


def _add_split(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "set aside a share of each class of train as val, videos cut from one source together; only lists change"
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


def _download(options: argparse.Namespace) -> None:
    from data_prep.cvdf import BASE_URL
    from data_prep.download import download

    report = download(
        options.dataset,
        options.split or ("train", "val", "test"),
        options.to,
        source=options.source or BASE_URL,
        workers=options.workers,
        extract=not options.no_extract,
        delete_archives=options.delete_archives,
    )
    for line in (*report.lines, *report.notes):
        print(line)


def _prepare(options: argparse.Namespace) -> int:
    from data_prep.prepare import TranscodeSettings, estimate_preparation, prepare
    from data_prep.shards import parse_shard

    if not 0 <= options.max_fail_rate <= 1:
        raise UsageError(f"--max-fail-rate {options.max_fail_rate}: is a share, from 0 to 1")
    settings = TranscodeSettings(options.short_side, options.gop, options.fps, options.copy, options.min_seconds)
    lists = {"annotations": options.annotations, "held_out": options.held_out}
    lists |= {"official_split": options.official_split}
    means = {"workers": options.workers, "executor": options.executor}
    if options.preflight:
        ahead = estimate_preparation(options.source, options.out, settings, **lists, **means)
        print(ahead.as_text())
        return 1 if ahead.problems else 0
    report = prepare(
        options.source,
        options.out,
        settings,
        **lists,
        **means,
        name=options.name,
        shard=None if options.shard is None else parse_shard(options.shard),
        retry_failed=options.retry_failed,
    )
    _print_report(report)
    share = report.failed_share()
    if share > options.max_fail_rate:
        limit = f"more than --max-fail-rate {options.max_fail_rate:.1%}"
        where = options.out / "failed.csv" if options.shard is None else "the state of the shard"
        raise UserError(f"{share:.1%} of the videos failed, {limit}; {where} names them")
    return 0


def _merge(options: argparse.Namespace) -> None:
    from data_prep.prepare import merge

    _print_report(merge(options.out, options.others))


def _print_report(report: PreparationReport) -> None:
    from data_prep.status import counts_table

    print(counts_table(report.counts))


def _status(options: argparse.Namespace) -> None:
    from data_prep.status import as_json, as_text, open_states, read_status

    with open_states(options.out) as states:
        now = read_status(states)
        if options.html is not None:
            from data_prep.status_page import write_page

            write_page(options.html, options.out, now, states)
    print(json.dumps(as_json(now), indent=1) if options.json else as_text(now))


def _verify(options: argparse.Namespace) -> int:
    from data_prep.verify import as_text, verify

    result = verify(options.out, options.level, workers=options.workers)
    print(json.dumps(result.as_json(), indent=1) if options.json else as_text(result, options.out))
    return 1 if result.bad else 0


def _split(options: argparse.Namespace) -> None:
    from data_prep.split import split_validation

    for line in split_validation(options.out, options.val, options.seed).lines():
        print(line)
