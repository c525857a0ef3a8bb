"""The report of one test, made from the scores in its folder: report.html, report.md and results.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from video_swinv2.files import atomic_write, json_text
from video_swinv2.pages import render, tick_marks
from video_swinv2.progress import duration_text
from video_swinv2.report.analysis import Analysis, analyse
from video_swinv2.report.confusion import matrix_data
from video_swinv2.report.curves import two_class_plots
from video_swinv2.report.diagnosis import ViewPoint
from video_swinv2.report.markdown import few_sources_warning, report_text
from video_swinv2.report.metrics import ClassAccuracy
from video_swinv2.report.mistakes import Strip, jpeg_uri, read_strips
from video_swinv2.report.plots import Plot, Series, chance_series, plot
from video_swinv2.report.scores import Scores, load_test, title_of
from video_swinv2.report.training_run import (
    TrainingRun,
    find_training_run,
    flatten,
    folder_of_model,
    read_training_run,
)

MAX_CLASSES_SHOWN_AT_ONCE = 30  # with more classes, only the WORST_CLASSES are shown without a click
WORST_CLASSES = 20
MAX_FAILURES = 500  # on the page; results.json lists all


def write_report(out_dir: Path | str, run_folder: Path | None = None) -> dict[str, Any]:
    """Write report.html, report.md and results.json from scores.npz and, if present, strips.npz in `out_dir`.

    Needs neither the videos nor the model. The page shows the training run in `run_folder`, by default the one in the
    folder of the model file, if there is one. Returns the content of results.json. Raises UserError if the scores are
    missing or damaged or if a file cannot be written, and UsageError if `run_folder` holds no training run.
    """
    out = Path(out_dir)
    analysis = analyse(load_test(out / "scores.npz"))
    model_folder = folder_of_model(analysis.scores.metadata)
    # A folder that the user named must hold a run; one that was only guessed need not.
    run = read_training_run(run_folder) if run_folder else find_training_run(model_folder)
    result: dict[str, Any] = as_json_data(results(analysis, run))
    values = page_values(analysis, run, read_strips(out / "strips.npz"))
    page = render("video_swinv2.report", "report.html.j2", values)
    write_content(out / "report.html", page)
    write_content(out / "report.md", report_text(result))
    write_content(out / "results.json", json_text(result, indent=1, ascii_only=False) + "\n")
    return result


def as_json_data(result: dict[str, Any]) -> Any:
    """The result as it would be read back from a JSON file: tuples become lists."""
    return json.loads(json_text(result))


def write_content(path: Path, content: str | bytes) -> None:
    """Write text or bytes atomically. Raises UserError."""
    # Python holds bytes of file names that are not UTF-8 as lone surrogates, which cannot be encoded: they become `?`.
    with atomic_write(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


def results(analysis: Analysis, run: TrainingRun | None) -> dict[str, Any]:
    """The content of results.json: the figures, as fractions in 0..1, and the record of the test.

    Origins are left out: they are one name per video and stay in scores.npz.
    """
    metrics, (average, top1, interval) = analysis.metrics, analysis.other_average
    return {
        **metrics.figures(),
        "videos": {"listed": metrics.listed, "scored": metrics.scored, "failed": metrics.failed},
        "other_average": {"average": average, "top1": top1, "top1_interval": list(interval)},
        "views_curve": [asdict(point) for point in analysis.views],
        "calibration": asdict(analysis.calibration),
        "class_order_hint": asdict(analysis.hint) if analysis.hint else None,
        "per_class": [asdict(row) for row in metrics.per_class],
        "most_confused": [asdict(pair) for pair in metrics.confused_pairs],
        "surest_mistakes": [asdict(mistake) for mistake in analysis.mistakes],
        "failures": [{"path": path, "reason": reason} for path, reason in failures(analysis.scores)],
        "run": run.record if run else None,
        **{key: value for key, value in analysis.scores.metadata.items() if key != "origins"},
    }


def page_values(analysis: Analysis, run: TrainingRun | None, strips: dict[int, Strip]) -> dict[str, object]:
    """The values of report.html.j2. strips: by row in the scores."""
    scores, metrics, record = analysis.scores, analysis.metrics, analysis.scores.metadata
    shown, rest = split_classes(metrics.per_class)
    failed = failures(scores)
    unit = record.get("unit", "videos")
    return {
        "title": title_of(record),
        "metrics": metrics,
        "few_sources": few_sources_warning(metrics.sources, unit),
        "record": record,
        "unit": unit,
        "basis": f"{metrics.scored} {unit} · {record['protocol']} · data {record['data_fingerprint'][:12]}",
        "record_lines": list(flatten({key: value for key, value in record.items() if key != "origins"})),
        # One of 5000 videos is 0.02 points: with fewer, a second decimal of an accuracy says little.
        "digits": 1 if metrics.scored < 5000 else 2,
        "n_classes": len(scores.classes),
        "classes_shown": shown,
        "classes_rest": rest,
        "matrix": matrix_data(metrics.confusion, scores.classes, unit),
        "pairs": metrics.confused_pairs,
        "calibration": analysis.calibration,
        "reliability": _reliability_frame(),
        "fullest_bin": max(item.n for item in analysis.calibration.bins),
        # A row for each number of clips: protocols have more of them than of crops, and a page is longer than wide.
        "views_table": list(zip(*_rows_by_crops(analysis.views), strict=True)),
        "views_plot": views_plot(analysis.views, metrics.chance),
        "two_class_plots": two_class_plots(analysis.curves, metrics.two_classes)
        if analysis.curves and metrics.two_classes
        else (),
        "other_average": analysis.other_average,
        "hint": analysis.hint,
        "mistakes": analysis.mistakes,
        "strips": strips,
        "explained": any(strip.explanation for strip in strips.values()),
        "jpeg_uri": jpeg_uri,
        # Videos lost in preparation count as failed but have no row in the scores, and so no reason.
        "lost": metrics.failed - len(failed),
        "failures": failed[:MAX_FAILURES],
        "failures_left": max(0, len(failed) - MAX_FAILURES),
        "video_counts": video_counts(analysis),
        "cost": cost_rows(record, run, metrics.listed),
        "run": run,
        "run_lines": list(flatten(run.record)) if run else [],
        "curves": training_plots(run, metrics.chance) if run else [],
        "trained_on_test_data": bool(run) and _training_fingerprint(run) == record["data_fingerprint"],
    }


def failures(scores: Scores) -> list[tuple[str, str]]:
    """(path, reason) of every video that could not be scored."""
    return [(path, reason) for path, reason in zip(scores.paths, scores.reasons, strict=True) if reason]


def split_classes(rows: tuple[ClassAccuracy, ...]) -> tuple[list[ClassAccuracy], list[ClassAccuracy]]:
    """(classes shown at once, classes behind a click), worst first, classes without videos last.

    Up to MAX_CLASSES_SHOWN_AT_ONCE classes are all shown at once.
    """
    # `None` accuracies sort last by the first key; of equally bad classes, those with more videos come first.
    ordered = sorted(rows, key=lambda row: (row.accuracy is None, row.accuracy or 0.0, -row.n))
    cut = len(ordered) if len(ordered) <= MAX_CLASSES_SHOWN_AT_ONCE else WORST_CLASSES
    return ordered[:cut], ordered[cut:]


def video_counts(analysis: Analysis) -> list[tuple[str, str]]:
    """(what, how many): what happened to the listed videos, and how the scored ones are spread over the classes."""
    metrics, record = analysis.metrics, analysis.scores.metadata
    unread = len(failures(analysis.scores))
    counts = np.array([row.n for row in metrics.per_class if row.n])
    return [
        (f"listed in split {record['split']}", str(metrics.listed)),
        ("lost in preparation", str(metrics.failed - unread)),
        ("not readable in the test", str(unread)),
        ("scored, each in every view", str(metrics.scored)),
        ("of these, with damaged frames", str(record.get("videos_with_damaged_frames", 0))),
        ("independent sources", str(metrics.sources) if record.get("origins") else "unknown: each counts as one"),
        ("classes with videos", f"{len(counts)} of {len(metrics.per_class)}"),
        ("per class: minimum, median, maximum", f"{counts.min()}, {np.median(counts):.6g}, {counts.max()}"),
    ]


def cost_rows(record: Mapping[str, Any], run: TrainingRun | None, n: int) -> list[tuple[str, str]]:
    """(what, how much): time and devices of a test of n videos and of its training run, as far as they are recorded."""
    rows = []
    # `seconds` may be missing or, for a tiny test, rounded to 0.
    if record.get("seconds"):
        rows.append(
            ("test", f"{record['seconds']:.6g} s, {n / record['seconds']:.3g} {record.get('unit', 'videos')}/s")
        )
    if "decode_wait_share" in record:
        rows.append(("time waiting for decoding", f"{100 * record['decode_wait_share']:.0f} %"))
    if "device" in record:
        rows.append(("tested on", f"{record.get('processes', 1)} x {record['device']}, {record.get('precision', '')}"))
    known = run.record if run else {}
    if "hours" in known:
        alone, together = (3600 * hours for hours in (known["hours"], known.get("device_hours", known["hours"])))
        devices = f", {duration_text(together)} of device time" if together != alone else ""
        rows.append(("training", f"{duration_text(alone)}{devices}"))
    if "device" in known:
        rows.append(("trained on", f"{known.get('processes', 1)} x {known['device']}"))
    if "parameters" in known:
        rows.append(("parameters", f"{known['parameters'] / 1e6:.3g} M"))
    return rows


def views_plot(points: tuple[ViewPoint, ...], chance: float) -> Plot | None:
    """Top-1 by the number of clips, with a line for each number of crops; by crops if there is only one clip.

    chance: top-1 of a random answer. None if the test has a single view.
    """
    x_label = "crops per video" if points[-1].clips == 1 else "clips per video"
    # Overlapping bands are unreadable, so only the first line, with the most crops, keeps its band. The table beside
    # the plot lists every interval.
    first, *fewer = views_series_by_crops(points)
    series = [first, *(replace(one, low=None, high=None) for one in fewer)]
    series.append(chance_line(chance, series))
    title = "top-1 by number of views"
    return plot(title, series, x_label=x_label, y_label="top-1", percent=True, mark_every_count=True)


def views_series(name: str, points: tuple[ViewPoint, ...]) -> Series:
    """Top-1 by the number of clips with all crops, or by the number of crops if there is one clip."""
    return replace(views_series_by_crops(points)[0], name=name)


def views_series_by_crops(points: tuple[ViewPoint, ...]) -> list[Series]:
    """Lines of top-1: by clips, one for each number of crops, most crops first; if there is one clip, one by crops."""
    # points[-1] has all clips and all crops.
    table = _rows_by_crops(points)
    if points[-1].clips == 1:
        return [_points("top-1", [row[0] for row in table], "crops")]
    return [_points(f"{row[0].crops} crop{'s' * (row[0].crops > 1)}", row, "clips") for row in reversed(table)]


def chance_line(chance: float, series: Sequence[Series]) -> Series:
    """The reference line of plots of top-1."""
    return chance_series(f"chance, {100 * chance:.3g} %", chance, series)


def training_plots(run: TrainingRun, chance: float) -> list[Plot]:
    """The curves of the training run; metrics that were not logged are left out. chance: top-1 of a random answer."""
    # Top-5 is not drawn: it is near 100 % early, and on its axis top-1 would be a flat line at the bottom.
    metrics = {
        "Loss": ("loss", ("train/loss", "val/loss")),
        "Validation accuracy": ("top-1", ("val/top1",)),
        "Learning rate": ("learning rate", ("train/lr",)),
    }
    names = {"train/loss": "training", "val/loss": "validation", "val/top1": "top-1"}
    drawn = []
    for title, (y_label, keys) in metrics.items():
        lines = [(names.get(key, ""), *run.series(key)) for key in keys]
        series = [Series(name, steps, values, dots=len(steps) < 30) for name, steps, values in lines]
        if "val/top1" in keys:
            series.append(chance_line(chance, series))
        drawn.append(plot(title, series, x_label="step", y_label=y_label, percent="val/top1" in keys))
    return [drawing for drawing in drawn if drawing]


def _points(name: str, row: list[ViewPoint], count: str) -> Series:
    """A line through the points of `row`, with x their field `count`: "clips" or "crops"."""
    x, top1 = ([float(getattr(point, key)) for point in row] for key in (count, "top1"))
    low, high = zip(*(point.interval for point in row), strict=True)
    return Series(name, np.array(x), np.array(top1), np.array(low), np.array(high), dots=True)


def _rows_by_crops(points: tuple[ViewPoint, ...]) -> list[list[ViewPoint]]:
    """The points as a table: a row for each number of crops, ascending, and in it a point for each number of clips."""
    return [[point for point in points if point.crops == crops] for crops in sorted({point.crops for point in points})]


def _reliability_frame() -> Plot:
    """The axes of the calibration diagram, 0 to 100 %; the template draws the bins into it."""
    axis = tick_marks(0, 100, " %")
    return Plot("accuracy by confidence", "confidence (probability of the answer)", "accuracy", axis, axis)


def _training_fingerprint(run: TrainingRun | None) -> Any:
    """The fingerprint of the data that the model was trained on; None if it is not recorded."""
    return run.record.get("data", {}).get("data_fingerprint") if run else None
