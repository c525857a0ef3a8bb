"""torchcodec and decord, which can read prepared data sets in place of PyAV for training (`data.decoder`).

PyAV is the reference and reads every file. The other two read only data sets whose clips `prepare` has brought to one
form (H.264, square pixels, no edit list, short groups of pictures). Of these they decode the same pictures, but convert
them to RGB in swscale's default way, which cannot be changed from outside: it rounds down and gives neighbouring pixels
the same chroma. Values are 1 of 255 lower on average and differ by up to 64 at edges of colour (`display.py` says what
swscale is asked for instead). So `auto` takes neither, and they have to be asked for by name.

They have no limits of their own on time or on the size of pictures. PyAV checks the header before they see a file, and
loader workers are killed and limited in memory as with PyAV.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import av
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from video_swinv2.config import DataConfig
from video_swinv2.data.decode import DecodeError, VideoReader, find_video_stream, named_errors, one_line, open_container
from video_swinv2.data.display import MAX_PIXELS, Box, PictureSizeError, check_pixels, size_for
from video_swinv2.data.manifest import is_prepared
from video_swinv2.errors import UsageError, UserError

Decoder = Literal["pyav", "torchcodec", "decord"]
OTHER_DECODERS: tuple[Decoder, ...] = ("torchcodec", "decord")
# What to do if one of them does not load.
LOADING = {
    "torchcodec": "install torchcodec, and FFmpeg 4 or later with its shared libraries",
    "decord": "install decord",
}


def choose_decoder(data: DataConfig) -> Decoder:
    """The decoder that reads the videos of a configuration: the one it asks for if `prepare` made all of its sources.

    Raises UsageError if that decoder does not load on this machine.
    """
    if data.decoder == "auto" or data.decoder == "pyav":
        return "pyav"
    if reason := why_missing(data.decoder):
        raise UsageError(
            f"data.decoder: {data.decoder} does not load ({reason}); {LOADING[data.decoder]}, or set it to auto"
        )
    return data.decoder if all(is_prepared(Path(os.fspath(source))) for source in data.source) else "pyav"


def why_missing(decoder: Decoder) -> str:
    """Why torchcodec or decord cannot be used on this machine, on one line; '' if it can."""
    try:
        importlib.import_module("torchcodec.decoders" if decoder == "torchcodec" else decoder)
    except ModuleNotFoundError:
        return "not installed"
    except Exception as fault:  # RuntimeError from torchcodec without FFmpeg's libraries, OSError from decord
        return one_line(fault)
    return ""


def open_video(
    path: Path, decoder: Decoder = "pyav", *, time_limit_seconds: float = 60.0, max_pixels: int = MAX_PIXELS
) -> VideoReader | PreparedReader:
    """A reader of a video: of another decoder than PyAV if that is asked for and the file's header is as prepared."""
    if decoder != "pyav" and (size := _prepared_size(path, max_pixels)):
        return (TorchcodecReader if decoder == "torchcodec" else DecordReader)(path, size, max_pixels)
    return VideoReader(path, time_limit_seconds=time_limit_seconds, max_pixels=max_pixels)


class PreparedReader:
    """One open video of a prepared data set, not read by PyAV; a context manager like `VideoReader`.

    `size` is its (height, width) in pixels. There is no time limit, and a damaged frame is an error. Whatever goes
    wrong is raised as a DecodeError whose message begins with the path.
    """

    def __init__(self, path: Path, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> None:
        self.path = Path(path)
        self.size = size
        self._max_pixels = max_pixels
        with named_errors(self.path):
            self._video = self._open()

    def __enter__(self) -> PreparedReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._video  # neither library has a call that closes a file

    def __len__(self) -> int:
        return len(self._video)

    def frames(
        self, indices: Sequence[int], short_side: int | None = None, crop: Callable[[int, int], Box] | None = None
    ) -> Tensor:
        """Like `VideoReader.frames`, but resizing is torchvision's, bilinear with antialiasing."""
        wanted = sorted(set(indices))
        if not wanted or wanted[0] < 0 or wanted[-1] >= len(self):
            raise IndexError(f"{self.path}: has frames 0..{len(self) - 1}, asked for {wanted[:1]}..{wanted[-1:]}")
        height, width = size_for(self.size, short_side)
        with named_errors(self.path):
            check_pixels(height, width, self._max_pixels)
            pixels = self._read(wanted)
            if tuple(pixels.shape[-2:]) != self.size:
                raise DecodeError(f"{self.path}: its pictures have another size than its header says; prepare it again")
            pixels = F.resize(pixels, [height, width], antialias=True)
            if crop is not None:
                pixels = F.crop(pixels, *crop(height, width))
            return pixels if wanted == list(indices) else pixels[[wanted.index(index) for index in indices]]

    def _open(self) -> Any:
        """The library's reader, whose length is the number of frames, with one thread."""
        raise NotImplementedError

    def _read(self, indices: list[int]) -> Tensor:
        """The frames with these indices, which ascend: uint8 (len(indices), 3, *size), not necessarily contiguous."""
        raise NotImplementedError


class TorchcodecReader(PreparedReader):
    """Reads through torchcodec, which uses the FFmpeg of the system."""

    def _open(self) -> Any:
        from torchcodec.decoders import VideoDecoder

        return VideoDecoder(str(self.path), num_ffmpeg_threads=1)

    def _read(self, indices: list[int]) -> Tensor:
        pixels: Tensor = self._video.get_frames_at(indices).data
        return pixels


class DecordReader(PreparedReader):
    """Reads through decord, which carries an FFmpeg of its own."""

    def _open(self) -> Any:
        import decord

        return decord.VideoReader(str(self.path), num_threads=1)

    def _read(self, indices: list[int]) -> Tensor:
        return torch.from_numpy(self._video.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)


def _prepared_size(path: Path, max_pixels: int) -> tuple[int, int] | None:
    """(height, width) of a file whose header is as `prepare` writes it; None for any other, which PyAV has to judge."""
    if not path.is_file():
        return None
    try:
        with open_container(str(path.absolute()), max_pixels) as container:
            stream = find_video_stream(container, str(path), max_pixels)
            codec = stream.codec_context
            as_prepared = (
                "isom" in container.metadata.get("compatible_brands", "")  # of MP4; QuickTime has "qt"
                and len(container.streams) == 1
                and (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
                and (stream.sample_aspect_ratio or 1) == 1
            )
            return (codec.height, codec.width) if as_prepared else None
    except (UserError, PictureSizeError, av.FFmpegError, OSError, ValueError):
        return None
