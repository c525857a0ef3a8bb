"""Predictions as text for people, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from video_swinv2.inference.classifier import Answer
from video_swinv2.inference.over_time import SegmentPrediction
from video_swinv2.inference.predictor import Prediction
from video_swinv2.inference.retrieval import SearchResult

Form = Literal["text", "json", "csv"]
FOUND_COLUMNS = ("path", "rank", "neighbour", "label", "likeness", "error")
COLUMNS = ("path", "start_seconds", "end_seconds", "rank", "class", "probability", "error")


def show(predictions: Sequence[Prediction], form: Form = "text") -> str:
    """All predictions: text, a JSON list of them, or rows of CSV without their header.

    In CSV a class is a row; those of windows have times (and are left to `format_segment`), those of the whole have none.
    """
    if form == "json":
        return json.dumps([asdict(prediction) for prediction in predictions], indent=1)
    if form == "csv":
        rows: list[Sequence[object]] = []
        for prediction in predictions:
            if prediction.error:
                rows.append((prediction.path, "", "", "", "", "", prediction.error))
            rows += _rows(prediction.path, "", "", prediction.answers)
        return _csv(rows)
    lines = []
    for prediction in predictions:
        lines.append(f"{prediction.path}: {prediction.error}" if prediction.error else prediction.path)
        lines += [f"  {100 * answer.probability:5.1f} %  {answer.name}" for answer in prediction.answers]
        if prediction.skipped:
            lines.append(
                f"  {prediction.skipped} windows came faster than the model answers and were skipped; raise --every"
            )
    return "\n".join(lines)


def header(form: Form) -> str:
    """What stands before everything else, '' for nothing."""
    return _csv([COLUMNS]) if form == "csv" else ""


def format_segment(path: str, moment: SegmentPrediction, form: Form) -> str:
    """The answers of one window, as soon as they are known; '' in JSON, which is whole only at the end."""
    start, end = f"{moment.start_seconds:.2f}", f"{moment.end_seconds:.2f}"
    if form == "csv":
        return _csv(_rows(path, start, end, moment.answers))
    if form == "json":
        return ""
    said = ", ".join(f"{answer.name} {100 * answer.probability:.0f} %" for answer in moment.answers[:3])
    return f"{path}  {start:>7s} to {end:>7s} s  {said}"


def format_search_results(found: Sequence[SearchResult], form: Form) -> str:
    """The neighbours of all queries: text, a JSON list, or CSV with a header."""
    if form == "json":
        return json.dumps([asdict(one) for one in found], indent=1)
    if form == "csv":
        rows: list[Sequence[object]] = [FOUND_COLUMNS]
        for one in found:
            if one.error:
                rows.append((one.path, "", "", "", "", one.error))
            for rank, near in enumerate(one.neighbours, start=1):
                rows.append((one.path, rank, near.path, near.label, f"{near.likeness:.6f}", ""))
        return _csv(rows)
    lines = []
    for one in found:
        lines.append(f"{one.path}: {one.error}" if one.error else one.path)
        lines += [f"  {near.likeness:7.4f}  {near.path}" for near in one.neighbours]
        lines += [f"  {100 * answer.probability:5.1f} %  {answer.name}" for answer in one.answers]
    return "\n".join(lines)


def _rows(path: str, start: str, end: str, answers: Sequence[Answer]) -> list[Sequence[object]]:
    return [
        (path, start, end, rank, answer.name, f"{answer.probability:.6f}", "")
        for rank, answer in enumerate(answers, start=1)
    ]


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")
