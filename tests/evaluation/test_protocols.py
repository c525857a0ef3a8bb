"""Protocols against starts, indices and boxes worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from video_swinv2.errors import UsageError
from video_swinv2.evaluation.protocols import (
    PROTOCOLS,
    clip_starts,
    crop_boxes,
    find_protocol,
    frame_indices,
    plan_views,
    short_side,
)

VIDEOSWIN = PROTOCOLS["videoswin-4x3"]
CENTER = PROTOCOLS["center-1x1"]


@pytest.mark.parametrize(
    ("n", "starts"),
    [
        (1, (0, 0, 0, 0)),
        (5, (0, 0, 0, 0)),
        (63, (0, 0, 0, 0)),
        (64, (0, 0, 0, 0)),  # avg 0.25: 0.125, 0.375, 0.625, 0.875
        (65, (0, 0, 1, 1)),  # avg 0.5: 0.25, 0.75, 1.25, 1.75
        (300, (29, 88, 148, 207)),  # avg 59.25: 29.625, 88.875, 148.125, 207.375
    ],
)
def test_videoswin_starts(n: int, starts: tuple[int, ...]) -> None:
    assert clip_starts(VIDEOSWIN.starts, n, 4, frames=32, stride=2) == starts


@pytest.mark.parametrize(("n", "start"), [(1, 0), (5, 0), (63, 0), (64, 0), (65, 1), (66, 1), (300, 118)])
def test_centre_start(n: int, start: int) -> None:
    assert clip_starts(CENTER.starts, n, 1, frames=32, stride=2) == (start,)


def test_starts_equal_the_published_float_formula() -> None:
    for n in range(1, 700):
        for frames, stride in ((32, 2), (16, 4), (8, 8), (1, 1)):
            average = (n - frames * stride + 1) / 4
            expected = (np.arange(4) * average + average / 2).astype(int) if average > 0 else np.zeros(4, int)
            assert clip_starts("segment-middle", n, 4, frames, stride) == tuple(expected)


def test_frames_go_on_from_the_first_past_the_end() -> None:
    assert frame_indices(0, 4, 2, 1) == (0, 0, 0, 0)
    assert frame_indices(0, 6, 2, 5) == (0, 2, 4, 1, 3, 0)
    assert frame_indices(0, 32, 2, 63) == tuple(range(0, 63, 2))
    assert frame_indices(0, 32, 2, 64) == tuple(range(0, 64, 2))
    assert frame_indices(1, 32, 2, 65) == tuple(range(1, 65, 2))
    assert frame_indices(207, 32, 2, 300) == tuple(range(207, 271, 2))


def test_a_clip_that_fits_never_wraps() -> None:
    for n in range(64, 200):
        for view in plan_views(VIDEOSWIN, n, 224, 398, 32, 2, (224, 224)):
            assert list(view.indices) == sorted(set(view.indices))
            assert view.indices[-1] < n


@pytest.mark.parametrize(
    ("height", "width", "corners"),
    [
        (224, 398, [(0, 0), (0, 174), (0, 87)]),  # left, right, middle
        (398, 224, [(0, 0), (174, 0), (87, 0)]),  # top, bottom, middle
        (224, 399, [(0, 0), (0, 174), (0, 87)]),  # steps are whole: (399 - 224) // 2 = 87
        (224, 224, [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_three_crops(height: int, width: int, corners: list[tuple[int, int]]) -> None:
    boxes = crop_boxes(VIDEOSWIN.boxes, height, width, (224, 224))
    assert boxes == tuple((top, left, 224, 224) for top, left in corners)


def test_centre_crop() -> None:
    assert crop_boxes(CENTER.boxes, 256, 455, (224, 224)) == ((16, 115, 224, 224),)
    assert crop_boxes(CENTER.boxes, 455, 256, (224, 224)) == ((115, 16, 224, 224),)


@pytest.mark.parametrize(("size", "expected"), [(224, 256), (256, 293), (192, 219), (64, 73), (384, 439)])
def test_short_side_of_a_square_crop_does_not_depend_on_the_video(size: int, expected: int) -> None:
    for height, width in ((240, 320), (320, 240), (1080, 1920), (200, 200), (2, 900)):
        assert short_side(height, width, (size, size), CENTER.resize) == expected
        assert short_side(height, width, (size, size), VIDEOSWIN.resize) == size


def test_a_crop_that_is_not_square_is_covered_by_the_smallest_frame() -> None:
    assert short_side(480, 640, (192, 256), Fraction(1)) == 192  # the same shape: nothing is lost
    assert short_side(480, 640, (240, 240), Fraction(1)) == 240
    assert short_side(640, 480, (192, 256), Fraction(1)) == 256  # tall video: the width limits
    assert short_side(400, 400, (192, 256), Fraction(1)) == 256
    for height, width in ((240, 320), (333, 517), (517, 333), (200, 200), (1080, 1920), (101, 99)):
        for size in ((192, 256), (256, 192), (64, 160), (225, 223)):
            side = short_side(height, width, size, Fraction(1))
            long = side * max(height, width) // min(height, width) // 2 * 2
            frame = (side, long) if height <= width else (long, side)
            boxes = crop_boxes(VIDEOSWIN.boxes, *frame, size)
            assert all(top + size[0] <= frame[0] and left + size[1] <= frame[1] for top, left, *_ in boxes)
            assert min(frame[0] - size[0], frame[1] - size[1]) <= 3, "larger than needed"


def test_plan_is_clips_outside_crops_inside() -> None:
    views = plan_views(VIDEOSWIN, 300, 224, 398, 32, 2, (224, 224))
    assert [view.start for view in views] == [29] * 3 + [88] * 3 + [148] * 3 + [207] * 3
    assert [view.box[1] for view in views] == [0, 174, 87] * 4
    assert len(views) == VIDEOSWIN.views == 12
    assert plan_views(CENTER, 10, 256, 340, 1, 1, (224, 224))[0].indices == (5,)


def test_every_row_has_rules_that_exist() -> None:
    for protocol in PROTOCOLS.values():
        assert len(plan_views(protocol, 100, 512, 600, 16, 2, (224, 224))) == protocol.views
        assert protocol.source
        assert protocol.average in ("prob", "logit")


def test_errors_say_what_was_wanted() -> None:
    with pytest.raises(UsageError, match=r"videoswin-4x4.*videoswin-4x3"):
        find_protocol("videoswin-4x4")
    with pytest.raises(ValueError, match="224 x 224"):
        crop_boxes("centre", 200, 300, (224, 224))
    with pytest.raises(ValueError, match="0 frames"):
        clip_starts("segment-middle", 0, 4, 32, 2)
