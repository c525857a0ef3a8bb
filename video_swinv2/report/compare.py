"""Several tests side by side: figures, paired differences on the videos they share, and what was different."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from video_swinv2.errors import UsageError, UserError
from video_swinv2.pages import render
from video_swinv2.report.intervals import Paired, compare_pairs, holm
from video_swinv2.report.markdown import accuracy_line, comparison_text, span
from video_swinv2.report.metrics import ClassAccuracy, sources_of
from video_swinv2.report.page import Analysis, analyse, plain, views_series, write_report, write_text
from video_swinv2.report.plots import Plot, Series, plot
from video_swinv2.report.runs import Run, find_run, flatten, model_folder
from video_swinv2.report.scores import in_class_order, load_scores

MOST_CLASSES = 20
# Of every test its own, and of no interest where they differ.
PRIVATE = ("origins", "seconds", "decode_wait_share")


@dataclass(frozen=True)
class Tested:
    """One test of several: its letter, its folder as given, all its figures, and its training run if there is one."""

    letter: str
    folder: str
    analysis: Analysis
    run: Run | None

    @property
    def record(self) -> dict[str, Any]:
        """What the scores are of."""
        return self.analysis.scores.metadata


@dataclass(frozen=True)
class Pair:
    """Two tests on the videos both scored; `p_holm` is the p value raised for the number of pairs."""

    first: str
    second: str
    paired: Paired
    p_holm: float


@dataclass(frozen=True)
class ClassRow:
    """One class in every test, and how far the tests lie apart in it."""

    name: str
    rows: tuple[ClassAccuracy, ...]
    apart: float


def report(folders: Sequence[Path], *, out: Path, run: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """The report of one test, or several tests compared in `out`; the result for machines and lines for people.

    A test of several protocols gets a report for each, and a comparison of them in its own folder. run: the training
    run of the one test. Raises what `write_report` and `compare` do.
    """
    if len(folders) > 1:
        if run:
            raise UsageError(f"--run {run}: goes with the report of one test, not with a comparison; leave it away")
        return _compared([path for folder in folders for path in score_folders(folder)], out)
    found = score_folders(folders[0])
    results = {path: write_report(path, run) for path in found}
    lines = [f"{path / 'report.html'}: {accuracy_line(result)}" for path, result in results.items()]
    if len(found) == 1:
        return results[found[0]], lines
    comparison, more = _compared(found, folders[0])
    return {path.name: result for path, result in results.items()} | {"comparison": comparison}, lines + more


def _compared(folders: Sequence[Path], out: Path) -> tuple[dict[str, Any], list[str]]:
    result = compare(folders, out)
    lines = [f"{test['letter']} {test['folder']}: {accuracy_line(test)}" for test in result["tests"]]
    for pair in result["pairs"]:
        paired = pair["paired"]
        lines.append(
            f"{pair['first']} to {pair['second']}: {100 * paired['difference']:+.2f} points "
            f"({span(paired['interval'])}) on {paired['n']} shared, p {pair['p_holm']:.2g}"
        )
    return result, [*lines, str(out / "comparison.html")]


def score_folders(folder: Path) -> list[Path]:
    """The folders with scores that a test wrote: its own, or one for each protocol; raises UserError for none."""
    if (folder / "scores.npz").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/scores.npz"))
    if not found:
        raise UserError(f"{folder / 'scores.npz'}: no such file; run `video-swinv2 test` first")
    return found


def compare(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Compare two or more tests; writes comparison.html, .md and .json to `out` and returns what the last holds.

    Classes are put in the order of the first test by name. Raises UsageError for a folder given twice and for tests
    that share no video or disagree about a label, UserError for other classes and for scores that cannot be read.
    """
    tests = _read(folders)
    pairs = _pairs(tests)
    result: dict[str, Any] = {
        "tests": [
            {"letter": test.letter, "folder": test.folder, "ece": test.analysis.calibration.ece}
            | test.analysis.metrics.figures()
            | {key: test.record.get(key, "videos") for key in ("protocol", "data_fingerprint", "unit")}
            | {"videos": {"listed": test.analysis.metrics.listed, "scored": test.analysis.metrics.scored}}
            for test in tests
        ],
        "pairs": [asdict(pair) for pair in pairs],
        "classes": [asdict(row) for row in class_rows(tests)],
        "different": {key: list(values) for key, values in differing(tests)},
    }
    result = plain(result)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a folder ({error.strerror}); choose another --out") from error
    page = render("video_swinv2.report", "compare.html.j2", _contents(tests, pairs))
    write_text(out / "comparison.html", page)
    write_text(out / "comparison.md", comparison_text(result))
    write_text(out / "comparison.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def class_rows(tests: Sequence[Tested]) -> list[ClassRow]:
    """The classes with videos in every test, those the tests differ most in first."""
    rows = []
    for row in zip(*(test.analysis.metrics.per_class for test in tests), strict=True):
        shares = [one.accuracy for one in row if one.accuracy is not None]
        if len(shares) == len(row):
            rows.append(ClassRow(row[0].name, row, max(shares) - min(shares)))
    return sorted(rows, key=lambda row: -row.apart)


def differing(tests: Sequence[Tested]) -> list[tuple[str, tuple[str, ...]]]:
    """(dotted key, value in each test) of what the records of tests and of their training runs do not agree in."""
    flat = []
    for test in tests:
        record = {key: value for key, value in test.record.items() if key not in PRIVATE}
        run = (
            {key: test.run.record[key] for key in ("batch", "steps", "seed", "data") if key in test.run.record}
            if test.run
            else {}
        )
        flat.append(dict(flatten(record | ({"training": run} if run else {}))))
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, tuple(one.get(key, "-") for one in flat)) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _read(folders: Sequence[Path]) -> list[Tested]:
    if len(folders) > len(ascii_uppercase):
        raise UsageError(f"{len(folders)} tests are more than can be compared; give {len(ascii_uppercase)} at most")
    names = [str(folder) for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{name}: given twice; a test is compared with others")
    first = load_scores(folders[0] / "scores.npz")
    tests = []
    for letter, folder in zip(ascii_uppercase, folders, strict=False):
        scores = load_scores(folder / "scores.npz")
        ordered = in_class_order(scores, first.classes, str(folder / "scores.npz"))
        tests.append(Tested(letter, str(folder), analyse(ordered), find_run(model_folder(scores.metadata))))
    return tests


def _pairs(tests: Sequence[Tested]) -> list[Pair]:
    both = [(first, second, _paired(first, second)) for first, second in combinations(tests, 2)]
    raised = holm([paired.p_value for _, _, paired in both])
    return [Pair(a.letter, b.letter, paired, p) for (a, b, paired), p in zip(both, raised, strict=True)]


def _paired(first: Tested, second: Tested) -> Paired:
    """On the videos, known by their names, that both tests scored."""
    ours, theirs = _rows(first), _rows(second)
    shared = [path for path in ours if path in theirs]
    if not shared:
        raise UsageError(f"{first.folder} and {second.folder}: no video was scored in both, so they cannot be compared")
    a, b = [ours[path] for path in shared], [theirs[path] for path in shared]
    labels = [test.analysis.scores.labels[test.analysis.scores.scored] for test in (first, second)]
    for path, i, j in zip(shared, a, b, strict=True):
        if labels[0][i] != labels[1][j]:
            classes = first.analysis.scores.classes
            raise UsageError(
                f"{path}: is {classes[labels[0][i]]!r} in {first.folder} and {classes[labels[1][j]]!r} in "
                f"{second.folder}; test on one list"
            )
    sources = np.unique(sources_of(first.analysis.scores)[a], return_inverse=True)[1]
    return compare_pairs(first.analysis.right[a], second.analysis.right[b], sources, first.record.get("seed", 0))


def _rows(test: Tested) -> dict[str, int]:
    """Row among the scored videos of each path."""
    scores = test.analysis.scores
    paths = [path for path, scored in zip(scores.paths, scores.scored, strict=True) if scored]
    return {path: row for row, path in enumerate(paths)}


def _contents(tests: Sequence[Tested], pairs: Sequence[Pair]) -> dict[str, object]:
    classes = class_rows(tests)
    return {
        "tests": tests,
        "pairs": pairs,
        "one_data": len({test.record["data_fingerprint"] for test in tests}) == 1,
        "one_protocol": len({test.record["protocol"] for test in tests}) == 1,
        "unit": tests[0].record.get("unit", "videos"),
        "digits": 1 if tests[0].analysis.metrics.scored < 5000 else 2,
        "classes": [row for row in classes[:MOST_CLASSES] if row.apart > 0],
        "n_classes": len(tests[0].analysis.scores.classes),
        "plots": [one for one in (_views(tests), *_curves(tests)) if one],
        "different": differing(tests),
    }


def _views(tests: Sequence[Tested]) -> Plot | None:
    series = [views_series(test.letter, test.analysis.views) for test in tests]
    across = "clips (crops, where there is one clip) of each"
    return plot("Accuracy against views", series, x_label=across, percent=True, mark_every_count=True)


def _curves(tests: Sequence[Tested]) -> list[Plot | None]:
    figures = {"Loss in training": "train/loss", "Loss in validation": "val/loss", "Accuracy in validation": "val/top1"}
    drawn = []
    for title, key in figures.items():
        lines = [(test.letter, *(test.run.series(key) if test.run else (np.empty(0), np.empty(0)))) for test in tests]
        series = [Series(letter, x, y, dots=len(x) < 30) for letter, x, y in lines]
        drawn.append(plot(title, series, x_label="step", percent=title.startswith("Accuracy")))
    return drawn
