"""Where the clips and crops of a test lie: frame indices in time, boxes in the picture. Pure integer arithmetic.

n frames of a video, K clips, T frames of a clip that are `stride` apart, S crops. A clip *spans* T * stride frames:
its last frame is followed by stride - 1 frames that belong to it but are not shown.

Everything is computed in whole numbers or fractions. The sources use floats, where a start that should be 117 exactly
may come out as 116.99999 and be truncated to 116. The tests compare both, for hundreds of video lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from video_swinv2.data.sampling import frame_indices

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels of the resized frame."""

ClipIndices = tuple[tuple[int, ...], ...]
"""For each of K clips, the T frames that it shows."""

SLOWFAST_FPS = 30


def clip_indices(rule: str, n: int, clips: int, frames: int, stride: int, fps: float = SLOWFAST_FPS) -> ClipIndices:
    """The frame indices of `clips` clips, each of `frames` frames `stride` apart, in a video of `n` frames at `fps`.

    Returns K tuples of T indices. Raises ValueError for a video without frames and for an unknown rule.
    """
    if n < 1:
        raise ValueError(f"a video of {n} frames has no clip")
    if rule not in CLIP_RULES:
        raise ValueError(f"unknown clip rule {rule!r}; use one of {', '.join(CLIP_RULES)}")
    return CLIP_RULES[rule](n, clips, frames, stride, fps)


def crop_boxes(rule: str, height: int, width: int, size: tuple[int, int], crops: int) -> tuple[Box, ...]:
    """`crops` boxes of `size` (H, W) in a frame of `height` x `width` pixels.

    Raises ValueError if the frame is smaller than the box, and for an unknown rule.
    """
    if height < size[0] or width < size[1]:
        raise ValueError(f"a crop of {size[0]} x {size[1]} does not fit in a frame of {height} x {width}")
    if rule not in CROP_RULES:
        raise ValueError(f"unknown crop rule {rule!r}; use one of {', '.join(CROP_RULES)}")
    spare_height, spare_width = height - size[0], width - size[1]
    # Crops are spread along the axis with more pixels to spare, and centred (rounding down) on the other one. For a
    # square crop that is the long side of the frame, as in every source.
    along_width = spare_width >= spare_height
    offsets = CROP_RULES[rule](max(spare_height, spare_width), crops)
    centre = min(spare_height, spare_width) // 2
    return tuple((centre, offset, *size) if along_width else (offset, centre, *size) for offset in offsets)


def resized_short_side(height: int, width: int, size: tuple[int, int], resize: Fraction) -> int:
    """The length in pixels that the short side of a `height` x `width` frame is resized to before cropping.

    For a square crop of S pixels this is round(resize * S), the published rule: with resize 256/224, 256 for a crop of
    224. A crop of another shape needs the smallest frame that covers it in both directions, times `resize`; it is
    always filled with picture, never padded and never squeezed.
    """
    short, long = min(height, width), max(height, width)
    # The crop's extent along the frame's short and long side.
    crop_short, crop_long = size if height <= width else (size[1], size[0])
    side = max(round(resize * crop_short), round(resize * crop_long * Fraction(short, long)))
    # Readers round the long side down to an even number (see `data.display.size_for`), which may take away the one
    # pixel that the crop needs.
    while side * long // short // 2 * 2 < crop_long:
        side += 1
    return side


def _videoswin_clips(n: int, clips: int, frames: int, stride: int, fps: float) -> ClipIndices:
    """Video Swin (mmaction2's SampleFrames with test_mode): the middle of each of K equal parts of the possible starts.

    Source: avg = (n - T * stride + 1) / K; start of clip k = floor(k * avg + avg / 2), or 0 if avg <= 0.
    """
    # Multiplied out: k * avg + avg / 2 = (2k + 1) * possible / (2K), where `possible` counts the starts at which a
    # clip fits. 300 frames, 4 clips of 32 x 2: possible = 237, starts 29, 88, 148, 207.
    possible = max(n - frames * stride + 1, 0)
    starts = ((2 * k + 1) * possible // (2 * clips) for k in range(clips))
    # A clip longer than the video wraps around: index (start + stride * j) mod n.
    return tuple(frame_indices(start, frames, stride, n) for start in starts)


def _slowfast_clips(n: int, clips: int, frames: int, stride: int, fps: float) -> ClipIndices:
    """PySlowFast (get_start_end_idx, temporal_sampling): clip k starts at k/K of the slack; the last frame is repeated.

    Source: span = T * stride * fps / 30; start = max(n - span, 0) * k / K;
    frames = floor(clamp(linspace(start, start + span - 1, T), 0, n - 1)).
    """
    # The stride counts frames at 30 a second, so a video at 15 a second moves half as many of its own frames. The rate
    # is rounded to hundredths, since times in files are rounded (30.0003); from there on all is exact.
    span = frames * stride * Fraction(round(100 * fps), 100 * SLOWFAST_FPS)
    # linspace includes both ends, so neighbouring frames are a little more than a stride apart: 8 frames x 8 lie
    # (64 - 1) / 7 = 9 apart.
    step = (span - 1) / (frames - 1) if frames > 1 else Fraction(0)
    # k / K, not k / (K - 1): the last clip never reaches the end. 300 frames, 10 clips of 8 x 8: slack 236, the last
    # starts at 212.4 and ends at frame 275.
    starts = (max(n - span, Fraction(0)) * k / clips for k in range(clips))
    return tuple(
        tuple(int(min(max(start + step * j, Fraction(0)), Fraction(n - 1))) for j in range(frames)) for start in starts
    )


def _videomae_clips(n: int, clips: int, frames: int, stride: int, fps: float) -> ClipIndices:
    """VideoMAE (kinetics.py, mode test): keeps every stride-th frame, then spreads K clips over these from end to end.

    Source: kept = frames 0, stride, 2 * stride, ...; step = max(len(kept) - T, 0) / (K - 1); clip k is
    kept[floor(k * step) : floor(k * step) + T], with the last kept frame repeated where the video is too short.
    """
    kept = -(-n // stride)  # ceil(n / stride)
    # A single clip, which the source cannot do (it divides by K - 1), is the middle one.
    starts = _spread_end_to_end(max(kept - frames, 0), clips)
    return tuple(tuple(stride * min(start + j, kept - 1) for j in range(frames)) for start in starts)


def _spread_end_to_end(spare: int, count: int) -> tuple[int, ...]:
    """`count` whole numbers spread over 0..spare, both ends included, rounded down; a single one is the middle."""
    return (spare // 2,) if count == 1 else tuple(k * spare // (count - 1) for k in range(count))


def _centre_crop(spare: int, crops: int) -> tuple[int, ...]:
    return (spare // 2,)


def _videoswin_crops(spare: int, crops: int) -> tuple[int, ...]:
    """mmaction2's ThreeCrop: left, right, middle, in the source's order.

    Its step is spare // 2 and the right crop lies at two steps, so an odd pixel remains at the far end.
    """
    return (0, spare // 2 * 2, spare // 2)


def _slowfast_crops(spare: int, crops: int) -> tuple[int, ...]:
    """PySlowFast's uniform_crop: left, middle, right; the middle is ceil(spare / 2), as there."""
    return (0, -(-spare // 2), spare)


CLIP_RULES: dict[str, Callable[[int, int, int, int, float], ClipIndices]] = {
    "videoswin": _videoswin_clips,
    "slowfast": _slowfast_clips,
    "videomae": _videomae_clips,
}
"""(n, K, T, stride, fps) -> indices."""

CROP_RULES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "centre": _centre_crop,
    "videoswin": _videoswin_crops,
    "slowfast": _slowfast_crops,
    "even": _spread_end_to_end,
}
"""(pixels to spare along the axis, S) -> offset of each crop along it."""

FIXED_CROPS = {"centre": 1, "videoswin": 3, "slowfast": 3}
"""The number of crops of rules that define it; the other rules make as many as asked for."""
