"""What the reports of segmenters and detectors share: the files of a test, and how a page shows its record."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from video_swinv2.records import Record, read_bytes, read_record

RESULTS, MISTAKES, REPORT = "results.json", "mistakes.png", "report.html"
MAX_PICTURE_BYTES = 2**26
# Keys of results.json that a page shows as they are.
SHOWN = ("model", "model_sha256", "data", "split", "data_fingerprint", "protocol", "protocol_numbers", "device",
         "precision", "processes", "versions", "seconds")  # fmt: skip
Share = Annotated[float, Field(ge=0, le=1)]


class Images(Record):
    """How many images of the split were tested."""

    listed: int
    scored: int
    failed: int


class _Task(Record, extra="ignore"):
    task: str = ""


def dense_task(folder: Path) -> str:
    """`detection` or `segmentation` for the folder of such a test, "" for any other folder.

    Raises UserError for a results.json that cannot be read.
    """
    return read_record(folder / RESULTS, _Task).task if (folder / RESULTS).is_file() else ""


def picture_text(path: Path) -> str:
    """A picture for a data URL, in base64; "" if there is none."""
    return base64.b64encode(read_bytes(path, MAX_PICTURE_BYTES)).decode() if path.is_file() else ""


def shown_record(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The keys of results.json that a page shows as they are, with their values in words."""
    return [(key, _in_words(result[key])) for key in SHOWN if key in result]


def _in_words(value: object) -> str:
    """JSON without its signs: the parts of an object and of a list one after the other."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_in_words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def page_title(result: Mapping[str, Any], out: Path) -> str:
    """The data set and the split."""
    return f"{Path(str(result.get('data', out))).name}, {result.get('split', '')}"
