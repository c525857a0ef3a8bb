"""One clip as the page shows it: the answers, how they go over time, the frames that were used.

T frames, H W pixels.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from video_swinv2.inference.classifier import Classifier
from video_swinv2.inference.over_time import SegmentPrediction, classify_segments, task_for
from video_swinv2.inference.watching import Watcher
from video_swinv2.inference.segments import Segment
from video_swinv2.report.metrics import ranking

NAME = "The clip"
TILE_PIXELS = 112
TILE_COLUMNS = 8
MOST_TILES = 16
JPEG_QUALITY = 78


@dataclass(frozen=True)
class Limits:
    """What one clip may cost: its size and the time to take it, then the time and memory to look at it, and windows."""

    upload_bytes: int = 200 * 10**6
    upload_seconds: float = 60.0
    seconds: float = 60.0
    memory_bytes: int = 2 * 2**30
    windows: int = 24


def summarise_clip(classifier: Classifier, descriptor: int, limits: Limits) -> dict[str, Any]:
    """All that is said of the open file `descriptor`, as plain JSON; UserError where it cannot be read in the limits.

    `answers` are of the mean of all `windows`; each window has its own, its probabilities of the classes of `answers`
    (`shares`, in their order), the seconds of its frames and a picture of them.
    """
    started = time.monotonic()
    task = task_for(classifier.card, NAME, ahead=2 * classifier.batch_views)
    task = replace(task, max_segments=limits.windows, memory_bytes=limits.memory_bytes, wait_seconds=limits.seconds)
    seen_windows: list[tuple[Segment, NDArray[np.float64], SegmentPrediction]] = []

    def note(window: Segment, row: NDArray[np.float64], moment: SegmentPrediction) -> None:
        seen_windows.append((replace(window, pixels=_tiles(window.pixels)), row, moment))

    with Watcher(task, descriptor=descriptor, limit_seconds=limits.seconds) as watcher:
        mean, seen = classify_segments(classifier, watcher, classifier.batch_views, note)
    answers = classifier.best(mean)
    places = ranking(mean[None], len(answers))[0]
    return {
        "answers": [asdict(answer) for answer in answers],
        "windows": [
            asdict(moment)
            | {
                "shares": [float(row[place]) for place in places],
                "frames": len(window.seconds),
                "film": _film(window.pixels),
            }
            for window, row, moment in seen_windows
        ],
        "pictures": seen.pictures,
        "seconds": seen.seconds,
        "took_seconds": round(time.monotonic() - started, 2),
    }


def _tiles(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(T, H, W, 3) -> (up to MOST_TILES, h, w, 3), evenly spread and small."""
    count = min(len(pixels), MOST_TILES)
    chosen = np.linspace(0, len(pixels) - 1, count).round().astype(int)
    height, width = pixels.shape[1:3]
    scale = min(1.0, TILE_PIXELS / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([np.asarray(Image.fromarray(pixels[i]).resize(size, Image.Resampling.BOX)) for i in chosen])


def _film(tiles: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> str:
    """Tiles in rows of TILE_COLUMNS as the data URL of one JPEG."""
    count, (height, width) = len(tiles), tiles[0].shape[:2]
    columns = min(TILE_COLUMNS, count)
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), dtype=np.uint8)
    for place, tile in enumerate(tiles):
        top, left = place // columns * (height + 2), place % columns * (width + 2)
        sheet[top : top + height, left : left + width] = tile
    jpeg = io.BytesIO()
    Image.fromarray(sheet).save(jpeg, format="jpeg", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
