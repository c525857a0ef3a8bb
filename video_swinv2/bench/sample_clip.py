"""Generates a video for machines without data, which `doctor`, `plan` and `bench` then read."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from video_swinv2.errors import UserError

# A typical prepared Kinetics video: short side 256 pixels, 10 s at 30 frames per second, a key frame every 16 frames.
SIZE = (256, 340)  # (H, W)
FPS, SECONDS, GOP = 30, 10, 16


def write_clip(path: Path, *, size: tuple[int, int] = SIZE, seconds: float = SECONDS) -> int:
    """Write a video of a moving, textured picture as H.264 in MP4, as `data_prep` does; returns its number of frames.

    size: (H, W) in pixels. The grey in the middle of each frame encodes the frame's number, which `frame_number` reads
    back. Raises UserError if PyAV cannot encode H.264.
    """
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    # Noise that moves with the picture, so that the bit rate is that of a real video. It is twice as wide as a frame:
    # each frame shows a cut-out of it that starts one pixel further to the right.
    grain = np.random.default_rng(0).integers(-12, 13, (height, 2 * width, 3))
    count = round(seconds * FPS)
    # No B-frames ("bf": "0"), so that frames are stored in the order in which they are shown.
    options = {"crf": "23", "preset": "veryfast", "bf": "0", "g": str(GOP), "threads": "1"}
    try:
        with av.open(str(path), "w", format="mp4") as out:
            stream = out.add_stream("libx264", rate=Fraction(FPS), options=options)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for number in range(count):
                wave = 110 + 60 * np.sin((columns + 3 * number) / 17) + 40 * np.cos((rows - 2 * number) / 11)
                # (H, W) -> (H, W, 3) by adding coloured noise.
                picture = wave[..., None] + grain[:, number % width : number % width + width]
                picture[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = frame_grey(number, count)
                image = np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8))
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode())  # flushes the frames that the encoder still holds
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{path}: cannot encode H.264 ({error}); install PyAV's own wheel (pip install av)") from error
    return count


def frame_grey(number: int, count: int) -> int:
    """The grey in the middle of frame `number` of `count`: 16 in the first frame, 236 in the last."""
    return round(16 + 220 * number / max(count - 1, 1))


def frame_number(grey: float, count: int) -> float:
    """The number of the frame with this grey in its middle, the inverse of `frame_grey`. Not rounded."""
    return (grey - 16) / 220 * max(count - 1, 1)
