"""The summary of a clip for the page of `serve`: its classes, how they change over time, and the frames used.

Letters: T frames, S crops, H W pixels, K classes.
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
from video_swinv2.inference.over_time import SegmentPrediction, classify_over_time, request_for, segments_per_batch
from video_swinv2.inference.segments import Segment
from video_swinv2.inference.streams import middle_crop
from video_swinv2.inference.watching import Watcher
from video_swinv2.report.metrics import ranking

SOURCE_NAME = "The clip"  # begins error messages; the browser does not send the real file name
# A contact sheet is a grid of small frames.
TILE_PIXELS = 112  # height
TILE_COLUMNS = 8
TILE_GAP_PIXELS = 2
MAX_TILES = 16  # per segment; longer segments show evenly spaced frames
JPEG_QUALITY = 78


@dataclass(frozen=True)
class Limits:
    """Limits on a single request."""

    upload_bytes: int = 200 * 10**6
    upload_seconds: float = 60.0
    """Time for the upload, from the first byte of the clip to the last."""
    seconds: float = 60.0
    """Time for decoding and classifying the clip."""
    memory_bytes: int = 2 * 2**30
    """Memory of the process that decodes the clip."""
    segments: int = 12
    """Approximate number of segments; they lie further apart in a longer clip."""
    silence_seconds: int = 15
    """How long the client may stall, neither sending nor reading."""


def summarise_clip(classifier: Classifier, descriptor: int, limits: Limits) -> dict[str, Any]:
    """Classify the video in the open file `descriptor`. Returns plain JSON; raises UserError beyond the limits.

    `answers` are those of `predict` for the same file, and `views` says what they are averaged over. `windows` are
    segments of the clip. Each of them has its own answers and views, the times of its first and last frame, its
    probabilities for the classes of the overall `answers` (`shares`, in the same order), and a contact sheet of its
    frames (`film`), of which it shows the middle crop.
    """
    started = time.monotonic()
    batch = segments_per_batch(classifier)
    request = replace(
        request_for(classifier, SOURCE_NAME, ahead=2 * batch),
        whole_file=True,
        max_segments=limits.segments,
        memory_bytes=limits.memory_bytes,
        wait_seconds=limits.seconds,
    )
    classified: list[tuple[Segment, NDArray[np.float64], SegmentPrediction]] = []

    def note(segment: Segment, row: NDArray[np.float64], prediction: SegmentPrediction) -> None:
        # Only small copies of the frames are kept, because all segments at full size could fill the memory.
        # (T, S, H, W, 3) -> (T, H, W, 3)
        tiles = _make_tiles(segment.pixels[:, middle_crop(classifier.protocol)])
        classified.append((replace(segment, pixels=tiles), row, prediction))

    with Watcher(request, descriptor=descriptor, limit_seconds=limits.seconds) as watcher:
        whole = classify_over_time(classifier, watcher, batch, note)
    answers = classifier.top_classes(whole.probabilities)
    # The same ranking as in `top_classes`, as indices into the probabilities (K,) of each segment.
    top_indices = ranking(whole.probabilities[None], len(answers))[0]
    return {
        "answers": [asdict(answer) for answer in answers],
        "views": whole.views,
        "windows": [
            asdict(prediction)
            | {
                "shares": [float(row[i]) for i in top_indices],
                "frames": len(segment.seconds),
                "film": _contact_sheet(segment.pixels),
            }
            for segment, row, prediction in classified
        ],
        "pictures": whole.summary.pictures,
        "seconds": whole.summary.seconds,
        "took_seconds": round(time.monotonic() - started, 2),
    }


def _make_tiles(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) -> at most MAX_TILES evenly spaced ones, at most TILE_PIXELS high: uint8 (n, h, w, 3)."""
    count = min(len(pixels), MAX_TILES)
    chosen = np.linspace(0, len(pixels) - 1, count).round().astype(int)
    height, width = pixels.shape[1:3]
    scale = min(1.0, TILE_PIXELS / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([np.asarray(Image.fromarray(pixels[i]).resize(size, Image.Resampling.BOX)) for i in chosen])


def _contact_sheet(tiles: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> str:
    """Arrange tiles (n, h, w, 3) in rows of TILE_COLUMNS, with gaps between them. Returns a JPEG as a data URL."""
    count, (height, width) = len(tiles), tiles[0].shape[:2]
    columns = min(TILE_COLUMNS, count)
    rows = math.ceil(count / columns)
    row_height, column_width = height + TILE_GAP_PIXELS, width + TILE_GAP_PIXELS
    # There is no gap after the last row and the last column.
    sheet = np.zeros((rows * row_height - TILE_GAP_PIXELS, columns * column_width - TILE_GAP_PIXELS, 3), dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * row_height, number % columns * column_width
        sheet[top : top + height, left : left + width] = tile
    jpeg = io.BytesIO()
    Image.fromarray(sheet).save(jpeg, format="jpeg", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
