"""Where the clips and crops of a test lie: frame indices in time and boxes in the picture, in exact arithmetic.

Letters: n frames in a video, K clips, T frames in a clip that are `stride` apart, S crops. A clip *spans* T * stride
frames: its last frame is followed by stride - 1 frames that belong to the span but are not shown.

Everything is computed in integers or fractions. The published code uses floats, where a start that should be exactly
117 may come out as 116.99999 and be truncated to 116. The tests compare both, for hundreds of video lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from video_swinv2.data.sampling import frame_indices

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels of the resized frame."""

ClipIndices = tuple[tuple[int, ...], ...]
"""For each of K clips, the T frames that it shows."""

# The frame rate that PySlowFast's strides refer to (its TARGET_FPS): frames per second.
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
    # Crops are spread along the axis with more pixels to spare and centred, rounding down, on the other one. For a
    # square crop the axis with more to spare is the long side of the frame, as in the published code.
    along_width = spare_width >= spare_height
    offsets = CROP_RULES[rule](max(spare_height, spare_width), crops)
    centre = min(spare_height, spare_width) // 2
    return tuple((centre, offset, *size) if along_width else (offset, centre, *size) for offset in offsets)


def resized_short_side(height: int, width: int, size: tuple[int, int], resize: Fraction) -> int:
    """The length in pixels that the short side of a `height` x `width` frame is resized to before cropping.

    For a square crop of S pixels this is round(resize * S), the published rule: with resize 256/224, 256 for a crop of
    224. For any other shape it is the size at which the frame just covers the crop in both directions, times `resize`.
    The crop is always filled with picture, never padded and never squeezed.
    """
    short, long = min(height, width), max(height, width)
    # The crop's extent along the short and the long side of the frame.
    crop_short, crop_long = size if height <= width else (size[1], size[0])
    # The long side becomes side * long / short, which must reach crop_long: hence the factor short / long.
    side = max(round(resize * crop_short), round(resize * crop_long * Fraction(short, long)))
    # The reader rounds the long side to an even number (see `data.display.size_for`). If it rounds down, the one pixel
    # that the crop needs may be missing; the loop assumes the worst and lengthens the short side until the crop fits.
    while side * long // short // 2 * 2 < crop_long:
        side += 1
    return side


def _videoswin_clips(n: int, clips: int, frames: int, stride: int, fps: float) -> ClipIndices:
    """Video Swin (mmaction2's SampleFrames with test_mode): the middle of each of K equal parts of the possible starts.

    Source: avg = (n - T * stride + 1) / K; start of clip k = floor(k * avg + avg / 2), or 0 if avg <= 0.
    """
    # Multiplied out, k * avg + avg / 2 = (2k + 1) * possible / (2K), where `possible` is the number of starts at which
    # a clip fits. Example: 300 frames and 4 clips of 32 x 2 give possible = 237 and the starts 29, 88, 148, 207.
    possible = max(n - frames * stride + 1, 0)
    starts = ((2 * k + 1) * possible // (2 * clips) for k in range(clips))
    # A clip that is longer than the video wraps around: frame j has the index (start + stride * j) mod n.
    return tuple(frame_indices(start, frames, stride, n) for start in starts)


def _slowfast_clips(n: int, clips: int, frames: int, stride: int, fps: float) -> ClipIndices:
    """PySlowFast (get_start_end_idx, temporal_sampling): clip k starts at k/K of the slack; the last frame is repeated.

    Source: span = T * stride * fps / 30; start = max(n - span, 0) * k / K;
    frames = floor(clamp(linspace(start, start + span - 1, T), 0, n - 1)).
    """
    # The stride counts frames at 30 per second, so a clip spans half as many frames of a video with 15 per second. The
    # rate is rounded to hundredths because it is computed from rounded times (30.0003); everything after is exact.
    span = frames * stride * Fraction(round(100 * fps), 100 * SLOWFAST_FPS)
    # linspace includes both ends, so neighbouring frames are a little more than a stride apart: the frames of a clip of
    # 8 x 8 are (64 - 1) / 7 = 9 apart.
    step = (span - 1) / (frames - 1) if frames > 1 else Fraction(0)
    # k / K and not k / (K - 1), so the last clip never reaches the end of the video. Example: 300 frames and 10 clips
    # of 8 x 8 leave a slack of 236; the last clip starts at 212.4 and ends at frame 275.
    starts = (max(n - span, Fraction(0)) * k / clips for k in range(clips))
    # Clamped to the video as in the source; int() rounds down, since nothing is negative.
    return tuple(
        tuple(int(min(max(start + step * j, Fraction(0)), Fraction(n - 1))) for j in range(frames)) for start in starts
    )


def _videomae_clips(n: int, clips: int, frames: int, stride: int, fps: float) -> ClipIndices:
    """VideoMAE (kinetics.py, mode test): keep every stride-th frame, then spread K clips over these from end to end.

    Source: kept = frames 0, stride, 2 * stride, ...; step = max(len(kept) - T, 0) / (K - 1); clip k is
    kept[floor(k * step) : floor(k * step) + T], with the last kept frame repeated where the video is too short.
    """
    kept = -(-n // stride)  # ceil(n / stride)
    # The source divides by K - 1 and so cannot place a single clip; ours goes to the middle.
    starts = _spread_end_to_end(max(kept - frames, 0), clips)
    return tuple(tuple(stride * min(start + j, kept - 1) for j in range(frames)) for start in starts)


def _spread_end_to_end(spare: int, count: int) -> tuple[int, ...]:
    """`count` integers spread evenly over 0..spare, both ends included, rounded down; a single one is the middle."""
    return (spare // 2,) if count == 1 else tuple(k * spare // (count - 1) for k in range(count))


def _centre_crop(spare: int, crops: int) -> tuple[int, ...]:
    """The middle, rounding down: the only crop."""
    return (spare // 2,)


def _videoswin_crops(spare: int, crops: int) -> tuple[int, ...]:
    """mmaction2's ThreeCrop: left, right, middle, in the source's order.

    Its step is spare // 2 and the right crop lies two steps in, so if `spare` is odd, one pixel remains at the far end.
    """
    return (0, spare // 2 * 2, spare // 2)


def _slowfast_crops(spare: int, crops: int) -> tuple[int, ...]:
    """PySlowFast's uniform_crop: left, middle, right. The middle is ceil(spare / 2), as in the source."""
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
"""The number of crops of the rules that fix it; the other rules make as many as the protocol asks for."""
