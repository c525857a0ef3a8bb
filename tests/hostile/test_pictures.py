"""Pictures without bounds: a ceiling on their size, and a limit on the memory of whoever reads them."""

from __future__ import annotations

import mmap
import re
import resource
import tarfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from PIL import Image

from tests.hostile.bounded import run_bounded
from video_swinv2.config import DataConfig
from video_swinv2.data import workers as loader_workers
from video_swinv2.data.datasets import SampleDataset
from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.data.display import MAX_PIXELS
from video_swinv2.data.images import read_image, read_tar_member
from video_swinv2.data.index import TarMember
from video_swinv2.data.loading import validation_loader
from video_swinv2.data.manifest import Entry
from video_swinv2.evaluation.overrides import TestOverrides, parse_overrides
from video_swinv2.evaluation.protocols import find_protocol
from video_swinv2.evaluation.reading import VideoGroups, deliver_groups
from video_swinv2.inference.streams import FrameStream
from video_swinv2.memory import growth_limit
from video_swinv2.weights.store import Preprocessing

Writer = Callable[..., Path]
MIB = 2**20
SIDE = 9216  # pixels: a square of them is a quarter above the ceiling


def run_apart(path: Path, setup: str, work: str) -> tuple[str, int]:
    """Run `work` on `path` in another process, after `setup` -> (its error, by how many bytes its memory grew)."""
    ended = run_bounded(
        "-c",
        f"import sys, pathlib\n{setup}\n"
        "from video_swinv2.errors import UserError\n"
        "from video_swinv2.memory import peak_memory_bytes\n"
        "path, before = pathlib.Path(sys.argv[1]), peak_memory_bytes()\n"
        f"try:\n    {work}\n"
        "except UserError as error:\n    print(error)\n"
        "print(peak_memory_bytes() - before)\n",
        path,
        memory_gib=12,
    )
    assert ended.code == 0, ended.err
    *words, grown = ended.out.splitlines()
    return "".join(words), int(grown)


def read_apart(path: Path) -> tuple[str, int]:
    """`run_apart` of decoding every frame of a video."""
    setup = "from video_swinv2.data.decode import VideoReader"
    return run_apart(path, setup, "with VideoReader(path) as reader: list(reader.sequence())")


def encode(side: int, count: int, codec: str = "libx264") -> list[bytes]:
    """The packets of `count` grey frames of side x side pixels, the first of them a key frame."""
    encoder = av.Codec(codec, "w").create("video")
    encoder.width = encoder.height = side
    encoder.pix_fmt, encoder.time_base, encoder.framerate = "yuv420p", Fraction(1, 25), Fraction(25)
    encoder.thread_count = 1
    # Without lookahead the encoder holds few frames, each of which takes 100 MB.
    encoder.options = {"preset": "ultrafast", "tune": "zerolatency"} if codec == "libx264" else {}
    grey = av.VideoFrame.from_ndarray(np.full((side * 3 // 2, side), 128, np.uint8), "yuv420p")
    packets = []
    for place in range(count):
        grey.pts, grey.time_base = place, encoder.time_base
        packets += encoder.encode(grey)
    return [bytes(packet) for packet in [*packets, *encoder.encode(None)]]


def mux(path: Path, packets: Sequence[bytes], side: int, codec: str = "libx264") -> Path:
    """Write packets to a container that gives `side` as height and width, whatever they hold."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
        for place, data in enumerate(packets):
            packet = Packet(data)
            packet.stream, packet.pts, packet.dts, packet.duration = stream, place, place, 1
            packet.time_base, packet.is_keyframe = Fraction(1, 25), place == 0
            container.mux(packet)
    return path


@pytest.fixture(scope="module")
def large() -> list[bytes]:
    return encode(SIDE, 2)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts"])
def test_too_large_a_video_is_refused_before_memory_is_allocated(tmp_path: Path, large: list[bytes], name: str) -> None:
    path = mux(tmp_path / name, large, SIDE)
    assert path.stat().st_size < 500_000
    error, grown = read_apart(path)
    assert error == (
        f"{path}: a picture of {SIDE} x {SIDE} pixels exceeds max_pixels = {MAX_PIXELS}; remove it or raise the limit"
    )
    assert grown < 50 * MIB, "one frame takes 121 MiB"


@pytest.mark.parametrize("name", ["v.mkv", "v.ts"])
def test_pictures_that_become_too_large_in_the_middle(tmp_path: Path, large: list[bytes], name: str) -> None:
    path = mux(tmp_path / name, [*encode(64, 3), *large], 64)
    error, grown = read_apart(path)
    assert re.fullmatch(rf"{path}: a picture of {SIDE} x {SIDE} pixels exceeds max_pixels = .*", error)
    assert grown < 50 * MIB
    with pytest.raises(DecodeError, match=rf"{name}: a picture of {SIDE} x {SIDE}"), FrameStream(str(path)) as stream:
        list(stream)


def test_the_ceiling_is_a_number_of_pixels_that_can_be_chosen(write_video: Writer, tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", np.zeros((3, 48, 64, 3), np.uint8))
    with VideoReader(path, max_pixels=48 * 64) as reader:
        assert reader.frames([0, 1, 2]).shape == (3, 3, 48, 64)
        with pytest.raises(DecodeError, match=r"v\.mp4: a picture of 66 x 49 pixels exceeds max_pixels = 3072"):
            reader.frames([0], 49)
    with pytest.raises(DecodeError, match=r"v\.mp4: a picture of 64 x 48 pixels exceeds max_pixels = 3071"):
        VideoReader(path, max_pixels=48 * 64 - 1)
    Image.new("RGB", (64, 48)).save(tmp_path / "i.png")
    assert read_image(tmp_path / "i.png", 48 * 64).shape == (3, 48, 64)
    with pytest.raises(DecodeError, match=r"i\.png: a picture of 64 x 48 pixels exceeds max_pixels = 3071"):
        read_image(tmp_path / "i.png", 48 * 64 - 1)


def test_too_large_an_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "i.png"
    Image.new("1", (SIDE, SIDE)).save(path)
    assert path.stat().st_size < 20_000
    error, grown = run_apart(path, "from video_swinv2.data.images import read_image", "read_image(path)")
    assert re.fullmatch(rf"{path}: a picture of {SIDE} x {SIDE} pixels exceeds max_pixels = .*", error)
    assert grown < 20 * MIB
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(path, "i.png")
    with tarfile.open(tmp_path / "t.tar") as tar:
        offset = tar.getmember("i.png").offset_data
    member = TarMember("i.png", tmp_path / "t.tar", -1, offset, path.stat().st_size)
    with pytest.raises(DecodeError, match=rf"t\.tar: i\.png: a picture of {SIDE} x {SIDE}"):
        read_tar_member(member)


def test_training_and_tests_have_a_key_for_the_ceiling(write_video: Writer, tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", np.zeros((4, 48, 64, 3), np.uint8))
    assert DataConfig(".", 32).max_pixels == TestOverrides().max_pixels == MAX_PIXELS >= 7680 * 4320
    data = DataConfig(".", 32, frames=2, max_pixels=3071, workers=0)
    sample = SampleDataset([Entry("v", str(path), 0)], data, None, 0, None)[0, 0]
    assert sample.broken == (
        f"{path}: a picture of 64 x 48 pixels exceeds max_pixels = 3071; remove it or raise the limit",
    )
    assert parse_overrides([f"data.max_pixels={2 * MAX_PIXELS}"]).max_pixels == 2 * MAX_PIXELS, "it can be raised"
    overrides = parse_overrides(["data.max_pixels=3071"])
    assert overrides.max_pixels == 3071
    groups = video_groups([path], max_pixels=overrides.max_pixels)
    assert groups.read(0)[0].reason.startswith("a picture of 64 x 48 pixels exceeds max_pixels = 3071")


def video_groups(paths: Sequence[Path], *, max_pixels: int, frames: int | None = 2) -> VideoGroups:
    return VideoGroups(
        [Entry(path.name, str(path), 0) for path in paths],
        find_protocol("center-1x1"),
        Preprocessing(frames=frames, frame_stride=1, image_size=(32, 32)),
        group_videos=1,
        frame_order="in-order",
        seed=0,
        time_limit_seconds=60.0,
        max_pixels=max_pixels,
    )


def test_frames_take_the_memory_of_their_pixels_once(tmp_path: Path) -> None:
    path, size = mux(tmp_path / "v.mkv", encode(1440, 24), 1440), 24 * 3 * 1440 * 1440
    setup = "import torch\nfrom video_swinv2.data.decode import VideoReader"
    error, grown = run_apart(path, setup, "with VideoReader(path) as reader: frames = reader.frames(range(24))")
    assert error == ""
    assert size < grown < 2 * size  # the decoder's own frames and one picture of conversion included


def test_a_limit_on_growth_holds_above_a_large_address_space() -> None:
    """A process with a GPU has reserved tens of GB that it does not use."""
    reserved = mmap.mmap(-1, 2**36, prot=0, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with growth_limit(256 * MIB):
            np.empty(128 * MIB, np.uint8)
            with pytest.raises(MemoryError):
                np.empty(512 * MIB, np.uint8)
            with growth_limit(2**40), pytest.raises(MemoryError):
                np.empty(512 * MIB, np.uint8)  # the outer limit still holds
    finally:
        reserved.close()
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    np.empty(512 * MIB, np.uint8)


def test_a_loader_worker_out_of_memory_costs_the_sample(
    write_video: Writer, large: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that takes more than its share is one broken sample in training, and one failed image in a test."""
    small = write_video(tmp_path / "small.mp4", np.zeros((4, 48, 64, 3), np.uint8))
    hungry = mux(tmp_path / "hungry.mkv", large, SIDE)  # two frames of 243 MiB in RGB
    monkeypatch.setattr(loader_workers, "READING_BYTES", 320 * MIB)
    entries = [Entry(path.name, str(path), 0) for path in (small, hungry, small)]
    data = DataConfig(".", 32, frames=2, workers=1, max_pixels=SIDE**2)
    loader = validation_loader(SampleDataset(entries, data, None, 0, None), 1, rank=0, world=1, pin=False)
    broken = [batch.broken for batch in loader]
    assert (broken[0], broken[2]) == ((), ())
    assert broken[1][0].startswith(f"{hungry}: takes too much memory to decode")
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "hungry.png")
    Image.new("L", (64, 64)).save(tmp_path / "small.png")
    groups = video_groups([tmp_path / "small.png", tmp_path / "hungry.png"], frames=None, max_pixels=SIDE**2)
    found: dict[int, str] = {}
    deliver_groups(groups, [0, 1], 1, lambda group, waited: found.update({group.number: group.videos[0].reason}))
    assert found == {0: "", 1: "takes too much memory to decode"}
