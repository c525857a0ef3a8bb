"""A file decides neither how long its job may take nor how long anybody waits for it."""

from __future__ import annotations

import csv
import math
import struct
import time
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.jobs import TranscodeJob, TranscodeSettings, initial_limit_seconds
from data_prep.pool import Allow, Lost, run_jobs
from data_prep.transcode import transcode_video
from data_prep.verify import ExpectedFile, FileCheck, check_file
from tests.hostile.bounded import Ended, run_bounded
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.workers import killing_alarm
from video_swinv2.inference.watching import Watcher, WatchRequest
from video_swinv2.killable import KillableProcess

HOUR = 3600.0


def write_slow(path: Path, frames: int, seconds_apart: float, size: tuple[int, int] = (32, 32)) -> Path:
    """A video of black frames (height, width) that lasts as long as wished, in a few kB."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        frame = av.VideoFrame.from_ndarray(np.full((size[0] * 3 // 2, size[1]), 16, np.uint8), "yuv420p")
        for place in range(frames):
            frame.pts, frame.time_base = round(place * seconds_apart * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_flv(path: Path, times: list[int]) -> Path:
    """An FLV of one picture of 16 x 16 pixels, shown at each of the times in milliseconds."""
    encoder = av.Codec("flv", "w").create("video")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 16, 16, "yuv420p", Fraction(1, 25)
    picture = av.VideoFrame.from_ndarray(np.full((24, 16), 128, np.uint8), "yuv420p")
    picture.pts = 0
    # "FLV", version, "has video", length of this header and of the tag before the first
    # (Adobe Flash Video File Format Specification, annex E).
    parts = [b"FLV\x01\x01\x00\x00\x00\x09\x00\x00\x00\x00"]
    body = b"\x12" + b"".join(bytes(packet) for packet in encoder.encode(picture))  # key frame, codec 2
    for milliseconds in times:
        # Video, the length of the body, the lower 24 bits of the time and then the upper 8, stream 0.
        when = (milliseconds & 0xFFFFFF).to_bytes(3, "big") + (milliseconds >> 24).to_bytes(1, "big")
        tag = b"\x09" + len(body).to_bytes(3, "big") + when + bytes(3) + body
        parts += [tag, len(tag).to_bytes(4, "big")]
    path.write_bytes(b"".join(parts))
    return path


def limits_of(source: Path, settings: TranscodeSettings) -> list[float]:
    """The time limits that a job asks for."""
    asked: list[float] = []
    outcome = transcode_video(TranscodeJob(1, source, source.with_suffix(".out.mp4"), settings), asked.append)
    assert outcome.reason == ""
    return asked


def test_a_time_limit_follows_the_frames_in_the_file_and_not_its_duration(tmp_path: Path) -> None:
    settings = TranscodeSettings(short_side=32)
    long = write_slow(tmp_path / "long.mp4", 650, 100.0)
    assert long.stat().st_size < 12_000
    # Eighteen hours of 650 small frames, and three hours and twenty minutes of three large ones.
    (limit,) = limits_of(long, settings)
    assert 650 < limit < HOUR / 2
    (limit,) = limits_of(write_slow(tmp_path / "large.mp4", 3, 6000.5, (2160, 3840)), settings)
    assert 60 < limit < 120
    asked: list[float] = []
    assert check_file(FileCheck("long.mp4", long, "full", ExpectedFile()), asked.append).reason == ""
    assert 650 < asked[0] < HOUR / 2
    # Frames that a constant rate has to write count, since they are work as well.
    (limit,) = limits_of(write_slow(tmp_path / "b.mp4", 20, 10.0), TranscodeSettings(short_side=32, fps=10.0))
    assert 60 + 20 < limit < 120


def send_one(pipe: Connection) -> None:
    pipe.send("here")
    time.sleep(600)


@pytest.mark.parametrize("seconds", [math.inf, 1e300, 2.0**31 / 1000])
def test_no_number_of_seconds_is_too_long_to_wait(seconds: float) -> None:
    process = KillableProcess(send_one, method="fork")
    try:
        assert process.receive(seconds) == "here"
        with killing_alarm(seconds):
            pass
    finally:
        process.end()


def shout(job: TranscodeJob, allow: Allow) -> str:
    return job.source.name


def test_a_job_whose_limit_cannot_be_computed_fails_alone(tmp_path: Path) -> None:
    names = ["a", "nul\0byte", "b"]  # stat refuses the second one with a ValueError
    jobs = [TranscodeJob(i, tmp_path / name, tmp_path, TranscodeSettings()) for i, name in enumerate(names)]
    ended = {
        job.source.name: result for job, result in run_jobs(shout, jobs, workers=1, seconds_for=initial_limit_seconds)
    }
    assert (ended["a"], ended["b"]) == ("a", "b")
    assert ended["nul\0byte"] == Lost("crashed", "ValueError: embedded null byte")


def test_the_commands_get_over_files_that_lie_about_their_length(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    write_slow(clips / "healthy.mp4", 10, 0.04)
    write_slow(clips / "long.mp4", 650, 100.0)
    write_slow(clips / "large.mp4", 3, 6000.5, (2160, 3840))
    # Two flipped bits in the last time of an FLV: the frame before it would be shown for fifteen days.
    write_flv(clips / "flipped.flv", [*range(0, 400, 40), 400 | 0x50000000])
    (tmp_path / "list.csv").write_text(
        "path,label\n" + "".join(f"{path.name},run\n" for path in sorted(clips.iterdir()))
    )
    out = tmp_path / "out"

    def command(*words: str | Path) -> Ended:
        return run_bounded("-m", "data_prep", *words, cpu_seconds=60, memory_gib=12)

    options = ["--annotations", tmp_path / "list.csv", "--short-side", "32", "--workers", "1"]
    estimated = command("prepare", clips, out, *options, "--preflight")
    assert "sample: 4 videos" in estimated.out, estimated.err
    prepared = command("prepare", clips, out, *options)
    assert "Traceback" not in prepared.err
    with (out / "train.csv").open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == [
            f"videos/train/run/{name}.mp4" for name in ("healthy", "large", "long")
        ]
    with (out / "failed.csv").open() as file:
        (failed,) = csv.DictReader(file)
        assert (failed["path"], failed["reason"]) == ("flipped.flv", "decode_error")
        assert failed["detail"] == "its time stamps are damaged: one frame is shown for 373 hours"
    with VideoReader(out / "videos" / "train" / "run" / "long.mp4") as reader:
        assert reader.times[-1] == 64_900
    verified = command("verify", out, "--level", "full", "--workers", "1")
    assert verified.code == 0, verified.out
    assert verified.cpu_seconds < 30


def test_the_number_of_segments_does_not_follow_the_header(tmp_path: Path) -> None:
    """A clip of 40 s whose header says a tenth of a second: the segments are spread over what is in the file."""
    path = write_slow(tmp_path / "v.mkv", 1000, 0.04)
    content = bytearray(path.read_bytes())
    place = content.index(b"\x44\x89\x88") + 3  # Matroska's element Duration, a float64 in milliseconds
    assert struct.unpack_from(">d", content, place) == (pytest.approx(40_000),)
    struct.pack_into(">d", content, place, 100.0)
    path.write_bytes(content)
    starts = []
    with path.open("rb") as file:
        request = WatchRequest("The clip", 2, 1, (32, 32), max_segments=24)
        with Watcher(request, descriptor=file.fileno()) as watcher:
            for segment in watcher:
                starts.append(segment.seconds[0])
                watcher.answer([("a", 1.0)])
            watcher.finish()
    # 24 segments of 2 frames in 1,000 are 44 frames apart. The last one ends with the last frame.
    np.testing.assert_allclose(starts, [*(1.76 * place for place in range(23)), 39.92], atol=2e-3)


READ = """
import sys, numpy
from pathlib import Path
from video_swinv2.data.decode import VideoReader
with VideoReader(Path(sys.argv[1])) as reader:
    print(len(reader), bool((numpy.diff(reader.times) > 0).all()), *reader.times[[1, -2, -1]], reader.fps)
"""


def test_very_many_equal_times_are_spread_in_linear_time(tmp_path: Path) -> None:
    """200,000 frames at 0 s and one at a second: they share the second, in strictly ascending order."""
    count = 200_000
    path = write_flv(tmp_path / "v.flv", [0] * count + [1000])
    ended = run_bounded("-c", READ, path, cpu_seconds=60)
    frames, ascending, second, before_last, last, fps = ended.out.split()
    assert (int(frames), ascending) == (count + 1, "True")
    assert (float(second), float(last), float(fps)) == pytest.approx((1 / count, 1.0, count))
    assert float(before_last) == pytest.approx(1 - 1 / count)
    assert ended.cpu_seconds < 20


def test_equal_times_at_the_end_are_a_frame_period_apart(tmp_path: Path) -> None:
    with VideoReader(write_flv(tmp_path / "v.flv", [0, 40, 80, 80, 80, 100, 200, 200])) as reader:
        period = 1 / float(reader._stream.average_rate or 25)
        expected = [0, 0.04, 0.08, 0.08 + 0.02 / 3, 0.08 + 0.04 / 3, 0.1, 0.2, 0.2 + period]
        np.testing.assert_allclose(reader.times, expected, atol=1e-9)
