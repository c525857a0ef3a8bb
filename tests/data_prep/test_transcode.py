"""One video: cut by real frame times, resampled on request, copied if it has the prepared form, always checked."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from data_prep.encode import TIME_BASE, H264Settings, difference_from_prepared_form, write_video
from data_prep.jobs import (
    FULL_HD,
    Outcome,
    TranscodeJob,
    TranscodeSettings,
    encode_limit_seconds,
    index_limit_seconds,
    initial_limit_seconds,
)
from data_prep.pool import run_jobs
from data_prep.transcode import ReadBackError, read_back, remove_partial_files, transcode_video
from video_swinv2.data.decode import VideoReader
from video_swinv2.files import sha256

Writer = Callable[..., Path]
SMALL = TranscodeSettings(short_side=32)


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames that show their number, up to 255, as eight binary stripes: black is 0, white is 1."""
    bits = np.arange(count)[:, None] >> np.arange(8) & 1
    return (bits * 255).astype(np.uint8)[:, None, :, None].repeat(height, 1).repeat(width // 8, 2).repeat(3, 3)


def write(path: Path, times: list[float], *, options: dict[str, str] | None = None, **more: object) -> Path:
    """A video of numbered frames shown at `times`; `more`: size, sound, late_index, movflags, metadata, format."""
    height, width = more.get("size", (32, 48))  # type: ignore[misc]  # a pair
    late = {} if more.get("late_index") else {"movflags": f"+faststart{more.get('movflags', '')}"}
    with av.open(str(path), "w", format=str(more.get("format", "mp4")), options=late) as container:
        container.metadata.update(more.get("metadata", {}))  # type: ignore[call-overload]  # a dict
        settings = {"g": "16", "bf": "0", "sc_threshold": "0", "preset": "ultrafast"} | (options or {})
        stream = container.add_stream("libx264", rate=25, options=settings)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.time_base = TIME_BASE
        stream.codec_context.sample_aspect_ratio = Fraction(str(more.get("sar", "1")))
        sound = container.add_stream("aac", rate=16000, layout="mono") if more.get("sound") else None
        for place, image in enumerate(numbered(len(times), height, width)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(times[place] / TIME_BASE), TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            noise.sample_rate = 16000
            container.mux([*sound.encode(noise), *sound.encode()])
    return path


def make(source: Path, settings: TranscodeSettings = SMALL, **part: float) -> tuple[Outcome, Path]:
    target = source.parent / "made" / "clip.mp4"
    return transcode_video(TranscodeJob(1, source, target, settings, **part), lambda seconds: None), target


def numbers(path: Path) -> list[int]:
    """Which frames of the source a video shows."""
    with VideoReader(path) as reader:
        frames = reader.frames(range(len(reader))).float().mean((1, 2))
    stripes = frames.reshape(len(frames), 8, -1).mean(2) > 128
    return (stripes.int() << torch.arange(8)).sum(1).tolist()


def times_of(path: Path) -> np.ndarray:
    with VideoReader(path) as reader:
        return reader.times


UNEVEN = np.cumsum([0, *np.random.default_rng(1).uniform(0.01, 0.12, 99)]).tolist()


@pytest.mark.parametrize("first", [0.0, 7.5])  # the clock of the source may start anywhere
def test_a_segment_is_cut_by_real_frame_times(tmp_path: Path, first: float) -> None:
    source = write(tmp_path / "film.mkv", [first + when for when in UNEVEN], format="matroska")
    with VideoReader(source) as reader:
        shown = reader.times - reader.times[0]
    start, end = float(shown[40]), float(shown[70])  # each exactly at a frame: the first is included, the second is not
    outcome, made = make(source, start=start, end=end)
    assert outcome.reason == ""
    assert numbers(made) == list(range(40, 70))
    np.testing.assert_allclose(times_of(made), shown[40:70] - shown[40], atol=2e-5)
    assert outcome.duration_seconds == pytest.approx(end - start, abs=0.1)
    outcome, made = make(source, start=shown[40] + 0.005)
    assert numbers(made) == list(range(41, 100))
    outcome, made = make(source, end=0.001)
    assert numbers(made) == [0]


def test_a_segment_is_not_decoded_from_the_beginning(tmp_path: Path) -> None:
    times = [place / 25 for place in range(120)]
    source = write(tmp_path / "film.mp4", times, options={"g": "12", "bf": "2"})
    with VideoReader(source) as reader:
        assert next(reader.sequence(101))[0] == 96
    outcome, made = make(source, start=101 / 25, end=110 / 25)
    assert outcome.reason == ""
    assert numbers(made) == list(range(101, 110))


def test_too_short(tmp_path: Path) -> None:
    source = write(tmp_path / "a.mp4", [place / 25 for place in range(50)])
    for part in ({"start": 1.2, "end": 3.2}, {"start": 2.5, "end": 4.0}, {"start": 5.0}, {"start": 1.01, "end": 1.02}):
        outcome, _ = make(source, **part)
        assert outcome.reason == "too_short"
        assert f"segment {part['start']:g} to" in outcome.detail
        assert "the source ends at 2.00 s" in outcome.detail
    assert make(source, start=0.9, end=3.0)[0].frames == 27  # a little more than half of it
    outcome, _ = make(source, TranscodeSettings(32, min_seconds=2.5))
    assert (outcome.reason, outcome.detail) == ("too_short", "2.00 s, less than 2.5")
    assert make(source, TranscodeSettings(32, min_seconds=2.0))[0].reason == ""
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["clip.mp4"]


def test_a_constant_rate_repeats_and_skips_frames_by_time(tmp_path: Path) -> None:
    source = write(tmp_path / "a.mp4", UNEVEN)
    with VideoReader(source) as reader:
        shown, lasts = reader.times, float(reader.times[-1]) + 1 / reader.fps
    for fps in (5.0, 30000 / 1001):
        outcome, made = make(source, TranscodeSettings(32, fps=fps))
        moments = np.arange(round(lasts * fps)) / fps
        assert outcome.fps == fps
        np.testing.assert_allclose(times_of(made), moments, atol=2e-5)
        assert numbers(made) == (np.searchsorted(shown, moments + 6e-6, side="right") - 1).tolist()
    even = write(tmp_path / "b.mp4", [place / 25 for place in range(40)])
    assert numbers(make(even, TranscodeSettings(32, fps=25.0))[1]) == list(range(40))
    assert numbers(make(even, TranscodeSettings(32, fps=50.0))[1]) == [place // 2 for place in range(80)]
    assert numbers(make(even, TranscodeSettings(32, fps=10.0), start=0.4, end=0.8)[1]) == [10, 12, 15, 17]
    assert make(even, TranscodeSettings(32, fps=0.1))[0].frames == 1


def test_absurd_time_stamps_end_neither_the_run_nor_the_disk(tmp_path: Path) -> None:
    """The last of 12 frames comes 317 years after the others."""
    source = write(tmp_path / "v.mkv", [*(i / 25 for i in range(11)), 1e10], format="matroska")
    job = TranscodeJob(1, source, tmp_path / "out" / "v.mp4", TranscodeSettings(short_side=32, fps=25.0))
    # In a process, as in a run: neither its time limit is too large for a timer, nor does it take until then.
    ((_, outcome),) = run_jobs(transcode_video, [job], workers=1, seconds_for=initial_limit_seconds)
    assert isinstance(outcome, Outcome)
    assert (outcome.reason, outcome.detail) == (
        "decode_error",
        "only 12 frames in 10909090909 s; its time stamps are damaged",
    )


@pytest.mark.parametrize("limit", [index_limit_seconds(2**60), encode_limit_seconds(2**60, 2**60, FULL_HD)])
def test_no_file_decides_on_a_limit_above_a_day(limit: float) -> None:
    assert limit == 24 * 3600


def test_a_file_with_an_unknown_codec_fails_by_reason(tmp_path: Path) -> None:
    source = write(tmp_path / "a.mp4", [place / 25 for place in range(4)])
    source.write_bytes(source.read_bytes().replace(b"avc1", b"none"))
    outcome, _ = make(source)
    assert (outcome.reason, outcome.detail) == ("no_frames", "its video codec is unknown to FFmpeg")


def test_copy_keeps_the_bytes_of_videos_in_the_prepared_form(tmp_path: Path) -> None:
    source = write(tmp_path / "raw.mp4", UNEVEN)
    _, prepared = make(source)
    again = prepared.rename(tmp_path / "prepared.mp4")
    outcome, made = make(again, TranscodeSettings(32, copy=True))
    assert made.read_bytes() == again.read_bytes()
    assert (outcome.sha256, outcome.frames) == (sha256(again), 100)
    assert outcome.source_sha256 == outcome.sha256
    for settings, part in [
        (SMALL, {}),
        (TranscodeSettings(16, copy=True), {}),
        (TranscodeSettings(32, gop=8, copy=True), {}),
        (TranscodeSettings(32, fps=25.0, copy=True), {}),
        (TranscodeSettings(32, copy=True), {"start": 0.0, "end": 2.0}),
    ]:
        outcome, made = make(again, settings, **part)
        assert outcome.reason == ""
        assert made.read_bytes() != again.read_bytes()
    steady = make(source, TranscodeSettings(32, fps=25.0))[1].rename(tmp_path / "steady.mp4")
    assert make(steady, TranscodeSettings(32, fps=25.0, copy=True))[1].read_bytes() == steady.read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"format": "mov"}, "not MP4"),
        ({"format": "matroska"}, "not MP4"),
        ({"sound": True}, "has more than one stream"),
        ({"sar": "4/3"}, "pixels are not square"),
        ({"size": (64, 80)}, "short side above 48"),
        ({"metadata": {"title": "of a person"}}, "metadata (title)"),
        ({"late_index": True}, "index after the frames"),
        ({"options": {"g": "40"}}, "key frames more than 16 frames apart"),
        ({"options": {"bf": "2"}}, "has an edit list"),
        ({"options": {"bf": "2"}, "movflags": "+negative_cts_offsets"}, ""),
        (
            {"options": {"g": "12", "bf": "2", "x264-params": "open-gop=1"}, "movflags": "+negative_cts_offsets"},
            "open groups of pictures",
        ),
    ],
)
def test_differences_from_the_prepared_form(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = write(tmp_path / "a.mp4", [place / 25 for place in range(40)], **change)  # type: ignore[arg-type]  # any
    assert difference_from_prepared_form(path, short_side=48, gop=16) == words


def test_a_damaged_source_is_not_copied(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), dtype=np.uint8)
    source = write(tmp_path / "a.mp4", [place / 25 for place in range(40)])
    place, size = pictures_of(source)[20]
    whole = bytearray(source.read_bytes())
    whole[place : place + size] = noise.tobytes()[:size]
    source.write_bytes(whole)
    assert difference_from_prepared_form(source, short_side=32, gop=16) == ""
    outcome, made = make(source, TranscodeSettings(32, copy=True))
    assert made.read_bytes() != bytes(whole) or outcome.reason
    assert outcome.detail or outcome.reason


def pictures_of(path: Path) -> list[tuple[int, int]]:
    """(position, length) in bytes of each compressed picture in a file."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def test_whatever_the_disk_makes_of_a_written_file_is_found(tmp_path: Path) -> None:
    path, ticks = tmp_path / "a.mp4", [3600 * place for place in range(40)]
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), dtype=np.uint8)
    frames = ((tick, av.VideoFrame.from_ndarray(image)) for tick, image in zip(ticks, noise, strict=True))
    pictures = write_video(path, frames, size=(32, 48), fps=25.0, settings=H264Settings())
    read_back(path, (32, 48), ticks, pictures)
    written = path.read_bytes()
    place, size = pictures_of(path)[30]
    flipped = bytearray(written)
    flipped[place + size // 2] ^= 1
    path.write_bytes(flipped)
    with VideoReader(path) as reader:
        assert sum(1 for _ in reader.sequence()) == 40, "decoding does not find a flipped bit"
    with pytest.raises(ReadBackError, match="pictures read back differ"):
        read_back(path, (32, 48), ticks, pictures)
    path.write_bytes(written[:-1])
    with pytest.raises(ReadBackError):
        read_back(path, (32, 48), ticks, pictures)
    path.write_bytes(written)
    with pytest.raises(ReadBackError, match="39 frames written, 40 read back"):
        read_back(path, (32, 48), ticks[:-1], pictures)
    with pytest.raises(ReadBackError, match="frame times"):
        read_back(path, (32, 48), [*ticks[:-1], ticks[-1] + 2], pictures)
    with pytest.raises(ReadBackError, match=r"\(48, 32\) written"):
        read_back(path, (48, 32), ticks, pictures)


def test_pixels_come_out_square(outside_data: Path, tmp_path: Path) -> None:
    source = outside_data / "odd_clips" / "mp4p__h264_white_frame_sar_16_9.mp4"
    target = tmp_path / "a.mp4"
    outcome = transcode_video(TranscodeJob(1, source, target, TranscodeSettings(240)), lambda seconds: None)
    assert (outcome.height, outcome.width) == (240, 568)  # 480 x 640, pixels 16:9
    with av.open(str(target)) as container:
        assert (container.streams.video[0].sample_aspect_ratio or 1) == 1


def test_removing_partial_files_spares_those_of_others(tmp_path: Path) -> None:
    for name in (".a.mp4.0123abcd.part", ".b.mp4.0123abcd.part", ".c.mp4.part", "a.mp4", ".d.mp4.part.txt"):
        (tmp_path / name).write_bytes(b"half")
    assert remove_partial_files(tmp_path, lambda target: target.name == "a.mp4") == 1
    assert remove_partial_files(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".d.mp4.part.txt", "a.mp4"]
