"""The comparison of several tests: their figures, paired differences on shared videos, and differences in setup.

Tests are named A, B, C, ... in the order given. Each pair of them is compared on the videos that both scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import create_folder, json_text
from video_swinv2.pages import TickMark, render, tick_marks
from video_swinv2.report.analysis import Analysis, analyse
from video_swinv2.report.intervals import PairedDifference, compare_paired, holm_adjusted
from video_swinv2.report.markdown import ACCURACIES, accuracy_line, comparison_text, span
from video_swinv2.report.metrics import ClassAccuracy, sources_of_scored
from video_swinv2.report.page import as_json_data, chance_line, views_series, write_content, write_report
from video_swinv2.report.plots import Plot, Series, plot
from video_swinv2.report.scores import load_test, reorder_classes, title_of
from video_swinv2.report.training_run import TrainingRun, find_training_run, flatten, folder_of_model

MAX_CLASSES = 20  # on the page; comparison.json lists all
MAX_LONE_ANSWERS = 50  # as above
MAX_BANDS = 3  # curves whose intervals can be told apart when they overlap
SIGNIFICANT = 0.05  # a p value below it
# Keys of a test's record that may differ between any two tests and say nothing about the models.
IGNORED_DIFFERENCES = ("date", "origins", "seconds", "process_seconds", "decode_wait_share", "shards_finished_before")
# The keys of a training run's record that are settings; the other keys are results, versions and costs.
RUN_SETTINGS = ("batch", "steps", "seed", "data")


@dataclass(frozen=True)
class ComparedTest:
    """One of the tests: its letter on the page, its folder as given, its figures, and its training run if found."""

    letter: str
    folder: str
    analysis: Analysis
    run: TrainingRun | None

    @property
    def record(self) -> dict[str, Any]:
        """The record of what was tested and how: the metadata of the scores."""
        return self.analysis.scores.metadata


@dataclass(frozen=True)
class LoneAnswer:
    """A video that one test of a pair answers correctly and the other answers `wrong_answer`."""

    path: str
    label: str
    wrong_answer: str


@dataclass(frozen=True)
class ComparedPair:
    """Two tests, by letter, on the videos that both scored; `p_holm` is the p value adjusted for all pairs compared.

    only_first, only_second: the videos that only that test answers correctly, in the order of their list.
    """

    first: str
    second: str
    paired: PairedDifference
    p_holm: float
    only_first: tuple[LoneAnswer, ...]
    only_second: tuple[LoneAnswer, ...]


@dataclass(frozen=True)
class ClassComparison:
    """One class in every test; `apart` is the largest difference in its accuracy between any two tests."""

    name: str
    rows: tuple[ClassAccuracy, ...]
    apart: float


def report_tests(folders: Sequence[Path], *, out: Path, run: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Write the report of one test into its folder, or the comparison of several tests to `out`.

    A test with several protocols gets a report for each protocol, and a comparison of them in the folder of the test.
    run: the run folder that the model of a single test was trained in. Returns the result as JSON data, and lines to
    print. Raises as `write_report` and `compare` do.
    """
    if len(folders) > 1:
        if run:
            raise UsageError(f"--run {run}: applies to the report of a single test, not to a comparison; omit it")
        return _compare_and_summarize([path for folder in folders for path in score_folders(folder)], out)
    found = score_folders(folders[0])
    results = {path: write_report(path, run) for path in found}
    lines = [f"{path / 'report.html'}: {accuracy_line(result)}" for path, result in results.items()]
    if len(found) == 1:
        return results[found[0]], lines
    comparison, more = _compare_and_summarize(found, folders[0])
    return {path.name: result for path, result in results.items()} | {"comparison": comparison}, lines + more


def _compare_and_summarize(folders: Sequence[Path], out: Path) -> tuple[dict[str, Any], list[str]]:
    """`compare`; also returns its result as lines to print, one for each test and each pair."""
    result = compare(folders, out)
    lines = [f"{test['letter']} {test['folder']}: {accuracy_line(test)}" for test in result["tests"]]
    lines += [pair["verdict"] for pair in result["pairs"]]
    return result, [*lines, str(out / "comparison.html")]


def score_folders(folder: Path) -> list[Path]:
    """The folders of a test that hold scores: `folder` itself or one folder in it per protocol.

    Raises UserError if there are none.
    """
    if (folder / "scores.npz").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/scores.npz"))
    if not found:
        raise UserError(f"{folder / 'scores.npz'}: no such file; run `video-swinv2 test` first")
    return found


def compare(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Compare two or more tests, write comparison.html, .md and .json to `out`, and return the content of the .json.

    Classes are matched by name and put into the order of the first test. Raises UsageError if a folder is given twice
    or if two tests share no video or disagree about a label, and UserError if their classes differ or if scores cannot
    be read.
    """
    tests = _read_tests(folders)
    pairs = _pairs(tests)
    result: dict[str, Any] = {
        "tests": [
            {"letter": test.letter, "folder": test.folder, "ece": test.analysis.calibration.ece}
            | test.analysis.metrics.figures()
            | {key: test.record.get(key, "videos") for key in ("protocol", "data_fingerprint", "unit")}
            | {"videos": {"listed": test.analysis.metrics.listed, "scored": test.analysis.metrics.scored}}
            for test in tests
        ],
        "pairs": [asdict(pair) | {"verdict": verdict(pair, tests)} for pair in pairs],
        "classes": [asdict(row) for row in compare_classes(tests)],
        "different": {key: list(values) for key, values in differing_settings(tests)},
    }
    # Now the result equals what a reader of comparison.json gets, and the Markdown is made of that.
    result = as_json_data(result)
    create_folder(out, "--out")
    page = render("video_swinv2.report", "compare.html.j2", _page_values(tests, pairs))
    write_content(out / "comparison.html", page)
    write_content(out / "comparison.md", comparison_text(result))
    write_content(out / "comparison.json", json_text(result, indent=1, ascii_only=False) + "\n")
    return result


def verdict(pair: ComparedPair, tests: Sequence[ComparedTest]) -> str:
    """What the comparison of a pair says, in one sentence, and what it rests on."""
    paired, unit = pair.paired, tests[0].record.get("unit", "videos")
    better, worse, gain, lost = pair.second, pair.first, paired.only_second, paired.only_first
    low, high = paired.interval
    if paired.difference < 0:
        better, worse, gain, lost, (low, high) = worse, better, lost, gain, (-high, -low)
    if pair.p_holm < SIGNIFICANT:
        says = f"{better} is better than {worse}"
    elif gain == lost:
        says = f"{pair.first} and {pair.second} are equally good on these {unit}"
    else:
        says = f"{better} is ahead of {worse}, but not by more than chance explains"
    p_value = p_value_text(pair.p_holm)
    return (
        f"{says}: {100 * abs(paired.difference):+.2f} points of top-1 (95 % interval {span((low, high))}, "
        f"p {p_value}); of {paired.n} {unit}, {gain} are right in {better} only and {lost} in {worse} only"
    )


def p_value_text(p: float) -> str:
    """A p value with two digits, such as 0.031; for the smallest, that they are small."""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def compare_classes(tests: Sequence[ComparedTest]) -> list[ClassComparison]:
    """The classes with scored videos in every test, those with the largest differences first."""
    rows = []
    # per_class has one row per class in the order of the classes, which `_read_tests` has made the same for all tests.
    for row in zip(*(test.analysis.metrics.per_class for test in tests), strict=True):
        shares = [one.accuracy for one in row if one.accuracy is not None]
        if len(shares) == len(row):  # no test lacks videos of the class
            rows.append(ClassComparison(row[0].name, row, max(shares) - min(shares)))
    return sorted(rows, key=lambda row: -row.apart)


def differing_settings(tests: Sequence[ComparedTest]) -> list[tuple[str, tuple[str, ...]]]:
    """(dotted key, value in each test) of every setting in which the tests or their training runs differ.

    "-" stands for a test that does not record the setting.
    """
    flat = []
    for test in tests:
        record = {key: value for key, value in test.record.items() if key not in IGNORED_DIFFERENCES}
        run = test.run.record if test.run else {}
        training = {key: run[key] for key in RUN_SETTINGS if key in run}
        flat.append(dict(flatten(record | ({"training": training} if training else {}))))
    # The keys of all tests, each once, in the order in which they first occur.
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, tuple(one.get(key, "-") for one in flat)) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _read_tests(folders: Sequence[Path]) -> list[ComparedTest]:
    """Read and analyse the tests, their classes in the order of the first one."""
    if len(folders) > len(ascii_uppercase):
        raise UsageError(f"{len(folders)} tests: too many to compare; name at most {len(ascii_uppercase)}")
    names = [str(folder) for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{name}: given twice; name each test once")
    # The first test sets the order of the classes. A comparison of tests with other classes is refused.
    first = load_test(folders[0] / "scores.npz")
    tests = []
    for letter, folder in zip(ascii_uppercase, folders, strict=False):
        scores = load_test(folder / "scores.npz")
        ordered = reorder_classes(scores, first.classes, str(folder / "scores.npz"))
        tests.append(
            ComparedTest(letter, str(folder), analyse(ordered), find_training_run(folder_of_model(scores.metadata)))
        )
    return tests


def _pairs(tests: Sequence[ComparedTest]) -> list[ComparedPair]:
    """Every pair of tests: n tests make n (n - 1) / 2 pairs, so p values are adjusted for that many comparisons."""
    both = [_pair(first, second) for first, second in combinations(tests, 2)]
    adjusted = holm_adjusted([pair.paired.p_value for pair in both])
    return [replace(pair, p_holm=p) for pair, p in zip(both, adjusted, strict=True)]


def _pair(first: ComparedTest, second: ComparedTest) -> ComparedPair:
    """Two tests on the videos that both scored, matched by path; the p value is not adjusted."""
    first_rows, second_rows = _rows_by_path(first), _rows_by_path(second)
    shared = [path for path in first_rows if path in second_rows]
    if not shared:
        raise UsageError(
            f"{first.folder} and {second.folder}: tests of different data, {_data(first)} and {_data(second)}: "
            "no video was scored in both; test both models on the same data set and split"
        )
    # The rows of the shared videos among the scored videos of each test; row i of both is the same video.
    a, b = [first_rows[path] for path in shared], [second_rows[path] for path in shared]
    labels = [test.analysis.scores.labels[test.analysis.scores.scored] for test in (first, second)]
    classes = first.analysis.scores.classes
    # Label numbers are comparable because both tests have the same class order.
    for path, i, j in zip(shared, a, b, strict=True):
        if labels[0][i] != labels[1][j]:
            raise UsageError(
                f"{path}: is {classes[labels[0][i]]!r} in {first.folder} and {classes[labels[1][j]]!r} in "
                f"{second.folder}; test both on the same list"
            )
    sources = sources_of_scored(first.analysis.scores)[a]
    right = first.analysis.right[a], second.analysis.right[b]
    paired = compare_paired(*right, sources)

    def only(these: NDArray[np.bool_], wrong_answers: NDArray[np.int64]) -> tuple[LoneAnswer, ...]:
        rows = np.flatnonzero(these).tolist()
        return tuple(LoneAnswer(shared[i], classes[labels[0][a[i]]], classes[wrong_answers[i]]) for i in rows)

    return ComparedPair(
        first.letter,
        second.letter,
        paired,
        paired.p_value,
        only_first=only(right[0] & ~right[1], second.analysis.answers[b]),
        only_second=only(right[1] & ~right[0], first.analysis.answers[a]),
    )


def _data(test: ComparedTest) -> str:
    """The data of a test, for messages: its folder, split and fingerprint."""
    return f"{test.record['data']} ({test.record['split']}, {test.record['data_fingerprint'][:12]})"


def _rows_by_path(test: ComparedTest) -> dict[str, int]:
    """The path of each scored video -> its row among the scored videos of the test."""
    scores = test.analysis.scores
    paths = [path for path, scored in zip(scores.paths, scores.scored, strict=True) if scored]
    return {path: row for row, path in enumerate(paths)}


def _page_values(tests: Sequence[ComparedTest], pairs: Sequence[ComparedPair]) -> dict[str, object]:
    """The values of compare.html.j2."""
    classes = compare_classes(tests)
    return {
        "title": " against ".join(title_of(test.record) for test in tests) if len(tests) == 2 else None,
        "names": {test.letter: title_of(test.record) for test in tests},
        "verdicts": [verdict(pair, tests) for pair in pairs],
        "axis": _accuracy_axis(tests),
        "max_lone_answers": MAX_LONE_ANSWERS,
        "tests": tests,
        "pairs": pairs,
        "accuracies": ACCURACIES,
        "p_value": p_value_text,
        "one_data": len({test.record["data_fingerprint"] for test in tests}) == 1,
        "one_protocol": len({test.record["protocol"] for test in tests}) == 1,
        "unit": tests[0].record.get("unit", "videos"),
        "digits": 1 if tests[0].analysis.metrics.scored < 5000 else 2,
        "classes": [row for row in classes[:MAX_CLASSES] if row.apart > 0],
        "n_classes": len(tests[0].analysis.scores.classes),
        "plots": [one for one in (_views_plot(tests), *_training_plots(tests)) if one],
        "different": differing_settings(tests),
    }


def _accuracy_axis(tests: Sequence[ComparedTest]) -> tuple[float, float, tuple[TickMark, ...]]:
    """(low, high, tick marks) of the axis of top-1, in whole tenths: it holds every interval and the chance line."""
    intervals = [test.analysis.metrics.top1_interval for test in tests]
    low = math.floor(10 * min(tests[0].analysis.metrics.chance, *(low for low, _ in intervals))) / 10
    high = math.ceil(10 * max(high for _, high in intervals)) / 10
    return low, high, tick_marks(100 * low, 100 * high, " %")


def _views_plot(tests: Sequence[ComparedTest]) -> Plot | None:
    """Accuracy by number of views, a line for each test, with intervals if they are few enough to be told apart."""
    series = [views_series(test.letter, test.analysis.views) for test in tests]
    if len(tests) > MAX_BANDS:
        series = [replace(one, low=None, high=None) for one in series]
    series.append(chance_line(tests[0].analysis.metrics.chance, series))
    x_label = "clips per video (crops if there is one clip)"
    title = "Accuracy by number of views"
    return plot(title, series, x_label=x_label, y_label="top-1", percent=True, mark_every_count=True)


def _training_plots(tests: Sequence[ComparedTest]) -> list[Plot | None]:
    """The training curves of all tests; None for a metric that no run logged."""
    metrics = {
        "Training loss": ("loss", "train/loss"),
        "Validation loss": ("loss", "val/loss"),
        "Validation accuracy": ("top-1", "val/top1"),
    }
    drawn = []
    for title, (y_label, key) in metrics.items():
        # A test without a training run gets an empty line, so that the other tests keep their colours (see `plot`).
        lines = [(test.letter, *(test.run.series(key) if test.run else (np.empty(0), np.empty(0)))) for test in tests]
        series = [Series(letter, x, y, dots=len(x) < 30) for letter, x, y in lines]
        if key == "val/top1":
            series.append(chance_line(tests[0].analysis.metrics.chance, series))
        drawn.append(plot(title, series, x_label="step", y_label=y_label, percent=key == "val/top1"))
    return drawn
