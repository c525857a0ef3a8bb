"""The report of a segmentation test: one page from its results.json and mistakes.png."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from video_swinv2.dense.segmentation_pictures import class_colours
from video_swinv2.files import atomic_write
from video_swinv2.pages import render
from video_swinv2.records import Record, read_record
from video_swinv2.report.dense import MISTAKES, REPORT, RESULTS, Images, Share, page_title, picture_text, shown_record

MAX_CONFUSIONS = 12  # rows of the table
MIN_CONFUSED = 0.02  # of the pixels of a class


class _Class(Record, populate_by_name=True):
    name: str = Field(alias="class")
    iou: Share | None
    accuracy: Share | None
    pixels: int


class SegmentationResult(Record, extra="allow"):
    """What the page needs of results.json. A share that is not a number, as of a class without pixels, is None."""

    images: Images
    miou: Share | None
    miou_interval: list[Share | None]
    mean_accuracy: Share | None
    pixel_accuracy: Share | None
    per_class: list[_Class]
    confusion: list[list[Annotated[int, Field(ge=0)]]]


def write_segmentation_report(out: Path) -> None:
    """Write report.html to a folder of a test, from the files in it. Raises UserError if results.json is faulty."""
    result = read_record(out / RESULTS, SegmentationResult)
    extra = result.model_extra or {}
    low, high = result.miou_interval
    values: dict[str, object] = {
        "title": page_title(extra, out),
        "miou": result.miou or 0.0,
        "interval": (low or 0.0, high or 0.0),
        "mean_accuracy": result.mean_accuracy or 0.0,
        "pixel_accuracy": result.pixel_accuracy or 0.0,
        "scored": result.images.scored,
        "failed": result.images.failed,
        "classes": [
            {"name": row.name, "iou": row.iou, "colour": f"rgb({', '.join(map(str, colour))})"}
            for row, colour in zip(result.per_class, class_colours(len(result.per_class)).tolist(), strict=True)
        ],
        "confusions": _confusions(result),
        "mistakes": picture_text(out / MISTAKES),
        "record": shown_record(extra),
    }
    with atomic_write(out / REPORT) as part:
        part.write_bytes(render("video_swinv2.report", "segmentation_report.html.j2", values))


def _confusions(result: SegmentationResult) -> list[dict[str, Any]]:
    """The pairs of classes that are confused most, by the share of the pixels of the true class."""
    names = [row.name for row in result.per_class]
    rows: list[dict[str, Any]] = []
    for true, counts in enumerate(result.confusion):
        for predicted, count in enumerate(counts[: len(names)]):
            share = count / max(sum(counts), 1)
            if predicted != true and share >= MIN_CONFUSED:
                rows.append({"true": names[true], "predicted": names[predicted], "share": share})
    return sorted(rows, key=lambda row: -row["share"])[:MAX_CONFUSIONS]
