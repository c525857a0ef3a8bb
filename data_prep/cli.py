"""The command line `python -m data_prep`: each verb parses its arguments, calls one function and prints the result.

A verb imports the modules it needs only when it runs, so that `--help` and `status` do not wait for libraries that they
do not use, such as PyAV and scikit-learn. For the same reason, choices that those modules define are repeated here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from video_swinv2.command import (
    MAX_SEED,
    MAX_SIZE,
    WEEK_SECONDS,
    Parser,
    Verbs,
    add_verb,
    number,
    run_verb,
    whole_number,
)
from video_swinv2.errors import UserError
from video_swinv2.escaping import for_terminal, terminal_lines
from video_swinv2.files import json_text

if TYPE_CHECKING:
    from data_prep.groups import GroupRule
    from data_prep.prepare import PreparationReport


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 1 failed or fell short of a limit, 2 wrong usage."""
    return run_verb(make_parser(), arguments)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with help and an example for every verb."""
    parser: argparse.ArgumentParser = Parser(
        prog="python -m data_prep", description="Turn raw videos into a checked data set that is fast to read."
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
    text = "generate a data set whose classes are motions: no single frame distinguishes them"
    verb = add_verb(
        verbs, "synth", _synth, text, "python -m data_prep synth data/motions --level hard --train 300 --workers 8"
    )
    verb.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    verb.add_argument(
        "--level",
        choices=("easy", "hard"),
        default="easy",
        help="easy: bright shapes on a dim background; default %(default)s",
    )
    for split, count in (("train", 300), ("val", 20), ("test", 20)):
        verb.add_argument(
            f"--{split}", type=whole_number(0), default=count, metavar="N", help="clips per class, default %(default)s"
        )
    verb.add_argument(
        "--size",
        type=whole_number(0, MAX_SIZE),
        default=64,
        metavar="PIXELS",
        help="height and width, default %(default)s",
    )
    verb.add_argument(
        "--frames", type=whole_number(0, MAX_SIZE), default=16, metavar="N", help="frames per clip, default %(default)s"
    )
    verb.add_argument(
        "--seed", type=whole_number(0, MAX_SEED), default=0, help="seed of all random choices, default %(default)s"
    )
    _add_workers(verb)


def _add_download(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "download Kinetics: lists and archives, and extract the videos; run again to resume after an interruption"
    example = "python -m data_prep download kinetics400 --split val --to raw/k400 --delete-archives"
    verb = add_verb(verbs, "download", _download, text, example)
    # The keys of cvdf.VERSIONS.
    versions = ("kinetics400", "kinetics600", "kinetics700_2020")
    verb.add_argument("dataset", choices=versions, metavar="DATASET", help=", ".join(versions))
    verb.add_argument(
        "--split",
        action="extend",
        nargs="+",
        choices=("train", "val", "test"),
        metavar="SPLIT",
        help="train, val or test, or several; default all",
    )
    verb.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="destination folder, which is then the SRC of prepare"
    )
    text = "a mirror of https://s3.amazonaws.com/kinetics with the same layout"
    verb.add_argument("--source", metavar="URL|FOLDER", help=text)
    verb.add_argument(
        "--workers",
        type=whole_number(most=1000),
        default=4,
        metavar="N",
        help="archives downloaded at the same time, default 4",
    )
    verb.add_argument("--delete-archives", action="store_true", help="delete each archive after extracting it")
    verb.add_argument("--no-extract", action="store_true", help="keep the archives and extract nothing")


def _add_prepare(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "turn raw videos into small, checked ones that are fast to read; run again to resume after an interruption"
    verb = add_verb(
        verbs,
        "prepare",
        _prepare,
        text,
        "python -m data_prep prepare raw/k400 data/k400 --annotations k400_val.csv --workers 16",
    )
    verb.add_argument(
        "source", type=Path, metavar="SRC", help="a folder of classes, a folder of lists, a list, or a CSV"
    )
    verb.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    text = "a list path,label[,split][,group], or folder of lists, with paths relative to SRC; can be repeated"
    verb.add_argument("--annotations", type=Path, action="append", default=[], metavar="CSV|TXT", help=text)
    text = "a Kinetics list of videos that must not be in train, by YouTube id; can be repeated"
    verb.add_argument("--held-out", type=Path, action="append", default=[], metavar="CSV", help=text)
    _add_groups(verb)
    text = "which of the three official splits of UCF101 or HMDB51, default %(default)s"
    verb.add_argument("--official-split", type=int, choices=(1, 2, 3), default=1, metavar="N", help=text)
    verb.add_argument(
        "--short-side",
        type=whole_number(0, MAX_SIZE),
        default=320,
        metavar="PIXELS",
        help="maximum short side, default %(default)s",
    )
    verb.add_argument(
        "--gop",
        type=whole_number(0, MAX_SIZE),
        default=16,
        metavar="FRAMES",
        help="maximum distance between key frames, default 16",
    )
    text = "convert to a constant frame rate; by default every frame keeps its own time"
    verb.add_argument("--fps", type=number(0, 1000), metavar="RATE", help=text)
    text = "copy sources that already have the prepared form (H.264, no sound, no metadata) instead of encoding"
    verb.add_argument("--copy", action="store_true", help=text)
    text = "videos shorter than this fail as too_short, default %(default)s"
    verb.add_argument("--min-seconds", type=number(0, WEEK_SECONDS), default=0.0, metavar="S", help=text)
    verb.add_argument("--name", help="name of the data set, default that of SRC")
    text = "exit with code 1 if a larger share of the videos failed, default %(default)s"
    verb.add_argument("--max-fail-rate", type=number(0, 1), default=0.05, metavar="SHARE", help=text)
    text = "try failed videos again: all of them, or those that failed for the given reasons"
    verb.add_argument("--retry-failed", nargs="*", metavar="REASON", help=text)
    text = (
        "prepare only this shard, to divide the work among N machines: 0/8 ... 7/8, or slurm in a job array; then merge"
    )
    verb.add_argument("--shard", metavar="I/N", help=text)
    text = (
        "local (processes, the default), dask (a new cluster of --workers here) or dask:tcp://HOST:PORT (a running one)"
    )
    verb.add_argument("--executor", default="local", metavar="WHERE", help=text)
    text = "only estimate hours, output and failures from a sample of 20 videos; prepare nothing"
    verb.add_argument("--preflight", action="store_true", help=text)
    _add_workers(verb)


def _add_merge(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "merge the shards prepared in OUT, and in other folders, into one data set"
    verb = add_verb(verbs, "merge", _merge, text, "python -m data_prep merge data/k400")
    verb.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    verb.add_argument("others", type=Path, nargs="*", metavar="OTHER", help="another folder that holds shards")


def _add_status(verbs: Verbs[argparse.ArgumentParser]) -> None:
    verb = add_verb(
        verbs,
        "status",
        _status,
        "show the progress and the failures of a preparation, finished or running",
        "python -m data_prep status data/k400",
    )
    verb.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument("--html", type=Path, metavar="FILE", help="also write an HTML page with plots")


def _add_verify(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "check that every prepared video is intact; run again to resume after an interruption"
    verb = add_verb(verbs, "verify", _verify, text, "python -m data_prep verify data/k400 --level full --workers 16")
    verb.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    # The keys of verify.LEVELS.
    text = "header: the file opens and its index is right; full: every frame decodes; hash (default): header and sha256"
    verb.add_argument("--level", choices=("header", "full", "hash"), default="hash", help=text)
    text = "prepare damaged videos again, from their sources and with the same settings, and write the lists again"
    verb.add_argument("--repair", action="store_true", help=text)
    verb.add_argument("--json", action="store_true", help="print JSON")
    _add_workers(verb)


def _add_split(verbs: Verbs[argparse.ArgumentParser]) -> None:
    text = "move shares of train to val and test, or divide it into folds; keeps groups together and changes only lists"
    verb = add_verb(verbs, "split", _split, text, "python -m data_prep split data/mine --val 0.1 --test 0.2")
    verb.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    for split in ("val", "test"):
        text = f"share of each class for {split}, for instance 0.1"
        verb.add_argument(f"--{split}", type=number(0, 1), metavar="SHARE", help=text)
    text = "write lists fold-0.csv, fold-1.csv, ... for cross-validation: in each, another fold is val, the rest train"
    verb.add_argument("--folds", type=whole_number(2, 1000), metavar="K", help=text)
    _add_groups(verb)
    verb.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0, help="default %(default)s")


def _add_groups(verb: argparse.ArgumentParser) -> None:
    options = verb.add_mutually_exclusive_group()
    text = "a list path,group of videos that must stay in one split, such as clips of one recording or person"
    options.add_argument("--groups", type=Path, metavar="CSV", help=text)
    text = "take as group what REGEX, or its first (...), finds in the path of a video, for instance '^[^_]+'"
    options.add_argument("--group-regex", metavar="REGEX", help=text)


def _group_rule(options: argparse.Namespace) -> GroupRule:
    from data_prep.groups import GroupRule

    return GroupRule(options.groups, options.group_regex)


def _add_workers(verb: argparse.ArgumentParser) -> None:
    # A job of a cluster may use only some of the machine's cores, which cpu_count does not know. macOS has no
    # sched_getaffinity.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    verb.add_argument(
        "--workers",
        type=whole_number(most=1000),
        default=count,
        metavar="N",
        help="worker processes, default one per core",
    )


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
    note = "" if made else ", already there with these settings"
    print(for_terminal(f"{options.out}: {total} clips of {len(CLASSES)} classes{note}"))


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
    print(terminal_lines((*report.lines, *report.notes)))


def _prepare(options: argparse.Namespace) -> int:
    from data_prep.jobs import TranscodeSettings
    from data_prep.prepare import estimate_preparation, prepare
    from data_prep.shards import parse_shard

    settings = TranscodeSettings(options.short_side, options.gop, options.fps, options.copy, options.min_seconds)
    lists = {"annotations": options.annotations, "held_out": options.held_out}
    lists |= {"official_split": options.official_split, "groups": _group_rule(options)}
    resources = {"workers": options.workers, "executor": options.executor}
    if options.preflight:
        estimate = estimate_preparation(options.source, options.out, settings, **lists, **resources)
        # Problems such as a full disk would stop the preparation, so a script can rely on the exit code.
        print(estimate.as_text())
        return 1 if estimate.problems else 0
    report = prepare(
        options.source,
        options.out,
        settings,
        **lists,
        **resources,
        name=options.name,
        shard=None if options.shard is None else parse_shard(options.shard),
        retry_failed=options.retry_failed,
    )
    _print_report(report)
    # The data set has been written all the same; the exit code says that too much of it is missing.
    share = report.failed_share()
    if share > options.max_fail_rate:
        limit = f"more than --max-fail-rate {options.max_fail_rate:.1%}"
        # A shard writes no failed.csv; the merge does.
        where = f"see {options.out / 'failed.csv'}" if options.shard is None else "`status` counts them by reason"
        raise UserError(f"{share:.1%} of the videos failed, {limit}; {where}")
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
        status = read_status(states)
        if options.html is not None:
            from data_prep.status_page import write_page

            write_page(options.html, options.out, status, states)
    print(json_text(as_json(status), indent=1) if options.json else as_text(status))


def _verify(options: argparse.Namespace) -> int:
    from data_prep.verify import as_text, verify

    result = verify(options.out, options.level, workers=options.workers, repair=options.repair)
    print(json_text(result.as_json(), indent=1) if options.json else as_text(result, options.out))
    return 1 if result.bad else 0


def _split(options: argparse.Namespace) -> None:
    from data_prep.split import split_dataset

    shares = {"val": options.val, "test": options.test, "folds": options.folds}
    print(terminal_lines(split_dataset(options.out, **shares, groups=_group_rule(options), seed=options.seed).lines()))
