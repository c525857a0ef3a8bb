"""A generated data set whose classes are motions and nothing else.

Each axis of motion has two classes, and each of the two is the other played backwards. A clip is drawn for one
direction and reversed for the other, and every process in it is stationary: positions are uniform on a torus, angles
uniform in a sector, sizes log-uniform, the noise independent in time, the direction in which the background drifts
uniform. So for every t, frame t has the same distribution in all eight classes, and a model blind to the order of the
frames is right at most half of the time.

A clip is a function of the seed alone, on every CPU. Vector instructions, and the alignment of an array in memory, can
change the last bit of sines and sums. Everything is therefore computed in float64, where such a change is 1e-13 of a
grey level, and rounded once: the noise makes the levels continuous, so a level that close to a rounding boundary does
not occur in practice. Everything after the rounding (the conversion to YUV here, the encoding by x264) is integer
arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray

from data_prep.dataset import PreparedVideo, SplitContent, read_record, write_dataset
from data_prep.encode import H264Settings, to_ticks, write_video
from data_prep.pool import Allow, Lost, run_jobs
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import commit_file, partial_path, sha256
from video_swinv2.progress import track

Level = Literal["easy", "hard"]
Floats = NDArray[np.floating[Any]]

# Incremented whenever the same seed draws different clips.
VERSION = 2

# In pairs: the second class of each pair is the first played backwards.
CLASSES = ("left", "right", "up", "down", "clockwise", "anticlockwise", "approaching", "receding")
FPS = 16
# Per frame: widths moved, radians turned, growth of log(radius). Large enough that 8 of 16 frames show it clearly.
SHIFT = (0.035, 0.07)
TURN = (0.10, 0.20)
GROWTH = (0.045, 0.075)
RADIUS = (0.18, 0.38)
# Turning shapes swing around a point outside themselves, within a sector (in radians); at its end they start again. On
# a full circle a model would have to learn the order of two directions at once, for which small models need many more
# clips.
SECTOR = 2.6
ARM = (0.12, 0.25)
# Easy shapes get darker towards one end, which shows their orientation; in units of contrast per radius.
SHADE = {"easy": 2.0, "hard": 0.0}
DRIFT = 0.02
# High quality: coarse quantisation leaves a trail behind moving shapes, which would reveal the motion in one frame.
ENCODING = H264Settings(gop=16, crf=12, preset="veryfast")

SECONDS_PER_CLIP = 120.0


@dataclass(frozen=True)
class Clip:
    """One clip to generate: where to write it, and everything that decides how it looks."""

    path: Path
    split: str
    label: str
    index: int
    level: Level
    size: int
    frames: int
    seed: int


def draw(clip: Clip) -> NDArray[np.uint8]:
    """The frames of one clip, (T, H, W, 3) uint8; a pure function of the fields of the clip, without its path."""
    rng = np.random.default_rng(_key(clip.seed, clip.split, clip.label, clip.index))
    place = CLASSES.index(clip.label)
    frames = _render(rng, CLASSES[place - place % 2], clip.level, clip.size, clip.frames)
    return frames[::-1] if place % 2 else frames


def make(clip: Clip, _allow: Allow) -> str:
    """Draw, encode and store one clip. Returns the sha256 of the file."""
    part = partial_path(clip.path)
    pictures = (av.VideoFrame.from_ndarray(image, format="yuv420p") for image in to_yuv420(draw(clip)))
    pairs = zip(to_ticks([number / FPS for number in range(clip.frames)]), pictures, strict=True)
    write_video(part, pairs, size=(clip.size, clip.size), fps=FPS, settings=ENCODING)
    digest = sha256(part)
    commit_file(part, clip.path)
    return digest


def to_yuv420(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB frames (T, H, W, 3) -> planes of yuv420p (T, H * 3 / 2, W), BT.601 in the limited range, H and W even.

    In integers, because FFmpeg's own conversion rounds differently on different CPUs. A chroma sample is the mean of
    the four pixels that share it.
    """
    count, height, width, _ = images.shape
    rgb = images.astype(np.int32)
    luma = (66 * rgb[..., 0] + 129 * rgb[..., 1] + 25 * rgb[..., 2] + 128 >> 8) + 16
    fours = rgb.reshape(count, height // 2, 2, width // 2, 2, 3).sum(axis=(2, 4))  # (T, H/2, W/2, 3), sums of 4 pixels
    blue = (-38 * fours[..., 0] - 74 * fours[..., 1] + 112 * fours[..., 2] + 512 >> 10) + 128
    red = (112 * fours[..., 0] - 94 * fours[..., 1] - 18 * fours[..., 2] + 512 >> 10) + 128
    planes = [plane.reshape(count, -1) for plane in (luma, blue, red)]
    return np.concatenate(planes, axis=1).astype(np.uint8).reshape(count, height * 3 // 2, width)


def synthesise(
    out: Path, counts: dict[str, int], *, level: Level, size: int, frames: int, seed: int, workers: int
) -> bool:
    """Generate the whole data set; `counts` are clips per class, by split. False if it was already there.

    Raises UsageError for impossible numbers, or if the folder contains another data set; UserError if a clip cannot be
    written.
    """
    _check(counts, size, frames)
    settings: dict[str, object] = {
        "made_by": "synth",
        "version": VERSION,
        "level": level,
        "size": size,
        "frames": frames,
        "fps": FPS,
        "seed": seed,
    }
    settings |= {"clips_per_class": counts, **asdict(ENCODING)}
    there = read_record(out)
    if there is not None:
        if there.get("settings") == settings:
            return False
        raise UsageError(f"{out}: contains another data set (dataset.json); choose a new folder or remove it")
    clips = list(plan(out, counts, level=level, size=size, frames=frames, seed=seed))
    for folder in dict.fromkeys(clip.path.parent for clip in clips):
        folder.mkdir(parents=True, exist_ok=True)
    made = run_jobs(make, clips, workers=workers, seconds_for=lambda clip: SECONDS_PER_CLIP)
    digests: dict[Path, str] = {}
    for clip, outcome in track(made, f"synth {level}", len(clips), "clips"):
        if isinstance(outcome, Lost):
            raise UserError(
                f"{clip.path}: could not be generated ({outcome.detail}); free memory and disk space, then run again"
            )
        digests[clip.path] = outcome
    splits: dict[str, list[PreparedVideo]] = {split: [] for split in counts}
    for clip in clips:
        name = clip.path.relative_to(out).as_posix()
        splits[clip.split].append(PreparedVideo(name, clip.label, digests[clip.path]))
    content = {split: SplitContent(rows) for split, rows in splits.items()}
    write_dataset(out, name=f"synth-{level}", classes=CLASSES, splits=content, settings=settings)
    return True


def plan(out: Path, counts: dict[str, int], *, level: Level, size: int, frames: int, seed: int) -> Iterator[Clip]:
    """Every clip of the data set, in list order; `counts` are clips per class, by split."""
    for split, count in counts.items():
        for label in CLASSES:
            for index in range(count):
                path = out / "videos" / split / label / f"{index:05d}.mp4"
                yield Clip(path, split, label, index, level, size, frames, seed)


def _check(counts: dict[str, int], size: int, frames: int) -> None:
    if min(counts.values()) < 0 or not sum(counts.values()):
        raise UsageError(f"clips per class {counts}: none may be negative, and at least one must be positive")
    if size < 32 or size % 2:
        raise UsageError(f"--size {size}: must be even (H.264 stores colour at half resolution) and at least 32")
    if frames < 2:
        raise UsageError(f"--frames {frames}: must be at least 2 to show motion")


def _key(seed: int, split: str, label: str, index: int) -> list[int]:
    digest = hashlib.sha256(f"{seed}/{split}/{label}/{index}".encode()).digest()
    return list(np.frombuffer(digest, dtype=np.uint32).tolist())


def _render(rng: np.random.Generator, motion: str, level: Level, size: int, frames: int) -> NDArray[np.uint8]:
    x, y, angle, radius = (track[:, None, None] for track in _track(rng, motion, frames))
    (ground, ground_contrast), (colour, contrast) = _inks(rng, level)
    column = ((np.arange(size) + 0.5) / size)[None, None, :]
    row = column.transpose(0, 2, 1)
    behind = ground + _background(rng, column, row, frames) * ground_contrast
    # The position of every pixel in the coordinates of the shape: (T, H, W), in units of its radius. Adding 0.5 before
    # the modulo and subtracting it afterwards takes the shorter way around the torus.
    dx, dy = (column - x + 0.5) % 1 - 0.5, (row - y + 0.5) % 1 - 0.5
    a = (np.cos(angle) * dx + np.sin(angle) * dy) / radius
    b = (np.cos(angle) * dy - np.sin(angle) * dx) / radius
    beyond = np.hypot(a, b) - np.interp(np.arctan2(b, a), *_outline(rng))
    # A soft edge one pixel wide, so that motion by less than a pixel is visible.
    mask = np.clip(0.5 - beyond * radius * size, 0, 1)[..., None]
    surface = _sample(_texture(rng), 0.25 * a, 0.25 * b) + SHADE[level] * a[..., None]
    images = behind + mask * (colour + surface * contrast - behind)
    images += rng.standard_normal(images.shape) * rng.uniform(2, 8)
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, column: Floats, row: Floats, frames: int) -> Floats:
    """Texture (T, H, W, 1): still in half of the clips, drifting slowly in a random direction in the others.

    T is 1 if it is still.
    """
    heading, drift = rng.uniform(0, 2 * np.pi), rng.uniform(0, DRIFT) * rng.integers(0, 2)
    start = rng.uniform(0, 1, 2)
    t = np.arange(frames if drift else 1)[:, None, None] * drift
    u = start[0] + np.cos(heading) * t + column
    v = start[1] + np.sin(heading) * t + row
    return _sample(_texture(rng), u, v)


def _track(rng: np.random.Generator, motion: str, frames: int) -> tuple[Floats, ...]:
    """Centre x, y (in widths, on a torus), angle and radius (in widths), each (T,), for the first class of a pair.

    Each starts uniformly distributed over a range and moves through it cyclically, so its distribution is the same at
    every frame.
    """
    t = np.arange(frames)
    x, y, angle, zoom = (rng.uniform(0, 1) + 0 * t for _ in range(4))
    shift, turn, growth = rng.uniform(*SHIFT), rng.uniform(*TURN), rng.uniform(*GROWTH)
    octaves = np.log(RADIUS[1] / RADIUS[0])
    if motion == "left":
        x = x - shift * t
    elif motion == "up":
        y = y - shift * t
    elif motion == "clockwise":
        angle = angle + turn * t / SECTOR
    else:
        zoom = zoom + growth * t / octaves
    swing = SECTOR * (angle % 1 - 0.5)
    if motion == "clockwise":
        arm = rng.uniform(*ARM)
        x, y = x + arm * np.sin(swing), y - arm * np.cos(swing)
    return x % 1, y % 1, swing, RADIUS[0] * np.exp(octaves * (zoom % 1))


def _outline(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """(angles, radii), each (361,), of a closed shape with mean radius 1: a polygon, an ellipse or a blob."""
    angles = np.linspace(-np.pi, np.pi, 361)
    kind = rng.integers(0, 3)
    if kind == 0:
        corners = rng.integers(3, 5)
        wedge = 2 * np.pi / corners
        radii = 1 / np.cos((angles + np.pi) % wedge - wedge / 2)
    elif kind == 1:
        ratio = rng.uniform(2.0, 3.0)
        radii = 1 / np.hypot(np.cos(angles) * ratio, np.sin(angles))
    else:
        lobes = rng.integers(2, 5)
        radii = 1 + rng.uniform(0.3, 0.6) * np.cos(lobes * angles)
    return angles, radii / radii.mean()


def _texture(rng: np.random.Generator, size: int = 64) -> Floats:
    """(size, size) noise with mean 0 and standard deviation 1 that tiles without seams, with 3 to 7 waves per side."""
    waves = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :]) * size
    band = np.exp(-(((waves - rng.uniform(3, 7)) / 2) ** 2))
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * band).real
    return np.asarray((noise - noise.mean()) / noise.std())


def _inks(rng: np.random.Generator, level: Level) -> list[tuple[Floats, Floats]]:
    """(mean colour, contrast), each (3,), of the background and of the shape."""

    def ink(low: float, high: float, contrast: float) -> tuple[Floats, Floats]:
        colour = rng.uniform(low, high) * rng.uniform(0.75, 1.25, 3)
        return colour, contrast * rng.uniform(0.5, 1.5, 3)

    if level == "easy":
        return [ink(30, 70, 14), ink(140, 190, 35)]
    return [ink(90, 150, 32)] * 2


def _sample(texture: Floats, u: Floats, v: Floats) -> Floats:
    """Bilinear samples (..., 1) of a tiling (S, S) texture at positions u, v (...), in units of its width."""
    size = len(texture)
    column, row = u * size, v * size
    left, top = np.floor(column), np.floor(row)
    fx, fy = column - left, row - top
    x, y = left.astype(np.int32) % size, top.astype(np.int32) % size
    right, below = (x + 1) % size, (y + 1) % size
    upper = texture[y, x] * (1 - fx) + texture[y, right] * fx
    lower = texture[below, x] * (1 - fx) + texture[below, right] * fx
    return np.asarray(upper * (1 - fy) + lower * fy)[..., None]
