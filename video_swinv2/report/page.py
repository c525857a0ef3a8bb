"""The report of a test, made from the scores in its folder at any time: a page, a text, and figures for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_swinv2.files import atomic_write
from video_swinv2.pages import render, tick_marks
from video_swinv2.report.diagnosis import (
    Calibration,
    OrderHint,
    ViewPoint,
    calibrate,
    order_hint,
    view_grid,
    views_curve,
)
from video_swinv2.report.intervals import Interval
from video_swinv2.report.markdown import report_text
from video_swinv2.report.matrix import matrix_data
from video_swinv2.report.metrics import (
    ClassAccuracy,
    Metrics,
    measure,
    measure_scores,
    ranking,
    sources_of,
    video_probabilities,
)
from video_swinv2.report.mistakes import Mistake, read_strips, surest_mistakes
from video_swinv2.report.plots import Plot, Series, plot
from video_swinv2.report.runs import Run, find_run, flatten, model_folder, read_run
from video_swinv2.report.scores import Scores, load_scores

ALL_CLASSES_UP_TO = 30
WORST_CLASSES = 20
MOST_FAILURES = 500
OTHER = {"prob": "logit", "logit": "prob"}


@dataclass(frozen=True)
class Analysis:
    """All there is to say of a test; `other_average` is top-1 and its interval with views averaged the other way.

    right: (scored videos,) whether each was answered rightly.
    """

    scores: Scores
    metrics: Metrics
    right: NDArray[np.bool_]
    calibration: Calibration
    views: tuple[ViewPoint, ...]
    other_average: tuple[str, float, Interval]
    hint: OrderHint | None
    mistakes: tuple[Mistake, ...]


def analyse(scores: Scores) -> Analysis:
    """Every figure, from the scores alone. Raises UserError where not one video was scored."""
    record = scores.metadata
    average, seed = record.get("average", "prob"), record.get("seed", 0)
    probabilities = video_probabilities(scores, average)
    metrics = measure_scores(scores, probabilities, seed=seed)
    labels, sources = scores.labels[scores.scored], sources_of(scores)
    answers = ranking(probabilities, 1)[:, 0]
    confidences = np.minimum(np.take_along_axis(probabilities, answers[:, None], axis=1)[:, 0], 1.0)
    other = ranking(video_probabilities(scores, OTHER[average]), 5)
    again = measure(labels, other, scores.classes, listed=metrics.listed, seed=seed, sources=sources)
    grid = view_grid(record, scores.logits.shape[1])
    return Analysis(
        scores=scores,
        metrics=metrics,
        right=answers == labels,
        calibration=calibrate(confidences, answers == labels),
        views=views_curve(scores.logits[scores.scored], labels, sources, grid, average=average, seed=seed),
        other_average=(OTHER[average], again.top1, again.top1_interval),
        hint=order_hint(labels, answers, scores.classes, seed),
        mistakes=surest_mistakes(scores, probabilities),
    )


def write_report(out_dir: Path | str, run_folder: Path | None = None) -> dict[str, Any]:
    """Write report.html, report.md and results.json from scores.npz, with the strips kept beside it.

    Neither videos nor model are needed. The training run is shown too if `run_folder`, by default the model's, holds
    one. Returns what results.json holds. Raises UserError where the scores are missing or damaged or a file cannot be
    written, UsageError where there is no run in `run_folder`.
    """
    out = Path(out_dir)
    analysis = analyse(load_scores(out / "scores.npz"))
    run = read_run(run_folder) if run_folder else find_run(model_folder(analysis.scores.metadata))
    result: dict[str, Any] = plain(make_results(analysis, run))
    page = render("video_swinv2.report", "report.html.j2", contents(analysis, run, read_strips(out / "strips.npz")))
    write_text(out / "report.html", page)
    write_text(out / "report.md", report_text(result))
    write_text(out / "results.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def plain(result: dict[str, Any]) -> Any:
    """The same as a JSON file gives it back."""
    return json.loads(json.dumps(result))


def write_text(path: Path, content: str | bytes) -> None:
    """Write a whole file; bytes of a file name that are no text become a mark. Raises UserError."""
    with atomic_write(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


def make_results(analysis: Analysis, run: Run | None) -> dict[str, Any]:
    """What results.json holds: the figures, fractions in 0..1, and the record of the test."""
    metrics, (average, top1, interval) = analysis.metrics, analysis.other_average
    return {
        **metrics.figures(),
        "videos": {"listed": metrics.listed, "scored": metrics.scored, "failed": metrics.failed},
        "sources": metrics.sources,
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


def contents(analysis: Analysis, run: Run | None, strips: dict[int, str]) -> dict[str, object]:
    """What the template shows. strips: place in the list -> data URI of what the model saw."""
    scores, metrics, record = analysis.scores, analysis.metrics, analysis.scores.metadata
    shown, rest = split_classes(metrics.per_class)
    failed = failures(scores)
    unit = record.get("unit", "videos")
    return {
        "metrics": metrics,
        "record": record,
        "unit": unit,
        "of": f"{metrics.scored} {unit} · {record['protocol']} · data {record['data_fingerprint'][:12]}",
        "record_lines": list(flatten({key: value for key, value in record.items() if key != "origins"})),
        "digits": 1 if metrics.scored < 5000 else 2,
        "n_classes": len(scores.classes),
        "classes_shown": shown,
        "classes_rest": rest,
        "matrix": matrix_data(metrics.confusion, scores.classes, unit),
        "pairs": metrics.confused_pairs,
        "calibration": analysis.calibration,
        "reliability": _reliability_frame(),
        "most_sure": max(item.n for item in analysis.calibration.bins),
        "views_table": _by_crops(analysis.views),
        "views_plot": views_plot(analysis.views),
        "other_average": analysis.other_average,
        "hint": analysis.hint,
        "mistakes": analysis.mistakes,
        "strips": strips,
        "lost": metrics.failed - len(failed),
        "failures": failed[:MOST_FAILURES],
        "failures_left": max(0, len(failed) - MOST_FAILURES),
        "account": account(analysis),
        "cost": cost(record, run, metrics.listed),
        "run": run,
        "run_lines": list(flatten(run.record)) if run else [],
        "curves": run_plots(run) if run else [],
        "trained_on_it": bool(run) and _fingerprint_of_training(run) == record["data_fingerprint"],
    }


def failures(scores: Scores) -> list[tuple[str, str]]:
    """(path, reason) of the videos that could not be scored."""
    return [(path, reason) for path, reason in zip(scores.paths, scores.reasons, strict=True) if reason]


def split_classes(rows: tuple[ClassAccuracy, ...]) -> tuple[list[ClassAccuracy], list[ClassAccuracy]]:
    """(shown at once, behind a click), worst first; classes without videos last. A short list is shown whole."""
    ordered = sorted(rows, key=lambda row: (row.accuracy is None, row.accuracy or 0.0, -row.n))
    cut = len(ordered) if len(ordered) <= ALL_CLASSES_UP_TO else WORST_CLASSES
    return ordered[:cut], ordered[cut:]


def account(analysis: Analysis) -> list[tuple[str, str]]:
    """(what, how many) of the videos of the test, from the list to the score, and how they fall on the classes."""
    metrics, record = analysis.metrics, analysis.scores.metadata
    unread = len(failures(analysis.scores))
    counts = np.array([row.n for row in metrics.per_class if row.n])
    return [
        (f"listed in split {record['split']}", str(metrics.listed)),
        ("lost in preparation", str(metrics.failed - unread)),
        ("could not be read in the test", str(unread)),
        ("scored, each in every view", str(metrics.scored)),
        ("of these with damaged frames", str(record.get("videos_with_damaged_frames", 0))),
        ("different sources they were cut from", str(metrics.sources) if record.get("origins") else "not known"),
        ("classes with videos", f"{len(counts)} of {len(metrics.per_class)}"),
        ("in a class: fewest, median, most", f"{counts.min()}, {np.median(counts):.6g}, {counts.max()}"),
    ]


def cost(record: Mapping[str, Any], run: Run | None, n: int) -> list[tuple[str, str]]:
    """(what, how much) of time and machines, as far as it was recorded, for a test of n videos and its model's run."""
    rows = []
    if record.get("seconds"):
        rows.append(
            ("test", f"{record['seconds']:.6g} s, {n / record['seconds']:.3g} {record.get('unit', 'videos')}/s")
        )
    if "decode_wait_share" in record:
        rows.append(("of it waiting for decoding", f"{100 * record['decode_wait_share']:.0f} %"))
    if "device" in record:
        rows.append(("tested on", f"{record.get('processes', 1)} x {record['device']}, {record.get('precision', '')}"))
    known = run.record if run else {}
    if "hours" in known:
        rows.append(
            ("training", f"{known['hours']:.3g} h, {known.get('device_hours', known['hours']):.3g} device hours")
        )
    if "device" in known:
        rows.append(("trained on", f"{known.get('processes', 1)} x {known['device']}"))
    if "parameters" in known:
        rows.append(("parameters", f"{known['parameters'] / 1e6:.3g} M"))
    return rows


def views_plot(points: tuple[ViewPoint, ...]) -> Plot | None:
    """Top-1 over the number of clips, a line for each number of crops; over crops where there is one clip."""
    across = "crops of each" if points[-1].clips == 1 else "clips of each"
    # One band can be read, several on top of each other cannot; the table has every interval.
    first, *fewer = views_series_by_crops(points)
    series = [first, *(replace(one, low=None, high=None) for one in fewer)]
    return plot("top-1 over views", series, x_label=across, percent=True, mark_every_count=True)


def views_series(name: str, points: tuple[ViewPoint, ...]) -> Series:
    """Top-1 over the number of clips with every crop, or over crops where there is one clip; without intervals."""
    return replace(views_series_by_crops(points)[0], name=name, low=None, high=None)


def views_series_by_crops(points: tuple[ViewPoint, ...]) -> list[Series]:
    """A line over clips for each number of crops, all crops first; a single line over crops where there is one clip."""
    table = _by_crops(points)
    if points[-1].clips == 1:
        return [_points("top-1", [row[0] for row in table], "crops")]
    return [_points(f"{row[0].crops} crop{'s' * (row[0].crops > 1)}", row, "clips") for row in reversed(table)]


def run_plots(run: Run) -> list[Plot]:
    """The curves of the training run that there are."""
    figures = {
        "Loss": ("train/loss", "val/loss"),
        "Accuracy in validation": ("val/top1", "val/top5"),
        "Learning rate": ("train/lr",),
    }
    words = {"train/loss": "training", "val/loss": "validation", "val/top1": "top-1", "val/top5": "top-5"}
    drawn = []
    for title, keys in figures.items():
        lines = [(words.get(key, ""), *run.series(key)) for key in keys]
        series = [Series(name, steps, values, dots=len(steps) < 30) for name, steps, values in lines]
        drawn.append(plot(title, series, x_label="step", percent=title.startswith("Accuracy")))
    return [drawing for drawing in drawn if drawing]


def _points(name: str, row: list[ViewPoint], count: str) -> Series:
    x, top1 = ([float(getattr(point, key)) for point in row] for key in (count, "top1"))
    low, high = zip(*(point.interval for point in row), strict=True)
    return Series(name, np.array(x), np.array(top1), np.array(low), np.array(high), dots=True)


def _by_crops(points: tuple[ViewPoint, ...]) -> list[list[ViewPoint]]:
    """A row for each number of crops, clips ascending."""
    return [[point for point in points if point.crops == crops] for crops in sorted({point.crops for point in points})]


def _reliability_frame() -> Plot:
    axis = tick_marks(0, 100, " %")
    return Plot("how often answers are right, by how sure they are", "probability of the answer", "right", axis, axis)


def _fingerprint_of_training(run: Run | None) -> Any:
    return run.record.get("data", {}).get("data_fingerprint") if run else None
