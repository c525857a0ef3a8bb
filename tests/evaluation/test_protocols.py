"""Protocols compared with starts, indices and boxes worked out by hand, and with the formulas of their sources."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from video_swinv2.data.sampling import frame_indices
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.placement import clip_indices, crop_boxes, resized_short_side
from video_swinv2.evaluation.protocols import PROTOCOLS, Protocol, find_protocol, find_protocols, plan_views

VIDEOSWIN = PROTOCOLS["videoswin-4x3"]
CENTER = PROTOCOLS["center-1x1"]
SLOWFAST = PROTOCOLS["slowfast-10x3"]
VIDEOMAE = PROTOCOLS["videomae-5x3"]
SWINV2G = PROTOCOLS["swinv2g-4x5"]
FRAMES = {  # protocol: the frames and stride of its authors
    "center-1x1": (32, 2),
    "videoswin-4x3": (32, 2),
    "slowfast-10x3": (8, 8),
    "videomae-5x3": (16, 4),
    "swinv2g-4x5": (8, 8),
}
STEPS_OF_9 = (0, 9, 18, 27, 36, 45, 54, 63)  # linspace(0, 63, 8)


def starts(name: str, n: int) -> tuple[int, ...]:
    protocol = PROTOCOLS[name]
    return tuple(clip[0] for clip in clip_indices(protocol.starts, n, protocol.clips, *FRAMES[name]))


@pytest.mark.parametrize(
    ("name", "by_length"),
    [
        ("center-1x1", {1: [0], 5: [0], 63: [0], 64: [0], 65: [1], 66: [1], 300: [118]}),
        (
            "videoswin-4x3",
            {
                1: [0] * 4,
                5: [0] * 4,
                63: [0] * 4,
                64: [0] * 4,  # avg 0.25: 0.125, 0.375, 0.625, 0.875
                65: [0, 0, 1, 1],  # avg 0.5: 0.25, 0.75, 1.25, 1.75
                300: [29, 88, 148, 207],  # avg 59.25: 29.625, 88.875, 148.125, 207.375
            },
        ),
        (
            "slowfast-10x3",
            {
                1: [0] * 10,
                5: [0] * 10,
                63: [0] * 10,
                64: [0] * 10,
                65: [0] * 10,  # slack 1: 0, 0.1, ..., 0.9
                300: [0, 23, 47, 70, 94, 118, 141, 165, 188, 212],  # slack 236: steps of 23.6
            },
        ),
        (
            "videomae-5x3",
            {
                1: [0] * 5,
                5: [0] * 5,
                63: [0] * 5,  # frames 0, 4, ..., 60 are kept: 16 of them
                64: [0] * 5,
                65: [0, 0, 0, 0, 4],  # 17 are kept, slack 1: 0, 0.25, 0.5, 0.75, 1
                300: [0, 56, 116, 176, 236],  # 75 are kept, slack 59: 0, 14.75, 29.5, 44.25, 59
            },
        ),
        (
            "swinv2g-4x5",
            {1: [0] * 4, 5: [0] * 4, 63: [0] * 4, 64: [0] * 4, 65: [0, 0, 1, 1], 300: [29, 88, 148, 207]},
        ),
    ],
)
def test_starts(name: str, by_length: dict[int, list[int]]) -> None:
    for n, expected in by_length.items():
        assert list(starts(name, n)) == expected, n


@pytest.mark.parametrize(
    ("name", "n", "clip", "indices"),
    [
        ("videoswin-4x3", 1, 0, (0,) * 32),
        ("videoswin-4x3", 5, 0, tuple((0, 2, 4, 1, 3)[i % 5] for i in range(32))),  # continues from the first frame
        ("videoswin-4x3", 63, 0, tuple(range(0, 63, 2))),
        ("videoswin-4x3", 64, 3, tuple(range(0, 64, 2))),
        ("videoswin-4x3", 65, 2, tuple(range(1, 65, 2))),
        ("videoswin-4x3", 300, 3, tuple(range(207, 271, 2))),
        ("center-1x1", 300, 0, tuple(range(118, 182, 2))),
        ("slowfast-10x3", 1, 9, (0,) * 8),
        ("slowfast-10x3", 5, 0, (0, 4, 4, 4, 4, 4, 4, 4)),  # stops at the last frame
        ("slowfast-10x3", 63, 5, (0, 9, 18, 27, 36, 45, 54, 62)),
        ("slowfast-10x3", 64, 5, STEPS_OF_9),
        ("slowfast-10x3", 65, 9, STEPS_OF_9),  # from 0.9 to 63.9
        ("slowfast-10x3", 300, 9, tuple(212 + step for step in STEPS_OF_9)),  # ends at 275 of 299
        ("videomae-5x3", 1, 4, (0,) * 16),
        ("videomae-5x3", 5, 0, (0, *(4,) * 15)),  # repeats the last kept frame
        ("videomae-5x3", 63, 4, tuple(range(0, 63, 4))),
        ("videomae-5x3", 64, 4, tuple(range(0, 64, 4))),
        ("videomae-5x3", 65, 4, tuple(range(4, 65, 4))),
        ("videomae-5x3", 300, 4, tuple(range(236, 300, 4))),
        ("swinv2g-4x5", 300, 1, tuple(range(88, 152, 8))),
    ],
)
def test_indices_of_a_clip(name: str, n: int, clip: int, indices: tuple[int, ...]) -> None:
    protocol = PROTOCOLS[name]
    assert clip_indices(protocol.starts, n, protocol.clips, *FRAMES[name])[clip] == indices


def test_videoswin_starts_equal_the_published_float_formula() -> None:
    for n in range(1, 700):
        for frames, stride in ((32, 2), (16, 4), (8, 8), (1, 1)):
            average = (n - frames * stride + 1) / 4
            expected = (np.arange(4) * average + average / 2).astype(int) if average > 0 else np.zeros(4, int)
            found = clip_indices("videoswin", n, 4, frames, stride)
            assert tuple(clip[0] for clip in found) == tuple(expected)


@pytest.mark.parametrize("fps", [30, 25, 60, 15])
def test_slowfast_equals_its_linspace_at_30_frames_a_second(fps: int) -> None:
    """The source's own steps in torch, but in float64: in float32 a whole number may come out just below it."""
    for n in (1, 5, 63, 64, 65, 250, 300, 601):
        for frames, stride in ((8, 8), (32, 2), (16, 4)):
            span = frames * stride * fps / 30
            for clip, found in enumerate(clip_indices("slowfast", n, 10, frames, stride, fps)):
                start = max(n - span, 0) * clip / 10
                places = torch.linspace(start, start + span - 1, frames, dtype=torch.float64).clamp(0, n - 1)
                assert found == tuple((places + 1e-9).long().tolist())


def test_slowfast_strides_are_in_frames_at_30_a_second() -> None:
    # 8 x 8 at 15 a second are 32 frames of the file: linspace(0, 31, 8) = 0, 4.43, 8.86, 13.29, 17.71, 22.14, 26.57, 31
    assert clip_indices("slowfast", 32, 1, 8, 8, 15)[0] == (0, 4, 8, 13, 17, 22, 26, 31)
    assert clip_indices("slowfast", 52, 10, 8, 8, 15.0004)[5][0] == 10  # half of the slack of 20
    assert clip_indices("videomae", 300, 5, 16, 4, 15) == clip_indices("videomae", 300, 5, 16, 4, 30)


def test_videomae_equals_its_float_formula() -> None:
    for n in range(1, 400):
        kept = list(range(0, n, 4))
        kept += [kept[-1]] * (16 - len(kept))
        step = max((len(kept) - 16) / 4, 0)
        expected = tuple(tuple(kept[int(k * step) :][:16]) for k in range(5))
        assert clip_indices("videomae", n, 5, 16, 4) == expected
    assert clip_indices("videomae", 300, 1, 16, 4)[0][0] == 4 * 29  # one clip is the middle one


def test_frames_past_the_end_continue_from_the_first() -> None:
    assert frame_indices(0, 4, 2, 1) == (0, 0, 0, 0)
    assert frame_indices(0, 6, 2, 5) == (0, 2, 4, 1, 3, 0)


def test_a_clip_that_fits_never_wraps() -> None:
    for n in range(64, 200):
        for name, protocol in PROTOCOLS.items():
            frames, stride = FRAMES.get(name, (32, 2))
            for view in plan_views(protocol, n, 256, 398, frames, stride, (224, 224)):
                assert list(view.indices) == sorted(set(view.indices))
                assert 0 <= view.start == view.indices[0]
                assert view.indices[-1] < n


WIDE, TALL, ODD, SQUARE = (224, 398), (398, 224), (224, 399), (224, 224)


@pytest.mark.parametrize(
    ("protocol", "frame", "corners"),
    [
        (VIDEOSWIN, WIDE, [(0, 0), (0, 174), (0, 87)]),  # left, right, middle
        (VIDEOSWIN, TALL, [(0, 0), (174, 0), (87, 0)]),  # top, bottom, middle
        (VIDEOSWIN, ODD, [(0, 0), (0, 174), (0, 87)]),  # steps are whole numbers: (399 - 224) // 2 = 87
        (VIDEOSWIN, SQUARE, [(0, 0)] * 3),
        (SLOWFAST, WIDE, [(0, 0), (0, 87), (0, 174)]),  # left, middle, right
        (SLOWFAST, TALL, [(0, 0), (87, 0), (174, 0)]),
        (SLOWFAST, ODD, [(0, 0), (0, 88), (0, 175)]),  # the middle is rounded up: 87.5
        (SLOWFAST, SQUARE, [(0, 0)] * 3),
        (VIDEOMAE, WIDE, [(0, 0), (0, 87), (0, 174)]),
        (VIDEOMAE, TALL, [(0, 0), (87, 0), (174, 0)]),
        (VIDEOMAE, ODD, [(0, 0), (0, 87), (0, 175)]),  # and down
        (VIDEOMAE, SQUARE, [(0, 0)] * 3),
        (SWINV2G, WIDE, [(0, 0), (0, 43), (0, 87), (0, 130), (0, 174)]),  # steps of 43.5
        (SWINV2G, TALL, [(0, 0), (43, 0), (87, 0), (130, 0), (174, 0)]),
        (SWINV2G, SQUARE, [(0, 0)] * 5),
        (CENTER, (256, 455), [(16, 115)]),
        (CENTER, (455, 256), [(115, 16)]),
        (CENTER, (256, 256), [(16, 16)]),
    ],
)
def test_crops(protocol: Protocol, frame: tuple[int, int], corners: list[tuple[int, int]]) -> None:
    boxes = crop_boxes(protocol.boxes, *frame, (224, 224), protocol.crops)
    assert boxes == tuple((top, left, 224, 224) for top, left in corners)


@pytest.mark.parametrize(("size", "expected"), [(224, 256), (256, 293), (192, 219), (64, 73), (384, 439)])
def test_short_side_of_a_square_crop_does_not_depend_on_the_video(size: int, expected: int) -> None:
    for height, width in ((240, 320), (320, 240), (1080, 1920), (200, 200), (2, 900)):
        assert resized_short_side(height, width, (size, size), CENTER.resize) == expected
        for protocol in (VIDEOSWIN, SLOWFAST, VIDEOMAE, SWINV2G):
            assert resized_short_side(height, width, (size, size), protocol.resize) == size


def test_a_crop_that_is_not_square_is_covered_by_the_smallest_frame() -> None:
    assert resized_short_side(480, 640, (192, 256), Fraction(1)) == 192  # the same shape: nothing is lost
    assert resized_short_side(480, 640, (240, 240), Fraction(1)) == 240
    assert resized_short_side(640, 480, (192, 256), Fraction(1)) == 256  # tall video: the width limits
    assert resized_short_side(400, 400, (192, 256), Fraction(1)) == 256
    for height, width in ((240, 320), (333, 517), (517, 333), (200, 200), (1080, 1920), (101, 99)):
        for size in ((192, 256), (256, 192), (64, 160), (225, 223)):
            side = resized_short_side(height, width, size, Fraction(1))
            long = side * max(height, width) // min(height, width) // 2 * 2
            frame = (side, long) if height <= width else (long, side)
            for protocol in (VIDEOSWIN, SLOWFAST, SWINV2G):
                for top, left, *_ in crop_boxes(protocol.boxes, *frame, size, protocol.crops):
                    assert 0 <= top <= frame[0] - size[0]
                    assert 0 <= left <= frame[1] - size[1]
            assert min(frame[0] - size[0], frame[1] - size[1]) <= 3, "larger than needed"


def test_plan_is_clips_outside_crops_inside() -> None:
    views = plan_views(VIDEOSWIN, 300, 224, 398, 32, 2, (224, 224))
    assert [view.start for view in views] == [29] * 3 + [88] * 3 + [148] * 3 + [207] * 3
    assert [view.box[1] for view in views] == [0, 174, 87] * 4
    assert len(views) == VIDEOSWIN.views == 12
    assert plan_views(CENTER, 10, 256, 340, 1, 1, (224, 224))[0].indices == (5,)


def test_every_published_protocol_is_complete() -> None:
    for name, protocol in PROTOCOLS.items():
        assert name.endswith(f"-{protocol.clips}x{protocol.crops}")
        assert len(plan_views(protocol, 100, 512, 600, 16, 2, (224, 224))) == protocol.views
        assert protocol.source
        assert protocol.average in ("prob", "logit")


def test_a_protocol_can_be_spelled_out() -> None:
    text = "5x3:starts=videomae:crops=even:resize=1:average=logit:stride=3"
    stated = find_protocol(text)
    assert (stated.name, stated.average, stated.stride, stated.views) == (text, "logit", 3, 15)
    assert stated.folder == "5x3_starts=videomae_crops=even_resize=1_average=logit_stride=3"
    views = plan_views(stated, 300, 224, 398, 16, 4, (224, 224))
    assert views == plan_views(VIDEOMAE, 300, 224, 398, 16, 3, (224, 224))
    assert stated.numbers(16, 3, (224, 224))["starts"] == "videomae"
    same = find_protocol("1x1:average=prob:resize=256/224:crops=centre:starts=videoswin")
    assert plan_views(same, 99, 256, 300, 8, 2, (224, 224)) == plan_views(CENTER, 99, 256, 300, 8, 2, (224, 224))
    assert [protocol.name for protocol in find_protocols(f"center-1x1,{text}")] == ["center-1x1", text]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("4x3", r"'4x3': starts, crops, resize, average missing; spell it out as KxS:starts="),
        ("4x3:starts=videoswin:crops=videoswin:resize=1", "average missing"),
        ("4x3:starts=middle:crops=even:resize=1:average=prob", "invalid starts=middle"),
        ("4x3:starts=videoswin:crops=even:resize=-1:average=prob", "invalid resize=-1"),
        ("4x3:starts=videoswin:crops=even:resize=1/2:average=prob", "resize must be 1 or more"),
        ("4x3:starts=videoswin:crops=even:resize=1:average=vote", "invalid average=vote"),
        ("4x3:starts=videoswin:crop=even:resize=1:average=prob", "unknown key 'crop'"),
        ("4x2:starts=videoswin:crops=slowfast:resize=1:average=prob", "are 3"),
        ("4x3:starts=videoswin:crops=centre:resize=1:average=prob", "crops=centre is 1 crop"),
        ("0x3:starts=videoswin:crops=even:resize=1:average=prob", "clips and crops must be 1 or more"),
        ("center-1x1,center-1x1", "center-1x1 is given twice"),
        ("videoswin-4x4", r"videoswin-4x4'; did you mean videoswin-4x3\?"),
        ("videoswin", r"unknown protocol 'videoswin'; did you mean videoswin-4x3\?$"),
        ("", "unknown protocol ''; known are center-1x1, .*; or spell it out as KxS:starts="),
        ("middle", "unknown protocol 'middle'; known are center-1x1, "),
    ],
)
def test_an_incomplete_protocol_is_refused(text: str, fault: str) -> None:
    with pytest.raises(UsageError, match=fault) as refused:
        find_protocols(text)
    assert "\n" not in str(refused.value)


def test_invalid_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="224 x 224"):
        crop_boxes("centre", 200, 300, (224, 224), 1)
    with pytest.raises(ValueError, match="0 frames"):
        clip_indices("videoswin", 0, 4, 32, 2)
    with pytest.raises(ValueError, match="'x'"):
        clip_indices("x", 9, 4, 32, 2)
