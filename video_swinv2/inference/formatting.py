"""Formats predictions and search results as text, JSON and CSV. The JSON keys and CSV columns are a public format."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from video_swinv2.escaping import for_csv, for_terminal, terminal_lines
from video_swinv2.files import json_text
from video_swinv2.inference.classifier import Answer
from video_swinv2.inference.over_time import SegmentPrediction
from video_swinv2.inference.predictor import Prediction
from video_swinv2.inference.retrieval import SearchResult

Form = Literal["text", "json", "csv"]
PREDICTION_COLUMNS = ("path", "start_seconds", "end_seconds", "rank", "class", "probability", "error", "views")
SEARCH_COLUMNS = ("path", "rank", "neighbour", "label", "likeness", "error")


def format_predictions(predictions: Sequence[Prediction], form: Form = "text") -> str:
    """Format all predictions as text, as a JSON list, or as rows of CSV without the header (see `csv_header`).

    Each row of CSV is one class of one file, without times. Rows of segments come from `format_segment`. Every answer
    comes with what it is averaged over (`views`). Names in text and CSV are escaped (see `escaping`); JSON has exact
    values.
    """
    if form == "json":
        return json_text([_prediction_as_json(prediction) for prediction in predictions], indent=1)
    if form == "csv":
        # A source that failed after some segments has no answers, and a row with the error only.
        rows: list[Sequence[object]] = []
        for prediction in predictions:
            if prediction.error:
                rows.append((for_csv(prediction.path), "", "", "", "", "", for_csv(prediction.error), ""))
            rows += _class_rows(prediction.path, "", "", prediction.answers, prediction.views)
        return _to_csv(rows)
    lines = []
    for prediction in predictions:
        path = prediction.path
        lines.append(f"{path}: {prediction.error}" if prediction.error else f"{path}  ({prediction.views})")
        lines += _class_lines(prediction.answers)
        if prediction.explanation:
            lines.append(f"  explained in {prediction.explanation}")
        if prediction.skipped:
            lines.append(
                f"  skipped {prediction.skipped} segments because the stream is faster than the model; raise --every, "
                "or choose a --protocol with fewer crops"
            )
    return terminal_lines(lines)


def csv_header(form: Form) -> str:
    """The header row of predictions as CSV; empty for the other forms."""
    return _to_csv([PREDICTION_COLUMNS]) if form == "csv" else ""


def format_segment(path: str, segment: SegmentPrediction, form: Form) -> str:
    """Format the prediction of one segment, to print as soon as it is known.

    Empty for JSON, which is printed as one list at the end and contains the segments.
    """
    start, end = f"{segment.start_seconds:.2f}", f"{segment.end_seconds:.2f}"
    if form == "csv":
        return _to_csv(_class_rows(path, start, end, segment.answers, segment.views))
    if form == "json":
        return ""
    best = ", ".join(f"{answer.name} {100 * answer.probability:.0f} %" for answer in segment.answers[:3])
    return for_terminal(f"{path}  {start:>7s} to {end:>7s} s  {best}  ({segment.views})")


def format_search_results(results: Sequence[SearchResult], form: Form) -> str:
    """Format the neighbours of all queries as text, as a JSON list, or as CSV with a header."""
    if form == "json":
        return json_text([_search_result_as_json(result) for result in results], indent=1)
    if form == "csv":
        rows: list[Sequence[object]] = [SEARCH_COLUMNS]
        for result in results:
            if result.error:
                rows.append((for_csv(result.path), "", "", "", "", for_csv(result.error)))
            for rank, near in enumerate(result.neighbours, start=1):
                names = for_csv(near.path), for_csv(near.label)
                rows.append((for_csv(result.path), rank, *names, f"{near.similarity:.6f}", ""))
        return _to_csv(rows)
    lines = []
    for result in results:
        lines.append(f"{result.path}: {result.error}" if result.error else result.path)
        lines += [f"  {near.similarity:7.4f}  {near.path}" for near in result.neighbours]
        lines += _class_lines(result.answers)
    return terminal_lines(lines)


def _prediction_as_json(prediction: Prediction) -> dict[str, Any]:
    # The keys are public and differ from the names in the code: `windows` are the segments.
    return {
        "path": prediction.path,
        "answers": [asdict(answer) for answer in prediction.answers],
        "views": prediction.views,
        "error": prediction.error,
        "windows": [asdict(segment) for segment in prediction.segments],
        "skipped": prediction.skipped,
        "explanation": prediction.explanation,
    }


def _search_result_as_json(result: SearchResult) -> dict[str, Any]:
    # As above, `likeness` is the cosine similarity.
    return {
        "path": result.path,
        "neighbours": [
            {"path": near.path, "label": near.label, "likeness": near.similarity} for near in result.neighbours
        ],
        "answers": [asdict(answer) for answer in result.answers],
        "error": result.error,
    }


def _class_lines(answers: Sequence[Answer]) -> list[str]:
    return [f"  {100 * answer.probability:5.1f} %  {answer.name}" for answer in answers]


def _class_rows(path: str, start: str, end: str, answers: Sequence[Answer], views: str) -> list[Sequence[object]]:
    return [
        (for_csv(path), start, end, rank, for_csv(answer.name), f"{answer.probability:.6f}", "", views)
        for rank, answer in enumerate(answers, start=1)
    ]


def _to_csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    # `print` adds the last newline.
    return text.getvalue().rstrip("\n")
