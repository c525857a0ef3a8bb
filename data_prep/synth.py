"""A generated data set whose classes differ in motion and in nothing else.

There are four kinds of motion with two classes each, and each class of a pair is the other played backwards: clips are
drawn for the first class and reversed for the second. Every random process in a clip is stationary: positions are
uniform on a torus, angles uniform in a sector, sizes log-uniform, the noise independent in time, and the direction in
which the background drifts uniform. For every t, frame t therefore has the same distribution in all eight classes, and
a model that ignores the order of the frames is right at most half of the time.

A clip depends only on the fields of `Clip`, and its pixels are the same on every CPU. Vector instructions, and the
alignment of an array in memory, can change the last bit of sines and sums. All values are therefore computed in
float64, where such a change is about 1e-13 of a grey level, and rounded once. The noise makes the values continuous, so
a value that close to a rounding boundary does not occur in practice. Everything after the rounding (the conversion to
YUV here, the encoding by x264) is integer arithmetic.

Letters: T frames, H W pixels, S the width of a texture. Coordinates are in units of the image width, x to the right and
y down; the image wraps around (a torus), so a shape that leaves it on one side returns on the other.
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

from data_prep.dataset import PreparedVideo, SplitContent, write_dataset
from data_prep.encode import H264Settings, to_ticks, write_video
from data_prep.pool import Allow, Lost, run_jobs
from video_swinv2.data.manifest import read_dataset_record
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import commit_file, create_folder, partial_path, path_under, sha256
from video_swinv2.progress import track

Level = Literal["easy", "hard"]
Floats = NDArray[np.floating[Any]]

# Incremented whenever the same seed draws different clips. That includes any change in the number or the order of the
# random draws below, because all of a clip's draws come from one generator.
VERSION = 2

# In pairs: the second class of each pair is the first one played backwards.
CLASSES = ("left", "right", "up", "down", "clockwise", "anticlockwise", "approaching", "receding")
FPS = 16
# Ranges (low, high) from which each clip draws. The first three are speeds, per frame, and large enough for the motion
# to be clear in 8 of 16 frames.
SHIFT = (0.035, 0.07)  # image widths moved
TURN = (0.10, 0.20)  # radians turned
GROWTH = (0.045, 0.075)  # growth of log(radius)
RADIUS = (0.18, 0.38)  # of the shapes, in image widths
# Turning shapes swing around a point at the distance ARM (in image widths) from their centre, through a sector of
# SECTOR radians. At its end they start again. On a full circle a model would have to learn the order of two directions
# at once, for which small models need many more clips.
SECTOR = 2.6
ARM = (0.12, 0.25)
# Easy shapes are shaded from one end to the other, which shows their orientation. In units of contrast per radius.
SHADE = {"easy": 2.0, "hard": 0.0}
DRIFT = 0.02  # maximum speed of the background, in image widths per frame
# High quality, because coarse quantisation leaves a trail behind moving shapes, which would reveal the direction of the
# motion in a single frame. Without B-frames, since clips this short are decoded in no time.
ENCODING = H264Settings(gop=16, crf=12, preset="veryfast", b_frames=0)

SECONDS_PER_CLIP = 120.0  # time limit, far above what drawing and encoding take


@dataclass(frozen=True)
class Clip:
    """One clip to generate: the path to write it to, and everything that decides what it shows.

    `index` counts the clips of a class in a split. `size` is the height and width in pixels, `frames` the number of
    frames, and `seed` that of the whole data set.
    """

    path: Path
    split: str
    label: str
    index: int
    level: Level
    size: int
    frames: int
    seed: int


def draw(clip: Clip) -> NDArray[np.uint8]:
    """Draw the frames of one clip, RGB (T, H, W, 3) uint8. A pure function of the clip's fields other than `path`."""
    # A generator for each clip, so that clips depend neither on each other nor on the number of workers.
    rng = np.random.default_rng(_key(clip.seed, clip.split, clip.label, clip.index))
    place = CLASSES.index(clip.label)
    frames = _render(rng, CLASSES[place - place % 2], clip.level, clip.size, clip.frames)
    # The classes of a pair have different keys, so their clips are independent draws and not copies of each other.
    return frames[::-1] if place % 2 else frames


def make(clip: Clip, _allow: Allow) -> str:
    """Draw, encode and store one clip, in a worker process. Returns the sha256 of the file."""
    part = partial_path(clip.path)
    part.unlink(missing_ok=True)  # a killed run may have left a file, or somebody a link, which would be followed
    pictures = (av.VideoFrame.from_ndarray(image, format="yuv420p") for image in to_yuv420(draw(clip)))
    pairs = zip(to_ticks([number / FPS for number in range(clip.frames)]), pictures, strict=True)
    write_video(part, pairs, size=(clip.size, clip.size), fps=FPS, settings=ENCODING)
    digest = sha256(part)
    commit_file(part, clip.path)
    return digest


def to_yuv420(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert RGB frames (T, H, W, 3) to planes of yuv420p (T, H * 3 / 2, W); H and W must be even.

    BT.601 in the limited range (luma 16 to 235, chroma 16 to 240), in integers, because FFmpeg's own conversion rounds
    differently on different CPUs. A chroma sample is computed from the mean of the 2 x 2 pixels that share it.
    """
    # The usual 8-bit coefficients: those of BT.601, scaled to the limited range and multiplied by 256. For luma, + 128
    # rounds the division by 256 (>> 8). Chroma is computed from sums of 4 pixels, so it is divided by 1024 (>> 10).
    count, height, width, _ = images.shape
    rgb = images.astype(np.int32)
    luma = (66 * rgb[..., 0] + 129 * rgb[..., 1] + 25 * rgb[..., 2] + 128 >> 8) + 16
    fours = rgb.reshape(count, height // 2, 2, width // 2, 2, 3).sum(axis=(2, 4))  # (T, H/2, W/2, 3), sums of 4 pixels
    blue = (-38 * fours[..., 0] - 74 * fours[..., 1] + 112 * fours[..., 2] + 512 >> 10) + 128
    red = (112 * fours[..., 0] - 94 * fours[..., 1] - 18 * fours[..., 2] + 512 >> 10) + 128
    # PyAV's layout of a yuv420p array: the luma plane (H * W values) and then the two chroma planes (H * W / 4 values
    # each), cut into rows of W values: H * 3 / 2 rows.
    planes = [plane.reshape(count, -1) for plane in (luma, blue, red)]
    return np.concatenate(planes, axis=1).astype(np.uint8).reshape(count, height * 3 // 2, width)


def synthesise(
    out: Path, counts: dict[str, int], *, level: Level, size: int, frames: int, seed: int, workers: int
) -> bool:
    """Generate the whole data set in the folder `out`. Returns False if it is already there with the same settings.

    `counts` gives the number of clips per class for each split. Raises UsageError for impossible numbers, or if the
    folder contains another data set; UserError if a clip cannot be generated.
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
    # dataset.json is written last, so it is there only if all clips are. After an interruption all are generated again,
    # which gives the same files.
    if (out / "dataset.json").is_file():
        if read_dataset_record(out).settings == settings:
            return False
        raise UsageError(f"{out}: contains another data set (dataset.json); choose a new folder or remove it")
    clips = list(plan(out, counts, level=level, size=size, frames=frames, seed=seed))
    # `out` first, so that it is named if it cannot be created. dict.fromkeys: each folder once, in order.
    for folder in (out, *dict.fromkeys(clip.path.parent for clip in clips)):
        create_folder(folder, "OUT")
    made = run_jobs(make, clips, workers=workers, seconds_for=lambda clip: SECONDS_PER_CLIP)
    digests: dict[Path, str] = {}
    for clip, outcome in track(made, f"synth {level}", len(clips), "clips"):
        if isinstance(outcome, Lost):
            raise UserError(
                f"{clip.path}: could not be generated ({outcome.detail}); free memory and disk space, then run again"
            )
        digests[clip.path] = outcome
    # Clips finish in any order; the lists are in the order of the plan.
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
                path = path_under(out, f"videos/{split}/{label}/{index:05d}.mp4")
                yield Clip(path, split, label, index, level, size, frames, seed)


def _check(counts: dict[str, int], size: int, frames: int) -> None:
    if min(counts.values()) < 0 or not sum(counts.values()):
        raise UsageError(f"clips per class {counts}: none may be negative, and at least one must be positive")
    if size < 32 or size % 2:
        raise UsageError(f"--size {size}: must be even (H.264 stores colour at half resolution) and at least 32")
    if frames < 2:
        raise UsageError(f"--frames {frames}: must be at least 2 to show motion")


def _key(seed: int, split: str, label: str, index: int) -> list[int]:
    """The seed of a clip's own generator: 256 bits as eight integers. A hash makes the keys of all clips unrelated."""
    digest = hashlib.sha256(f"{seed}/{split}/{label}/{index}".encode()).digest()
    return list(np.frombuffer(digest, dtype=np.uint32).tolist())


def _render(rng: np.random.Generator, motion: str, level: Level, size: int, frames: int) -> NDArray[np.uint8]:
    """Draw one clip (T, H, W, 3) for the first class of a pair: a textured shape on a textured background."""
    # Each track (T,) becomes (T, 1, 1), to be broadcast against the pixels: column is (1, 1, W) and row (1, H, 1), the
    # coordinates of the pixel centres in image widths.
    x, y, angle, radius = (track[:, None, None] for track in _track(rng, motion, frames))
    (ground, ground_contrast), (colour, contrast) = _inks(rng, level)
    column = ((np.arange(size) + 0.5) / size)[None, None, :]
    row = column.transpose(0, 2, 1)
    behind = ground + _background(rng, column, row, frames) * ground_contrast
    # The position (a, b) of every pixel relative to the shape, (T, H, W): the offset from its centre, rotated by minus
    # its angle, in units of its radius. Adding 0.5 before the modulo and subtracting it afterwards takes the shorter
    # way around the torus: the offsets are from -0.5 to 0.5.
    dx, dy = (column - x + 0.5) % 1 - 0.5, (row - y + 0.5) % 1 - 0.5
    a = (np.cos(angle) * dx + np.sin(angle) * dy) / radius
    b = (np.cos(angle) * dy - np.sin(angle) * dx) / radius
    # How far a pixel is outside the outline, in radii: its distance from the centre minus that of the outline in the
    # same direction. Negative inside.
    beyond = np.hypot(a, b) - np.interp(np.arctan2(b, a), *_outline(rng))
    # The opacity of the shape, (T, H, W, 1). The edge is a ramp one pixel wide, so that motion by less than a pixel is
    # visible; beyond * radius * size is in pixels.
    mask = np.clip(0.5 - beyond * radius * size, 0, 1)[..., None]
    surface = _sample(_texture(rng), 0.25 * a, 0.25 * b) + SHADE[level] * a[..., None]
    # Composite the shape on the background: (T, H, W, 3).
    images = behind + mask * (colour + surface * contrast - behind)
    # Noise with a standard deviation of 2 to 8 grey levels, which also makes the values continuous (see above).
    images += rng.standard_normal(images.shape) * rng.uniform(2, 8)
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, column: Floats, row: Floats, frames: int) -> Floats:
    """The background texture: (T, H, W, 1) if it drifts slowly in a random direction, (1, H, W, 1) if it is still.

    It is still in half of the clips. `column` (1, 1, W) and `row` (1, H, 1) are pixel coordinates in image widths.
    """
    heading, drift = rng.uniform(0, 2 * np.pi), rng.uniform(0, DRIFT) * rng.integers(0, 2)
    start = rng.uniform(0, 1, 2)
    t = np.arange(frames if drift else 1)[:, None, None] * drift
    u = start[0] + np.cos(heading) * t + column
    v = start[1] + np.sin(heading) * t + row
    return _sample(_texture(rng), u, v)


def _track(rng: np.random.Generator, motion: str, frames: int) -> tuple[Floats, ...]:
    """The path of the shape: centre x and y (in image widths), angle (radians) and radius (in widths), each (T,).

    `motion` is the first class of a pair. Each value starts at a uniformly random point of a cycle (0 to 1). The value
    that `motion` changes advances through its cycle at constant speed, modulo 1, and the others stay. A uniform value
    that is shifted modulo 1 remains uniform, so the distribution is the same in every frame.
    """
    t = np.arange(frames)
    x, y, angle, zoom = (rng.uniform(0, 1) + 0 * t for _ in range(4))
    shift, turn, growth = rng.uniform(*SHIFT), rng.uniform(*TURN), rng.uniform(*GROWTH)
    # The whole range of log(radius). The radius is log-uniform, so that zooming is a shift of `zoom` as well.
    octaves = np.log(RADIUS[1] / RADIUS[0])
    if motion == "left":
        x = x - shift * t
    elif motion == "up":
        y = y - shift * t
    elif motion == "clockwise":
        angle = angle + turn * t / SECTOR
    else:
        zoom = zoom + growth * t / octaves
    # The cycle of the angle, mapped to the sector from -SECTOR / 2 to SECTOR / 2 radians.
    swing = SECTOR * (angle % 1 - 0.5)
    # Turning shapes also move on an arc: around (x, y), above it at swing 0 (y points down), at the distance `arm`.
    if motion == "clockwise":
        arm = rng.uniform(*ARM)
        x, y = x + arm * np.sin(swing), y - arm * np.cos(swing)
    return x % 1, y % 1, swing, RADIUS[0] * np.exp(octaves * (zoom % 1))


def _outline(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A closed shape in polar coordinates, as (angles, radii), each (361,), with mean radius 1.

    A triangle or square, an ellipse, or a blob, with equal probability.
    """
    # One value per degree; the last repeats the first, so that interpolation needs no special case at +-pi.
    angles = np.linspace(-np.pi, np.pi, 361)
    kind = rng.integers(0, 3)
    if kind == 0:
        corners = rng.integers(3, 5)
        # A side at distance 1 from the centre has the radius 1 / cos(angle from its middle). Each side covers a wedge.
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
    """A random texture (size, size) with mean 0 and standard deviation 1, made of about 3 to 7 waves per side.

    White noise is filtered by a Gaussian band in frequency space. The discrete Fourier transform is periodic, so the
    texture tiles without seams.
    """
    waves = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :]) * size
    band = np.exp(-(((waves - rng.uniform(3, 7)) / 2) ** 2))
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * band).real
    return np.asarray((noise - noise.mean()) / noise.std())


def _inks(rng: np.random.Generator, level: Level) -> list[tuple[Floats, Floats]]:
    """(mean colour, contrast), each (3,) in grey levels of R, G and B, of the background and of the shape.

    At level hard both have the same, so that colour does not separate the shape from the background.
    """

    def ink(low: float, high: float, contrast: float) -> tuple[Floats, Floats]:
        colour = rng.uniform(low, high) * rng.uniform(0.75, 1.25, 3)
        return colour, contrast * rng.uniform(0.5, 1.5, 3)

    if level == "easy":
        return [ink(30, 70, 14), ink(140, 190, 35)]
    return [ink(90, 150, 32)] * 2  # the same tuple twice, drawn once


def _sample(texture: Floats, u: Floats, v: Floats) -> Floats:
    """Bilinear samples (..., 1) of a tiling texture (S, S) at the positions u, v (...), in units of its width.

    u and v may have any value and are broadcast against each other.
    """
    size = len(texture)
    column, row = u * size, v * size
    left, top = np.floor(column), np.floor(row)
    fx, fy = column - left, row - top
    x, y = left.astype(np.int32) % size, top.astype(np.int32) % size
    right, below = (x + 1) % size, (y + 1) % size
    # Interpolate along the two rows next to the position, then between them.
    upper = texture[y, x] * (1 - fx) + texture[y, right] * fx
    lower = texture[below, x] * (1 - fx) + texture[below, right] * fx
    return np.asarray(upper * (1 - fy) + lower * fy)[..., None]
