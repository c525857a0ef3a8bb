"""The comparison of several tests: their figures, paired differences on shared videos, and differences in setup.

Tests are named A, B, C, ... in the order given. Each pair of them is compared on the videos that both scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import create_folder, json_text
from video_swinv2.pages import render
from video_swinv2.report.analysis import Analysis, analyse
from video_swinv2.report.intervals import PairedDifference, compare_paired, holm_adjusted
from video_swinv2.report.markdown import ACCURACIES, accuracy_line, comparison_text, span
from video_swinv2.report.metrics import ClassAccuracy, sources_of_scored
from video_swinv2.report.page import as_json_data, views_series, write_content, write_report
from video_swinv2.report.plots import Plot, Series, plot
from video_swinv2.report.scores import load_test, reorder_classes
from video_swinv2.report.training_run import TrainingRun, find_training_run, flatten, folder_of_model

MAX_CLASSES = 20  # on the page; comparison.json lists all
# Keys of a test's record that may differ between any two tests and say nothing about the models.
IGNORED_DIFFERENCES = ("origins", "seconds", "process_seconds", "decode_wait_share", "shards_finished_before")
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
class ComparedPair:
    """Two tests, by letter, on the videos that both scored; `p_holm` is the p value adjusted for all pairs compared."""

    first: str
    second: str
    paired: PairedDifference
    p_holm: float


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
    for pair in result["pairs"]:
        paired = pair["paired"]
        lines.append(
            f"{pair['first']} to {pair['second']}: {100 * paired['difference']:+.2f} points "
            f"({span(paired['interval'])}) on {paired['n']} shared, p {pair['p_holm']:.2g}"
        )
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
        "pairs": [asdict(pair) for pair in pairs],
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
    both = [(first, second, _paired(first, second)) for first, second in combinations(tests, 2)]
    adjusted = holm_adjusted([paired.p_value for _, _, paired in both])
    return [ComparedPair(a.letter, b.letter, paired, p) for (a, b, paired), p in zip(both, adjusted, strict=True)]


def _paired(first: ComparedTest, second: ComparedTest) -> PairedDifference:
    """The paired difference on the videos that both tests scored, matched by path."""
    first_rows, second_rows = _rows_by_path(first), _rows_by_path(second)
    shared = [path for path in first_rows if path in second_rows]
    if not shared:
        raise UsageError(
            f"{first.folder} and {second.folder}: no video was scored in both; compare tests of the same data"
        )
    # The rows of the shared videos among the scored videos of each test; row i of both is the same video.
    a, b = [first_rows[path] for path in shared], [second_rows[path] for path in shared]
    labels = [test.analysis.scores.labels[test.analysis.scores.scored] for test in (first, second)]
    # Label numbers are comparable because both tests have the same class order.
    for path, i, j in zip(shared, a, b, strict=True):
        if labels[0][i] != labels[1][j]:
            classes = first.analysis.scores.classes
            raise UsageError(
                f"{path}: is {classes[labels[0][i]]!r} in {first.folder} and {classes[labels[1][j]]!r} in "
                f"{second.folder}; test both on the same list"
            )
    sources = sources_of_scored(first.analysis.scores)[a]
    return compare_paired(first.analysis.right[a], second.analysis.right[b], sources)


def _rows_by_path(test: ComparedTest) -> dict[str, int]:
    """The path of each scored video -> its row among the scored videos of the test."""
    scores = test.analysis.scores
    paths = [path for path, scored in zip(scores.paths, scores.scored, strict=True) if scored]
    return {path: row for row, path in enumerate(paths)}


def _page_values(tests: Sequence[ComparedTest], pairs: Sequence[ComparedPair]) -> dict[str, object]:
    """The values of compare.html.j2."""
    classes = compare_classes(tests)
    return {
        "tests": tests,
        "pairs": pairs,
        "accuracies": ACCURACIES,
        "one_data": len({test.record["data_fingerprint"] for test in tests}) == 1,
        "one_protocol": len({test.record["protocol"] for test in tests}) == 1,
        "unit": tests[0].record.get("unit", "videos"),
        "digits": 1 if tests[0].analysis.metrics.scored < 5000 else 2,
        "classes": [row for row in classes[:MAX_CLASSES] if row.apart > 0],
        "n_classes": len(tests[0].analysis.scores.classes),
        "plots": [one for one in (_views_plot(tests), *_training_plots(tests)) if one],
        "different": differing_settings(tests),
    }


def _views_plot(tests: Sequence[ComparedTest]) -> Plot | None:
    """Accuracy by number of views, a line for each test."""
    series = [views_series(test.letter, test.analysis.views) for test in tests]
    x_label = "clips per video (crops if there is one clip)"
    return plot("Accuracy by number of views", series, x_label=x_label, percent=True, mark_every_count=True)


def _training_plots(tests: Sequence[ComparedTest]) -> list[Plot | None]:
    """The training curves of all tests; None for a metric that no run logged."""
    metrics = {"Training loss": "train/loss", "Validation loss": "val/loss", "Validation accuracy": "val/top1"}
    drawn = []
    for title, key in metrics.items():
        # A test without a training run gets an empty line, so that the other tests keep their colours (see `plot`).
        lines = [(test.letter, *(test.run.series(key) if test.run else (np.empty(0), np.empty(0)))) for test in tests]
        series = [Series(letter, x, y, dots=len(x) < 30) for letter, x, y in lines]
        drawn.append(plot(title, series, x_label="step", percent=key == "val/top1"))
    return drawn
