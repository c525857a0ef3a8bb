"""Decoding: every frame asked for is the one that plain decoding from the start gives, in every kind of file."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from data_prep.outcomes import REASONS
from video_swinv2.data import decode
from video_swinv2.data.decode import DecodeError, VideoReader, named_errors
from video_swinv2.data.display import ACCURATE, Orientation, size_for
from video_swinv2.errors import UsageError
from video_swinv2.inference.streams import FrameStream

Writer = Callable[..., Path]


def numbered_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames whose left half has brightness 8 * index, so that a decoded frame can be identified."""
    frames = np.full((count, height, width, 3), 128, dtype=np.uint8)
    frames[:, :, : width // 2] = (np.arange(count) * 8 % 256).astype(np.uint8)[:, None, None, None]
    return frames


def number_of(image: torch.Tensor) -> int:
    return round(float(image[:, :, : image.shape[2] // 3].float().mean()) / 8)


def plain_decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.best("video")  # FFmpeg's own choice
        stream.thread_type = "NONE"
        return np.stack(
            [frame.to_ndarray(format="rgb24", interpolation=ACCURATE) for frame in container.decode(stream)]
        )


def write_timed(
    path: Path, frames: np.ndarray, ticks: list[int], *, base: Fraction = Fraction(1, 1000), **options: str
) -> Path:
    """A video whose frame i is shown at ticks[i] of the time base."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10", **options})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = base
        for image, when in zip(frames, ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = when, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def assert_reads_like_plain_decode(path: Path) -> None:
    truth = plain_decode(path)
    with VideoReader(path) as reader:
        assert len(reader) == len(truth)
        indices = [*np.random.default_rng(0).integers(0, len(truth), 6).tolist(), len(truth) - 1, 0]
        for chosen in (indices, [len(truth) - 1]):
            assert np.array_equal(reader.frames(chosen).permute(0, 2, 3, 1).numpy(), truth[chosen])
        assert reader.stand_ins == 0


@pytest.mark.parametrize("b_frames", ["0", "3"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_any_order_with_repeats_equals_a_plain_decode(tmp_path: Path, name: str, b_frames: str) -> None:
    path = write_timed(tmp_path / name, numbered_frames(30), list(range(30)), base=Fraction(1, 25), g="7", bf=b_frames)
    assert_reads_like_plain_decode(path)
    with VideoReader(path) as reader:
        assert [number_of(image) for image in reader.frames([29, 3, 3, 17])] == [29, 3, 3, 17]
        np.testing.assert_allclose(np.diff(reader.times), 0.04, atol=1e-6)
        assert reader.fps == pytest.approx(25)
        assert reader.size == (48, 64)


@pytest.mark.parametrize(
    "name",
    [
        "decord__unordered.mov",
        "ft__fixture.asf",
        "ft__fixture2.mpg",
        "tc__var_fps_video.mp4",
        "tc__av1_video.mkv",
        "tc__h265_10bits.mp4",
        "ft__fixture-null.webm",
        "mma2__test.avi",
        "tc__nasa_13013.mp4",
        "ft__fixture.mov",
    ],
)
def test_real_files_equal_a_plain_decode(outside_data: Path, name: str) -> None:
    assert_reads_like_plain_decode(outside_data / "odd_clips" / name)


def test_packed_b_frames_equal_a_plain_decode(outside_data: Path) -> None:
    path = outside_data / "ut_interaction" / "kicking" / "set1_seq01_001.avi"
    truth = torch.from_numpy(plain_decode(path)).permute(0, 3, 1, 2)
    with VideoReader(path) as reader:
        assert len(reader) == len(truth)
        assert np.all(np.diff(reader.times) > 0)
        assert torch.equal(reader.frames(range(len(truth))), truth)


def test_real_presentation_times_of_an_uneven_video(tmp_path: Path) -> None:
    when = [0, 33, 100, 110, 400, 433, 900]
    with VideoReader(write_timed(tmp_path / "v.mp4", numbered_frames(7), when, bf="2")) as reader:
        np.testing.assert_allclose((reader.times - reader.times[0]) * 1000, when, atol=1e-6)
        assert reader.fps == pytest.approx(6 / 0.9)


def test_each_frame_is_decoded_from_its_own_key_packet_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    when = list(range(0, 1280, 40))
    path = write_timed(tmp_path / "v.mp4", numbered_frames(32), when, g="8", bf="0", sc_threshold="0")
    starts: list[int] = []
    inner = VideoReader._decode
    monkeypatch.setattr(VideoReader, "_decode", lambda self, start, *a: starts.append(start) or inner(self, start, *a))
    with VideoReader(path) as reader:
        assert starts == []  # an MP4 is numbered from its packets
        reader.frames([30, 31, 2, 1, 2])
        assert starts == [0, 24]
        starts.clear()
        reader.frames([7, 8, 15, 16])  # neighbouring groups of pictures: no restart
        assert starts == [0]


def decoded_pictures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the pts of every picture that leaves a decoder."""
    found: list[int] = []
    inner = decode.decode_packet

    def counted(*arguments: Any) -> list[av.VideoFrame]:
        frames = inner(*arguments)
        found.extend(frame.pts for frame in frames)
        return frames

    monkeypatch.setattr(decode, "decode_packet", counted)
    return found


@pytest.mark.parametrize("pyramid", ["none", "normal"])
def test_pictures_that_no_other_needs_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pyramid: str
) -> None:
    """With three B-frames in a row, every fourth picture is a P-frame, and in a pyramid the middle B-frame is used."""
    frames = np.random.default_rng(0).integers(0, 256, (33, 32, 48, 3), np.uint8)
    x264 = f"keyint=33:min-keyint=33:scenecut=0:bframes=3:b-adapt=0:b-pyramid={pyramid}"
    path = write_timed(tmp_path / "v.mp4", frames, list(range(33)), base=Fraction(1, 25), **{"x264-params": x264})
    truth = torch.from_numpy(plain_decode(path)).permute(0, 3, 1, 2)
    with VideoReader(path) as reader:
        number = {pts: index for index, pts in enumerate(reader._pts)}
        needed = set(range(0, 33, 2 if pyramid == "normal" else 4))
        pictures = decoded_pictures(monkeypatch)
        for wanted in ([5], [3, 20, 27], list(range(0, 33, 4)), list(range(33)), [32, 1]):
            pictures.clear()
            assert torch.equal(reader.frames(wanted), truth[wanted])
            assert {number[pts] for pts in pictures} <= needed | set(wanted)
        pictures.clear()
        assert [index for index, _ in reader.sequence()] == list(range(33))  # after it, all are decoded again
        assert reader.stand_ins == 0


def test_chosen_frames_of_real_clips_that_are_not_damaged_are_those_of_a_whole_decode(outside_data: Path) -> None:
    damaged = {"bitflips_mdat.mp4", "decord__corrupted.mp4", "mp4p__no_timescale.mp4"}
    compared = 0
    for path in sorted(outside_data.joinpath("odd_clips").iterdir()):
        try:
            with VideoReader(path) as reader:
                if reader.codec != "h264" or path.name in damaged:
                    continue
                count = len(reader)
                chosen = np.random.default_rng(0).integers(0, count, 6).tolist()
                wanted = [*chosen, *range(count // 3, count, 4)[:8], count - 1]
                truth = {index: reader.picture(frame, 64) for index, frame in reader.sequence() if index in wanted}
                for some in (wanted, wanted[:1], wanted[-1:]):
                    pictures = reader.frames(some, 64).permute(0, 2, 3, 1).numpy()
                    assert all(np.array_equal(a, truth[index]) for a, index in zip(pictures, some, strict=True)), path
                compared += 1
        except DecodeError:
            continue
    assert compared > 40


class ForgetfulDecoder:
    """A decoder that loses the time of one frame."""

    def __init__(self, codec: av.VideoCodecContext, lost: int) -> None:
        self.codec, self.lost, self.name, self.flush_buffers = codec, lost, codec.name, codec.flush_buffers

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        frames = self.codec.decode(packet)
        for frame in frames:
            frame.pts = None if frame.pts == self.lost else frame.pts
        return frames


def test_a_frame_without_a_time_is_not_taken_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_timed(tmp_path / "v.mkv", numbered_frames(9), list(range(0, 360, 40)), g="4", bf="0")
    with VideoReader(path) as reader:
        forgetful = ForgetfulDecoder(reader._stream.codec_context, lost=120)
        monkeypatch.setattr(reader, "_stream", SimpleNamespace(codec_context=forgetful))
        assert [index for index, _ in reader.sequence()] == [0, 1, 2, 4, 5, 6, 7, 8]
        # Frame 3 counts as damaged: the one before stands in for it.
        assert [number_of(image) for image in reader.frames([0, 3, 4])] == [0, 2, 4]
        assert reader.stand_ins == 1


@pytest.mark.parametrize("limit", [decode.MAX_RETAINED_BYTES, 2000])
def test_a_file_too_big_to_keep_in_memory_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(decode, "MAX_RETAINED_BYTES", limit)
    noise = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3), dtype=np.uint8)
    assert_reads_like_plain_decode(write_timed(tmp_path / "v.mp4", noise, list(range(0, 960, 40)), g="6"))


def write_two_streams(path: Path, default: int | None) -> Path:
    """A file with a preview, 2 frames of 32 x 24 pixels, and then a video, 6 numbered frames of 64 x 48 pixels.

    default: which of the two is marked as the one to play.
    """
    sizes = ((24, 32), (48, 64))
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg2video" if path.suffix == ".ts" else "libx264", rate=25) for _ in sizes]
        for place, (stream, size) in enumerate(zip(streams, sizes, strict=True)):
            (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
            stream.disposition = Disposition.default if place == default else Disposition(0)
        for stream, size, count in zip(streams, sizes, (2, 6), strict=True):
            for image in numbered_frames(count, *size):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "default", "size", "count"),
    [
        ("a.mp4", 1, (48, 64), 6),
        ("a.mkv", 1, (48, 64), 6),
        ("a.mkv", 0, (24, 32), 2),
        ("a.mkv", None, (48, 64), 6),  # none is marked: the largest
        ("a.ts", None, (48, 64), 6),  # has no such marks
    ],
)
@pytest.mark.parametrize("retained", [decode.MAX_RETAINED_BYTES, 0])
def test_of_several_video_streams_the_one_that_players_show_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    default: int | None,
    size: tuple[int, int],
    count: int,
    retained: int,
) -> None:
    monkeypatch.setattr(decode, "MAX_RETAINED_BYTES", retained)  # 0: the file is demuxed again for each request
    path = write_two_streams(tmp_path / name, default)
    with VideoReader(path) as reader:
        assert (reader.size, len(reader)) == (size, count)
        assert [number_of(image) for image in reader.frames(range(count))] == list(range(count))
    with FrameStream(str(path)) as stream:
        assert [stream.image(frame, None).shape[:2] for _, frame in stream] == [size] * count


def test_a_long_video_of_tiny_packets_is_too_big_to_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a packet takes besides its data counts: the file alone would be within the limit."""
    path = write_timed(tmp_path / "v.mp4", np.zeros((64, 16, 16, 3), np.uint8), list(range(64)), base=Fraction(1, 25))
    limit = 40_000
    assert path.stat().st_size < limit / 4
    monkeypatch.setattr(decode, "MAX_RETAINED_BYTES", limit)
    assert_reads_like_plain_decode(path)
    with VideoReader(path) as reader:
        path.unlink()
        with pytest.raises(DecodeError, match="No such file"):  # it is read again
            reader.frames([0])


def without_packets(path: Path, target: Path, count: int) -> Path:
    """A copy without the first `count` packets, as a cut between key frames leaves it."""
    with av.open(str(path)) as source, av.open(str(target), "w") as cut:
        stream = cut.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size and number >= count:
                packet.stream = stream
                cut.mux(packet)
    return target


@pytest.mark.parametrize(("name", "dropped"), [("a.mkv", 4), ("a.mp4", 4), ("a.mkv", 11)])
def test_pictures_before_the_first_key_frame_are_not_counted_if_they_cannot_be_decoded(
    tmp_path: Path, name: str, dropped: int
) -> None:
    """Key packets are number 0, 11 and 24. Of the 32 or 25 pictures that are left, the `ffmpeg` command shows 24."""
    options = {"g": "12", "bf": "2", "sc_threshold": "0", "x264-params": "open-gop=1"}
    whole = write_timed(tmp_path / "whole.mkv", numbered_frames(36), list(range(0, 1440, 40)), **options)
    path = without_packets(whole, tmp_path / name, dropped)
    assert_reads_like_plain_decode(path)
    with VideoReader(path) as reader:
        assert len(reader) == 24
        assert [number_of(image) for image in reader.frames([0, 23])] == [12, 35 % 32]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize(("transfer", "words"), [(16, "PQ"), (18, "HLG"), (14, "")])
def test_hdr_is_refused(tmp_path: Path, name: str, transfer: int, words: str) -> None:
    """But 10-bit BT.2020 with the transfer characteristic of ordinary video is not."""
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p10le"
        stream.codec_context.color_trc, stream.codec_context.color_primaries = transfer, 9
        stream.codec_context.colorspace = 9
        for image in numbered_frames(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p10le")))
        container.mux(stream.encode())
    if not words:
        assert_reads_like_plain_decode(path)
        return
    for opens in (VideoReader, lambda source: FrameStream(str(source))):
        with pytest.raises(DecodeError, match=rf"{name}: is HDR video \({words}\)") as caught:
            opens(path)
        assert caught.value.reason == "hdr"
        assert caught.value.reason in REASONS


@pytest.mark.parametrize(
    ("turn", "mirror"), [(0, False), (90, False), (180, False), (270, False), (0, True), (90, True)]
)
def test_rotation_and_mirroring_are_applied(tmp_path: Path, turn: int, mirror: bool) -> None:
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[:24, :32] = (255, 0, 0)
    picture[24:, :32] = (0, 255, 0)
    picture[:24, 32:] = (0, 0, 255)
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a display matrix")
        stream.set_display_rotation(turn, hflip=mirror)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        reported = next(container.decode(video=0)).rotation
    with VideoReader(path) as reader:
        image = reader.frames([1])[0].permute(1, 2, 0).numpy()
        assert reader.size == image.shape[:2]
        crop = reader.frames([1], crop=lambda height, width: (height // 4, width // 3, 20, 30))[0]
        top, left = image.shape[0] // 4, image.shape[1] // 3
        assert np.array_equal(crop.permute(1, 2, 0), image[top : top + 20, left : left + 30])
    # FFmpeg's angle is counterclockwise, as is NumPy's; a mirrored picture has none, so its matrix is written out.
    expected = np.rot90(picture, k=round(reported / 90) % 4) if not mirror else mirrored(path, picture)
    assert np.abs(image.astype(int) - expected).mean() < 20


def mirrored(path: Path, picture: np.ndarray) -> np.ndarray:
    """The picture moved pixel by pixel by the display matrix in the file."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        a, b, _, c, d = np.sign(np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), dtype=np.int32)[:5])
    height, width = picture.shape[:2]
    y, x = np.mgrid[:height, :width]
    shown_x, shown_y = a * x + c * y, b * x + d * y
    shown_x, shown_y = shown_x - shown_x.min(), shown_y - shown_y.min()
    out = np.empty((shown_y.max() + 1, shown_x.max() + 1, 3), dtype=picture.dtype)
    out[shown_y, shown_x] = picture
    return out


def test_quarter_turn_swaps_the_axes() -> None:
    image = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert (
        Orientation(transpose=True, flip_x=True).apply(image)[:, :, 0].tolist() == np.rot90(image, -1)[:, :, 0].tolist()
    )


@pytest.mark.parametrize("name", ["decord__video_90.mov", "decord__video_180.mov", "decord__video_270.mov"])
def test_real_phone_rotation(outside_data: Path, name: str) -> None:
    path = outside_data / "odd_clips" / name
    with av.open(str(path)) as container:
        turns = next(container.decode(video=0)).rotation // 90
    truth = np.rot90(plain_decode(path), k=turns, axes=(1, 2))
    with VideoReader(path) as reader:
        assert np.array_equal(reader.frames([2])[0].permute(1, 2, 0).numpy(), truth[2])


def test_pixels_are_made_square(outside_data: Path) -> None:
    with VideoReader(outside_data / "odd_clips" / "mp4p__h264_white_frame_sar_16_9.mp4") as reader:
        assert reader.size == (480, 1138)
        assert reader.frames([0]).shape == (1, 3, 480, 1138)


@pytest.mark.parametrize(
    ("shown", "short", "expected"),
    [((480, 640), 240, (240, 320)), ((640, 480), 240, (320, 240)), ((360, 641), 128, (128, 228)), ((7, 7), 9, (9, 9))],
)
def test_size_for_keeps_the_aspect_ratio(shown: tuple[int, int], short: int, expected: tuple[int, int]) -> None:
    assert size_for(shown, short) == expected
    assert size_for(shown, None) == shown


@pytest.mark.parametrize("short_side", [24, 96])
def test_short_side_resizes_down_and_up(write_video: Writer, tmp_path: Path, short_side: int) -> None:
    with VideoReader(write_video(tmp_path / "v.mp4", numbered_frames(9))) as reader:
        images = reader.frames([8, 2], short_side)
    assert images.shape == (2, 3, short_side, short_side * 4 // 3)
    assert images.dtype == torch.uint8
    assert [number_of(image) for image in images] == [8, 2]


@pytest.mark.parametrize(
    "name", ["with space.mp4", "it's.mp4", "-dash.mp4", 'a"b.mp4', "file:x%03d.mp4", "naïve 日本.mp4"]
)
def test_awkward_names(write_video: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_video(tmp_path / "plain.mp4", numbered_frames(4)).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with VideoReader(Path(name)) as reader:
        assert len(reader) == 4


def test_an_undecodable_frame_is_replaced_and_counted(outside_data: Path) -> None:
    path = outside_data / "odd_clips" / "decord__corrupted.mp4"  # 50 packets, one of them damaged
    with VideoReader(path) as reader:
        images = reader.frames(range(len(reader)))
        assert len(reader) == 50
        assert reader.stand_ins == 1
    doubled = [i for i in range(1, 50) if torch.equal(images[i], images[i - 1])]
    assert len(doubled) >= 1
    with VideoReader(path) as reader:
        assert torch.equal(reader.frames([doubled[0]])[0], images[doubled[0]])


def test_truncated_file_gives_the_frames_before_the_cut(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
    whole = write_timed(tmp_path / "whole.mkv", noise, list(range(0, 1600, 40)), g="8")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    truth = torch.from_numpy(plain_decode(whole)).permute(0, 3, 1, 2)
    with VideoReader(cut) as reader:
        assert 10 < len(reader) < 30
        sound = range(len(reader) - 1)  # the last packet may be truncated
        assert torch.equal(reader.frames(sound), truth[: len(sound)])


@pytest.mark.parametrize(
    ("content", "reason", "words"),
    [
        (None, "missing", "no such file"),
        (b"", "empty", "0 bytes"),
        (b"<html>404</html>" * 9, "not_video", "not a video"),
    ],
)
def test_files_that_are_no_videos_are_refused(tmp_path: Path, content: bytes | None, reason: str, words: str) -> None:
    path = tmp_path / "x.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DecodeError, match=words) as caught:
        VideoReader(path)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    revived = pickle.loads(pickle.dumps(caught.value))  # loader workers send it to the main process
    assert (str(revived), revived.reason) == (str(caught.value), reason)


@pytest.mark.parametrize(
    "name", ["mp4p__short-cenc.mp4", "mp4p__bipbop_cbcs_video_init.mp4", "ft__fixture-bad-offset.mp3"]
)
def test_files_without_pictures_are_refused(outside_data: Path, name: str) -> None:
    with pytest.raises(DecodeError, match=name), VideoReader(outside_data / "odd_clips" / name) as reader:
        reader.frames([0])


def test_an_unknown_codec_is_a_named_error(write_video: Writer, tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", numbered_frames(4))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"none"))
    with pytest.raises(DecodeError, match="codec is unknown") as caught:
        VideoReader(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.reason == "no_frames"


def write_thin_video(path: Path) -> Path:
    """4 frames of 2 x 16384 pixels. With 224 pixels on the short side, their long side is beyond what FFmpeg scales."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 2, 16384, "bgr0"
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(np.zeros((2, 16384, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
    return path


def test_a_picture_too_thin_to_resize_is_a_named_error(tmp_path: Path) -> None:
    path = write_thin_video(tmp_path / "thin.mkv")
    with VideoReader(path) as reader:
        assert reader.frames([0]).shape == (1, 3, 2, 16384)
        with pytest.raises(DecodeError, match=r"thin\.mkv: a picture of 1835008 x 224 pixels exceeds max_pixels"):
            reader.frames([0], 224)
        _, frame = next(reader.sequence())
        with pytest.raises(DecodeError, match=r"thin\.mkv: a picture of 1835008 x 224 pixels exceeds max_pixels"):
            reader.picture(frame, 224)


def test_frames_that_do_not_fit_into_memory_are_a_named_error(write_video: Writer, tmp_path: Path) -> None:
    # 4096 x 4096 pixels, ten million times, are 500 TB: more than a process can address.
    path = write_video(tmp_path / "v.mp4", numbered_frames(1, 16, 16))
    with VideoReader(path) as reader, pytest.raises(DecodeError, match=r"v\.mp4: takes too much memory to decode"):
        reader.frames([0] * 10**7, 4096)


def test_a_file_that_is_gone_when_it_is_read_again_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of an open reader that reads, generators included."""
    monkeypatch.setattr(decode, "MAX_RETAINED_BYTES", 0)
    path = write_timed(tmp_path / "v.mp4", numbered_frames(9), list(range(0, 360, 40)))
    with VideoReader(path) as reader:
        path.unlink()
        for read in (
            lambda: reader.size,
            lambda: reader.orientation,
            lambda: reader.frames([0]),
            lambda: list(reader.sequence()),
            lambda: list(reader.sequence(8)),
            lambda: list(reader.decode([3])),
        ):
            with pytest.raises(DecodeError, match=r"v\.mp4: cannot be decoded \(No such file or directory\)"):
                read()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda: av.open("/nowhere"), "cannot be decoded (No such file or directory)"),
        (lambda: np.empty(2**57), "takes too much memory to decode ("),
        (lambda: torch.empty(2**57), "cannot be decoded (RuntimeError: "),
        (lambda: Fraction(1, 0), "cannot be decoded (ZeroDivisionError: Fraction(1, 0))"),
        (lambda: round(float("inf")), "cannot be decoded (OverflowError: cannot convert float infinity to integer)"),
        (lambda: next(iter(())), "cannot be decoded (StopIteration)"),
    ],
)
def test_whatever_a_library_raises_names_the_file(fault: Callable[[], object], words: str) -> None:
    with pytest.raises(DecodeError) as caught, named_errors("a.mp4"):
        fault()
    assert str(caught.value).startswith(f"a.mp4: {words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, UsageError])
def test_what_no_file_is_to_blame_for_is_not_renamed(kind: type[BaseException]) -> None:
    with pytest.raises(kind), named_errors("a.mp4"):
        raise kind


def test_time_limit(write_video: Writer, tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", numbered_frames(9))
    with pytest.raises(DecodeError, match="not read within 0 s") as caught:
        VideoReader(path, time_limit_seconds=0.0)
    assert caught.value.reason == "timeout"


def test_an_index_outside_the_video_is_a_programming_error(write_video: Writer, tmp_path: Path) -> None:
    with VideoReader(write_video(tmp_path / "v.mp4", numbered_frames(5))) as reader:
        for indices in ([5], [-1], []):
            with pytest.raises(IndexError, match=r"0\.\.4"):
                reader.frames(indices)
        with pytest.raises(IndexError):
            reader.sequence(5)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_camera_frames_with_exif_are_turned(tmp_path, orientation, turns):
    """PyAV cannot list the side data of such frames; their rotation must come from elsewhere."""
    image = np.zeros((32, 48, 3), dtype=np.uint8)
    image[:16, :24] = 255
    picture = Image.fromarray(image)
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "frame.jpg", exif=exif, quality=95)
    with VideoReader(tmp_path / "frame.jpg") as reader:
        shown = reader.frames([0])[0].permute(1, 2, 0).numpy()
    expected = np.rot90(image, turns)
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).mean() < 8
