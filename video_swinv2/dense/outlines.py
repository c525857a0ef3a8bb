"""The outlines of objects as COCO writes them, polygons or run lengths, and the masks that they stand for.

Letters: H W pixels.

    [[x, y, x, y, ...], ...]                          polygons, whose union is the object
    {"size": [H, W], "counts": [zeros, ones, ...]}    run lengths, column by column
    {"size": [H, W], "counts": "PYQ..."}              the same, as a text that COCO's tools write

An outline is checked before it is decoded: the libraries write beyond their arrays for run lengths of another total.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_swinv2.errors import UsageError

MAX_POINTS = 10**5  # of the polygons of one object
MAX_COUNTS = 10**6  # characters or numbers of the run lengths of one object


def coco_masks() -> ModuleType:
    """faster-coco-eval's functions for run lengths. Raises UsageError if it is not installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise UsageError("faster-coco-eval is not installed; pip install 'video-swinv2[dense]'") from error
    module: ModuleType = mask
    return module


def outline_fault(outline: object, size: tuple[int, int]) -> str:
    """What is wrong with an outline in an image of `size` (H, W); '' if it can be decoded."""
    if isinstance(outline, dict):
        try:
            counts = run_lengths(outline.get("counts"))
        except ValueError as error:
            return str(error)
        if outline.get("size") != list(size):
            return f"run lengths for a size of {outline.get('size')!r:.40}, in an image of {list(size)} (height, width)"
        if sum(counts) != size[0] * size[1]:
            return f"run lengths of {sum(counts)} pixels, in an image of {size[0] * size[1]}"
        return ""
    if not isinstance(outline, list) or not outline:
        return "neither a list of polygons nor run lengths"
    if sum(len(polygon) if isinstance(polygon, list) else 0 for polygon in outline) > 2 * MAX_POINTS:
        return f"polygons of more than {MAX_POINTS:,} points"
    faults = (_polygon_fault(polygon, size) for polygon in outline)
    return next((fault for fault in faults if fault), "")


def _polygon_fault(polygon: object, size: tuple[int, int]) -> str:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return "a polygon that is no list of three or more points x, y"
    if not set(map(type, polygon)) <= {int, float}:  # a data set has millions of numbers: no loop in Python
        odd = next(number for number in polygon if type(number) not in (int, float))
        return f"a polygon with the coordinate {odd!r:.40}"
    # Finite, and not too far outside: the libraries' memory grows with the coordinates. NaN is not.
    points = np.abs(np.array(polygon, dtype=np.float64).reshape(-1, 2))
    if not (points <= [2 * size[1], 2 * size[0]]).all():
        return f"a polygon with the coordinate {np.max(points):g}, far outside the image"
    return ""


def run_lengths(counts: object) -> list[int]:
    """The numbers of zeros, ones, zeros, ... of run lengths, given as a list or as COCO's text.

    Raises ValueError if they are neither.
    """
    if not isinstance(counts, str | list) or len(counts) > MAX_COUNTS:
        raise ValueError(f"run lengths that are no list or text of up to {MAX_COUNTS:,}")
    numbers = _from_text(counts) if isinstance(counts, str) else counts
    if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in numbers):
        raise ValueError("run lengths that are no whole numbers from 0 on")
    return numbers


def _from_text(text: str) -> list[int]:
    """COCO's text: numbers of 5 bits per character, the lowest first, a sign bit, and from the third number on the
    difference to the last but one."""
    numbers: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"run lengths with the character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of this number
            if bits & 16:
                value -= 1 << shift
            numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("run lengths that end in the middle of a number")
    return numbers


def decode_outline(outline: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The mask of an outline without faults, uint8 (H, W), 1 inside."""
    height, width = size
    if isinstance(outline, dict):
        counts = run_lengths(outline["counts"])
        # (W * H,), column by column -> (W, H) -> (H, W)
        return np.repeat(np.arange(len(counts), dtype=np.uint8) % 2, counts).reshape(width, height).T.copy()
    masks = coco_masks()
    mask: NDArray[np.uint8] = masks.decode(masks.merge(masks.frPyObjects(outline, height, width)))
    return mask


def encode_mask(mask: NDArray[np.uint8]) -> dict[str, object]:
    """A mask, uint8 (H, W), 1 inside -> run lengths with COCO's text, as a dictionary that JSON can hold."""
    found = coco_masks().encode(np.asfortranarray(mask))
    counts = found["counts"]
    return {"size": [*mask.shape], "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def decode_outlines(outlines: Sequence[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The masks of several outlines in an image of `size` (H, W): uint8 (N, H, W)."""
    masks = [decode_outline(outline, size) for outline in outlines]
    return np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8)
