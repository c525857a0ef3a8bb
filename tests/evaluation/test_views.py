"""Views of real files: the right pixels of the right frames, from one open and one decoding pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.data.display import ACCURATE
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.protocols import PROTOCOLS, Protocol
from video_swinv2.evaluation.views import cut_views, read_views
from video_swinv2.weights.store import Preprocessing

VIDEOSWIN = PROTOCOLS["videoswin-4x3"]
CENTER = PROTOCOLS["center-1x1"]
CLIP = Preprocessing(frames=4, frame_stride=2, image_size=(32, 32))


def moving(n: int, height: int, width: int) -> np.ndarray:
    """Frames (n, H, W, 3) whose brightness encodes their index, with a ramp over columns and rows."""
    ramp = np.linspace(0, 100, width)[None, :, None]
    rows = np.linspace(0, 40, height)[:, None, None]
    return np.stack([np.broadcast_to(ramp + rows + 4 * i, (height, width, 3)) for i in range(n)]).astype(np.uint8)


def all_frames(path: Path) -> torch.Tensor:
    """(n, 3, H, W), decoded by PyAV alone."""
    with av.open(str(path)) as container:
        images = [frame.to_ndarray(format="rgb24", interpolation=ACCURATE) for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("height", "width"), [(32, 56), (56, 32), (32, 32)])
def test_every_view_is_the_crop_of_its_frames(
    write_video: Callable[..., Path], tmp_path: Path, height: int, width: int
) -> None:
    path = write_video(tmp_path / "a.mp4", moving(21, height, width), lossless=True)
    pixels, views = read_views(path, VIDEOSWIN, CLIP)
    assert pixels.shape == (12, 3, 4, 32, 32)
    assert pixels.dtype == torch.uint8
    assert [view.start for view in views[::3]] == [1, 5, 8, 12]  # (21 - 8 + 1) / 4 = 3.5
    frames = all_frames(path)
    for clip, view in zip(pixels, views, strict=True):
        top, left, *_ = view.box
        expected = frames[list(view.indices)][:, :, top : top + 32, left : left + 32].transpose(0, 1)
        assert (clip.int() - expected.int()).abs().max() <= 1
    lefts = {view.box[1] for view in views}
    assert lefts == ({0, 12, 24} if width == 56 else {0})


def test_a_short_video_wraps_around(write_video: Callable[..., Path], tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(3, 32, 32), lossless=True)
    pixels, views = read_views(path, VIDEOSWIN, CLIP)
    assert {view.indices for view in views} == {(0, 2, 1, 0)}
    assert torch.equal(pixels[0, :, 0], pixels[0, :, 3])
    assert not torch.equal(pixels[0, :, 0], pixels[0, :, 1])


def test_resize_and_centre_crop(write_video: Callable[..., Path], tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(9, 64, 128), lossless=True)
    pixels, views = read_views(path, CENTER, CLIP)
    assert pixels.shape == (1, 3, 4, 32, 32)
    assert views[0].box == (2, 21, 32, 32)  # short side round(32 * 256 / 224) = 37, long side 74
    middle = all_frames(path)[views[0].indices[0], 0].float()
    shown = pixels[0, 0, 0].float()
    scale = 64 / 37  # the ramp is linear, so brightness in the crop gives the column in the frame
    for x in (3, 16, 28):
        assert shown[16, x] == pytest.approx(float(middle[int(18.5 * scale), int((21.5 + x) * scale)]), abs=2.5)


def test_a_crop_that_is_not_square(write_video: Callable[..., Path], tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(9, 48, 64), lossless=True)
    for size in ((32, 64), (64, 32)):
        pixels, views = read_views(path, VIDEOSWIN, Preprocessing(frames=4, frame_stride=1, image_size=size))
        assert pixels.shape == (12, 3, 4, *size)
        assert len({view.box for view in views}) == 3


def test_an_image_model_gets_single_frames(write_video: Callable[..., Path], tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(10, 32, 48), lossless=True)
    pixels, views = read_views(path, CENTER, Preprocessing(frames=None, frame_stride=9, image_size=(32, 32)))
    assert pixels.shape == (1, 3, 32, 32)
    assert views[0].indices == (5,)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter[Any]]:
    """Counters from here on: files opened, and frames decoded by (file, index)."""
    counts: dict[str, Counter[Any]] = {"opened": Counter(), "frames": Counter()}
    really_open, really_decode = av.open, VideoReader._decode

    def counting_open(file: str, *mode: str, **options: Any) -> Any:
        counts["opened"][file] += not mode
        return really_open(file, *mode, **options)

    def counting_decode(reader: VideoReader, *request: Any) -> Iterator[tuple[int, av.VideoFrame]]:
        for index, frame in really_decode(reader, *request):
            counts["frames"][str(reader.path), index] += 1
            yield index, frame

    monkeypatch.setattr(av, "open", counting_open)
    monkeypatch.setattr(VideoReader, "_decode", counting_decode)
    return counts


ALL = [protocol for name, protocol in PROTOCOLS.items() if "full" not in name]


@pytest.mark.parametrize("protocols", [[VIDEOSWIN], ALL])
def test_one_open_and_one_pass(
    write_video: Callable[..., Path], tmp_path: Path, decoded: dict[str, Counter[Any]], protocols: list[Protocol]
) -> None:
    path = write_video(tmp_path / "a.mp4", moving(90, 32, 56))
    with VideoReader(path) as reader:
        _, views, stand_ins = cut_views(reader, protocols, CLIP, frame_order="in-order", seed=0, name="a")
    assert len(views) == sum(protocol.views for protocol in protocols)
    assert stand_ins == 0
    assert decoded["opened"][str(path)] == 1
    first, *others = (decoded["frames"][str(path), index] for index in range(90))
    assert first <= 2, "the first frame is also decoded for its size"
    assert max(others) == 1
    wanted = {index for view in views for index in view.indices}
    assert all(decoded["frames"][str(path), index] for index in wanted)


def test_far_frames_are_reached_by_their_key_frames(
    write_video: Callable[..., Path], tmp_path: Path, decoded: dict[str, Counter[Any]]
) -> None:
    path = write_video(tmp_path / "a.mp4", moving(200, 32, 32), gop=8)
    with VideoReader(path) as reader:
        expected = reader.frames([3, 12, 100, 101, 190], 24)
        decoded["frames"].clear()
        found = {index: reader.picture(frame, 24) for index, frame in reader.decode([190, 3, 12, 101, 100])}
    assert list(found) == [3, 12, 100, 101, 190]
    pictures = torch.from_numpy(np.stack(list(found.values()))).permute(0, 3, 1, 2)
    assert torch.equal(pictures, expected)
    assert decoded["frames"].total() == 13 + 6 + 7, "the groups of pictures in between are skipped"


def test_several_protocols_see_the_same_as_each_alone(write_video: Callable[..., Path], tmp_path: Path) -> None:
    for size in ((48, 90), (48, 48)):
        path = write_video(tmp_path / "a.mp4", moving(40, *size), lossless=True)
        with VideoReader(path) as reader:
            together, views, _ = cut_views(reader, ALL, CLIP, frame_order="shuffled", seed=1, name="a")
        first = 0
        for protocol in ALL:
            alone, seen = read_views(path, protocol, CLIP, frame_order="shuffled", seed=1, name="a")
            assert views[first : first + protocol.views] == seen
            assert torch.equal(together[first : first + protocol.views], alone)
            first += protocol.views
        assert first == len(together)


def test_orders_of_frames(write_video: Callable[..., Path], tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(60, 32, 32), lossless=True)
    clip = Preprocessing(frames=12, frame_stride=2, image_size=(32, 32))
    plain, views = read_views(path, VIDEOSWIN, clip)
    backwards, turned = read_views(path, VIDEOSWIN, clip, frame_order="reversed")
    assert torch.equal(backwards, plain.flip(2))
    assert turned[0].indices == views[0].indices[::-1]
    mixed, first = read_views(path, VIDEOSWIN, clip, frame_order="shuffled", seed=3, name="x")
    again, _ = read_views(path, VIDEOSWIN, clip, frame_order="shuffled", seed=3, name="x")
    assert torch.equal(mixed, again)
    assert not torch.equal(mixed, plain)
    for before, after in zip(views, first, strict=True):
        assert sorted(before.indices) == sorted(after.indices)
    assert len({tuple(np.argsort(view.indices)) for view in first}) == 12, "each view has its own order"
    for other in ({"seed": 4, "name": "x"}, {"seed": 3, "name": "y"}):
        _, changed = read_views(path, VIDEOSWIN, clip, frame_order="shuffled", **other)  # type: ignore[arg-type]
        assert changed != first
    with pytest.raises(UsageError, match=r"backwards.*in-order, shuffled, reversed"):
        read_views(path, CENTER, clip, frame_order="backwards")


def test_a_broken_file_is_a_decode_error(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video at all" * 20)
    with pytest.raises(DecodeError, match=r"a\.mp4"):
        read_views(tmp_path / "a.mp4", CENTER, CLIP)


def test_normalise() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 5, 6), dtype=torch.uint8)
    result = normalise(pixels, CLIP.mean, CLIP.std)
    assert result.dtype == torch.float32
    expected = (pixels.numpy()[1, 2, 3, 4, 5] / 255 - 0.406) / 0.225
    assert float(result[1, 2, 3, 4, 5]) == pytest.approx(expected, abs=1e-6)
    assert normalise(pixels[:, :, 0], CLIP.mean, CLIP.std).shape == (2, 3, 5, 6)
