"""The report of a detection test: one page from its results.json and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from video_swinv2.files import atomic_write
from video_swinv2.pages import render
from video_swinv2.records import Record, read_record
from video_swinv2.report.dense import MISTAKES, REPORT, RESULTS, Images, Share, page_title, picture_text, shown_record

DETECTIONS, MISSED = "detections.json", "missed.png"
ROWS = {
    "ap": "AP, the mean over IoU from 0.50 to 0.95",
    "ap50": "AP50, at an IoU of 0.50",
    "ap75": "AP75, at an IoU of 0.75",
    "ap_small": "AP of small objects (up to 32 x 32 pixels)",
    "ap_medium": "AP of medium objects (to 96 x 96 pixels)",
    "ap_large": "AP of large objects",
    "ar1": "AR1, recall with one detection per image",
    "ar10": "AR10, with ten",
    "ar100": "AR100, with a hundred",
    "ar_small": "AR100 of small objects",
    "ar_medium": "AR100 of medium objects",
    "ar_large": "AR100 of large objects",
}
Bounds = Annotated[list[Share | None], Field(min_length=2, max_length=2)]


class _Figures(Record):
    ap: Share | None
    ap50: Share | None
    ap75: Share | None
    ap_small: Share | None
    ap_medium: Share | None
    ap_large: Share | None
    ar1: Share | None
    ar10: Share | None
    ar100: Share | None
    ar_small: Share | None
    ar_medium: Share | None
    ar_large: Share | None
    intervals: dict[str, Bounds]


class _Precision(Record):
    ap: Share | None
    ap50: Share | None


class _Class(Record, populate_by_name=True):
    name: str = Field(alias="class")
    objects: int
    boxes: _Precision
    masks: _Precision | None = None


class DetectionResult(Record, extra="allow"):
    """What the page needs of results.json. A share that is not a number, as with nothing to find, is None."""

    images: Images
    boxes: _Figures
    masks: _Figures | None = None
    per_class: list[_Class]
    sure_score: Share


def write_detection_report(out: Path) -> None:
    """Write report.html to a folder of a test, from the files in it. Raises UserError if results.json is faulty."""
    result = read_record(out / RESULTS, DetectionResult)
    extra = result.model_extra or {}
    values: dict[str, object] = {
        "title": page_title(extra, out),
        "boxes": result.boxes,
        "masks": result.masks,
        "scored": result.images.scored,
        "failed": result.images.failed,
        "rows": [
            (text, [(getattr(kind, name), kind.intervals.get(name)) for kind in (result.boxes, result.masks) if kind])
            for name, text in ROWS.items()
        ],
        "classes": result.per_class,
        "sure": result.sure_score,
        "mistakes": picture_text(out / MISTAKES),
        "missed": picture_text(out / MISSED),
        "record": shown_record(extra),
    }
    with atomic_write(out / REPORT) as part:
        part.write_bytes(render("video_swinv2.report", "detection_report.html.j2", values))
