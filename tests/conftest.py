"""Fixtures shared by all tests: outside data, a small video writer, seeds that do not leak."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state, so that their order does not matter."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the old global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes of images are kept in a folder of the session, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Ctrl-C reaches what tests start, also where this was started in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def outside_data() -> Path:
    """The folder of real clips and photographs beside the checkout; where it is absent the test is skipped."""
    folder = Path(os.environ.get("VIDEO_SWINV2_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no outside data at {folder}: set VIDEO_SWINV2_TEST_DATA to a folder that holds it")
    return folder


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """A function that writes frames (N, H, W, 3) uint8 to a real video file and returns its path."""

    def write(
        path: Path, frames: np.ndarray, *, fps: int = 25, codec: str = "libx264", gop: int = 8, lossless: bool = False
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"crf": "0" if lossless else "18", "preset": "ultrafast"} if codec == "libx264" else {}
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=Fraction(fps), options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv444p" if lossless else "yuv420p"
            stream.gop_size = gop
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        return path

    return write
