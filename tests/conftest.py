"""What all tests share: external data, a small video writer, and a seed for every test and fixture."""

from __future__ import annotations

import os
import random
import signal
import zlib
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


# The number of threads decides how sums are split, and so their last bits. The tests and the processes they start use
# one thread each: results do not depend on the machine, and two test processes on two cores do not fight over them,
# which made some tests seven times as slow.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
torch.set_num_threads(THREADS)
# AMX would make bf16 the precision `auto` and round products in its own way. oneDNN reads this at its first product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def _seed(name: str) -> None:
    """Seed every generator from a name alone: crc32, because Python's hash() differs between processes."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries under test use the legacy global generator
    torch.manual_seed(seed)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Set up every fixture, whatever its scope, from a random state that depends on its name alone.

    Afterwards the previous state is restored: a test that requests a fixture halfway through draws the same numbers
    whether or not another test has already set that fixture up.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - as above
    _seed(f"{fixturedef.baseid}::{fixturedef.argname}")
    try:
        return (yield)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002 - as above
        torch.set_rng_state(before[2])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Start every test from a random state that depends on its name alone, whatever else runs and in which order.

    Afterwards the number of threads is restored, which benchmarks change.
    """
    _seed(item.nodeid)
    try:
        return (yield)
    finally:
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep image indexes in a folder of this session instead of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Let tests send Ctrl-C to subprocesses, which otherwise inherit an ignored SIGINT from background shells."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def outside_data() -> Path:
    """The folder of real clips and photographs next to the checkout; without it the test is skipped."""
    folder = Path(os.environ.get("VIDEO_SWINV2_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder}: no such folder of test data; set VIDEO_SWINV2_TEST_DATA to one")
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
