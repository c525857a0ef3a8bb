"""Prediction over time: equal results from every kind of source, hangs and crashes contained, videos annotated."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import video_swinv2 as vs
from tests.data.test_decode import numbered_frames, write_timed
from tests.inference.conftest import CLASSES
from video_swinv2.cli import main
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.protocols import PROTOCOLS
from video_swinv2.inference.annotated_video import _FILL, draw_caption, format_timecode, keep_places
from video_swinv2.inference.over_time import SegmentPrediction
from video_swinv2.inference.predictor import OverTime, Prediction, predict
from video_swinv2.inference.streams import frame_crops
from video_swinv2.inference.watching import Watcher, WatchRequest

EVERY = OverTime(every_seconds=0.2)  # every 5 frames at 25 frames per second
STARTS = (0, 5, 10, 15, 20, 25, 30, 33)  # first frames of the segments: 40 frames, 7 per segment


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def transport_stream(video: Path, path: Path) -> bytes:
    """The frames of a video as MPEG-TS, which a reader can join anywhere."""
    with av.open(str(video)) as source, av.open(str(path), "w", format="mpegts") as target:
        stream = target.add_stream("mpeg2video", rate=25, options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 10**6
        for frame in source.decode(video=0):
            target.mux(stream.encode(frame.reformat(format="yuv420p")))
        target.mux(stream.encode())
    return path.read_bytes()


@pytest.fixture(scope="module")
def over_time(evil_model: Path, changing: Path) -> Prediction:
    seen: list[tuple[str, SegmentPrediction]] = []
    (prediction,) = predict(
        evil_model, [changing], device="cpu", top=6, over_time=EVERY, on_segment=lambda *one: seen.append(one)
    )
    assert seen == [(str(changing), moment) for moment in prediction.segments]
    return prediction


def test_segments_equal_the_models_and_the_whole_is_that_of_a_test(
    over_time: Prediction, evil_model: Path, changing: Path
) -> None:
    card = vs.read_card(evil_model)
    with VideoReader(changing) as reader:
        side, boxes = frame_crops(PROTOCOLS["videoswin-4x3"], reader.size, (32, 32))
        clips = [reader.frames([start + 2 * i for i in range(4)], short_side=side) for start in STARTS]
    pixels = torch.stack([clip[:, :, y : y + h, x : x + w].transpose(0, 1) for clip in clips for y, x, h, w in boxes])
    with torch.no_grad():
        expected = vs.load_model(evil_model)(normalise(pixels, card.preprocessing.mean, card.preprocessing.std))
    shares = expected.softmax(-1).unflatten(0, (len(STARTS), 3)).mean(1)
    assert {moment.views for moment in over_time.segments} == {"videoswin-4x3: 1 segment x 3 crops"}
    assert shares.std(0).max() > 0.01, "equal segments would prove nothing"
    assert len(over_time.segments) == len(STARTS)
    for start, moment, row in zip(STARTS, over_time.segments, shares, strict=True):
        assert (moment.start_seconds, moment.end_seconds) == pytest.approx((start / 25, (start + 6) / 25), abs=1e-6)
        assert [one.name for one in moment.answers] == [CLASSES[i] for i in row.argsort(descending=True)]
        assert [one.probability for one in moment.answers] == pytest.approx(
            row.sort(descending=True)[0].tolist(), abs=1e-5
        )
    (whole,) = predict(evil_model, [changing], device="cpu", top=6)
    assert whole.views == over_time.views == "videoswin-4x3: 4 clips x 3 crops"
    assert over_time.answers == whole.answers, "to the bit"


def test_every_kind_of_source_gives_the_same(
    over_time: Prediction, evil_model: Path, changing: Path, tmp_path: Path
) -> None:
    """A file, the same file from a server, and through a named pipe."""
    moving = tmp_path / "moving.mkv"  # unlike MP4, it can be read without seeking
    with av.open(str(changing)) as source, av.open(str(moving), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_bytes(moving.read_bytes()), daemon=True).start()
    with served(tmp_path) as url:
        found = predict(evil_model, [f"{url}/moving.mkv", pipe], device="cpu", top=6, over_time=EVERY)
    for prediction in found:
        assert not prediction.error
        assert prediction.views == "videoswin-4x3: 8 segments x 3 crops", "a stream is read only once"
        mean = {name: 0.0 for name in CLASSES}
        for moment in prediction.segments:
            for one in moment.answers:
                mean[one.name] += one.probability / len(STARTS)
        assert {one.name: one.probability for one in prediction.answers} == pytest.approx(mean, abs=1e-9)
        assert len(prediction.segments) == len(over_time.segments)
        for ours, theirs in zip(prediction.segments, over_time.segments, strict=True):
            assert ours.start_seconds == pytest.approx(theirs.start_seconds, abs=0.002)  # Matroska counts milliseconds
            assert [one.name for one in ours.answers] == [one.name for one in theirs.answers]
            shares = [[one.probability for one in side.answers] for side in (ours, theirs)]
            assert shares[0] == pytest.approx(shares[1], abs=1e-5)


def test_a_growing_file_through_standard_input(evil_model: Path, changing: Path, tmp_path: Path) -> None:
    """What has arrived is classified before the rest exists; the stream ends with the input."""
    content, growing = transport_stream(changing, tmp_path / "whole.ts"), tmp_path / "growing.ts"
    growing.write_bytes(content[: len(content) * 3 // 4])
    tail = subprocess.Popen(["tail", "-c", "+1", "-f", str(growing)], stdout=subprocess.PIPE)
    command = [
        sys.executable,
        "-m",
        "video_swinv2",
        "predict",
        str(evil_model),
        "-",
        "--every",
        "0.2",
        "--csv",
        "--top",
        "6",
    ]
    reading = subprocess.Popen(command, stdin=tail.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reading.stdout is not None
    first = [reading.stdout.readline() for _ in range(7)]  # the header and the first segments
    with growing.open("ab") as file:
        file.write(content[len(content) * 3 // 4 :])
    time.sleep(1.5)  # tail looks once a second
    tail.terminate()
    out, err = reading.communicate(timeout=600)
    rows = list(csv.DictReader([*first, *out.splitlines()]))
    assert reading.returncode == 0, err
    starts = {row["start_seconds"] for row in rows}
    assert len(starts) == len(STARTS) + 1, "the segments and the whole"
    assert starts >= {"0.00", "0.20", "1.00"}
    assert sum(float(row["probability"]) for row in rows if not row["start_seconds"]) == pytest.approx(1.0, abs=0.01)


def test_a_live_stream_ends_after_the_seconds_asked_for(evil_model: Path, changing: Path) -> None:
    """UDP, as an IP camera sends; the sender never ends."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    over = threading.Event()

    def send() -> None:
        with av.open(f"udp://127.0.0.1:{port}?pkt_size=1316", "w", format="mpegts") as target:
            stream = target.add_stream("mpeg2video", rate=25, options={"g": "5"})
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 10**6
            for i in range(25 * 120):
                if over.wait(0.04):
                    return
                image = np.full((48, 64, 3), i % 256, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, "rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 25)
                target.mux(stream.encode(frame))

    threading.Thread(target=send, daemon=True).start()
    how = OverTime(every_seconds=0.2, seconds=1.0)
    (prediction,) = predict(evil_model, [f"udp://127.0.0.1:{port}"], device="cpu", over_time=how)
    over.set()
    assert not prediction.error
    assert 1 <= len(prediction.segments) <= 6
    assert len(prediction.segments) + prediction.skipped >= 4
    assert max(moment.end_seconds for moment in prediction.segments) <= 1.0


def test_a_live_stream_skips_segments_that_the_model_is_too_slow_for(changing: Path) -> None:
    seen = {}
    for live in (True, False):
        with Watcher(WatchRequest(str(changing), 4, 2, (32, 32), every_seconds=0.2, live=live, ahead=1)) as watcher:
            starts = []
            for window in watcher:
                starts.append(window.indices[0])
                time.sleep(0.1)
                watcher.answer([("a", 1.0)])
            watcher.finish()
        seen[live] = starts, watcher.summary and watcher.summary.skipped
    assert seen[False] == (list(STARTS), 0)
    starts, skipped = seen[True]
    assert 0 < skipped == len(STARTS) - len(starts)
    assert starts[-1] == STARTS[-1], "the end is never skipped"


def test_a_source_that_hangs_or_crashes_is_given_up(evil_model: Path, changing: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "silent")  # nobody writes: opening it never returns
    silent, file = predict(
        evil_model, [tmp_path / "silent", changing], device="cpu", over_time=EVERY, time_limit_seconds=1.5
    )
    assert "no frame arrived within 1.5 seconds" in silent.error
    assert not file.error
    with Watcher(WatchRequest(str(tmp_path / "silent"), 4, 2, (32, 32))) as watcher:
        os.kill(watcher._process.pid or 0, signal.SIGKILL)
        with pytest.raises(UserError, match=r"silent: the decoder crashed \(SIGKILL\)"):
            next(iter(watcher))
    with (
        Watcher(WatchRequest(str(changing), 4, 2, (32, 32)), limit_seconds=0.0) as watcher,
        pytest.raises(UserError, match="took longer than 0 seconds"),
    ):
        next(iter(watcher))


def test_unreadable_sources_are_reported_in_one_line(evil_model: Path, tmp_path: Path) -> None:
    (tmp_path / "page.mp4").write_text("<html>not found</html>")
    names = [str(tmp_path / "page.mp4"), "http://127.0.0.1:1/x.mp4", "/dev/null"]
    found = predict(evil_model, names, device="cpu", over_time=EVERY)
    assert [prediction.error.split(" (")[0] for prediction in found] == [
        "is not a video FFmpeg can open",
        *["not a video that FFmpeg can open"] * 2,
    ]
    assert all("\n" not in prediction.error for prediction in found)
    for names, words in (
        (["ftp://host/x.mp4"], "unsupported kind of URL"),
        (["file:///etc/passwd"], "unsupported kind of URL"),
        (["-", "-"], "standard input can be read only once"),
    ):
        with pytest.raises(UsageError, match=words):
            predict(evil_model, names, device="cpu")
    with pytest.raises(UsageError, match="--every 0"):
        predict(evil_model, ["-"], device="cpu", over_time=OverTime(every_seconds=0.0))


def test_an_annotated_video(
    evil_model: Path, changing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many frames as the source, at the same times, each unchanged and with a panel below it; the same answers."""
    out = tmp_path / "out"
    twice = [str(changing), str(changing)]
    assert main(["predict", str(evil_model), *twice, "--every", "0.2", "--video", str(out), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == second
    assert len(first["windows"]) == len(STARTS)
    assert sorted(path.name for path in out.iterdir()) == ["changing-2.mp4", "changing.mp4"]
    with VideoReader(changing) as before, VideoReader(out / "changing.mp4") as after:
        height, width = before.size
        assert after.size == draw_caption(np.zeros((height, width, 3), np.uint8), [], 0.0).shape[:2] > before.size
        np.testing.assert_allclose(after.times - after.times[0], before.times - before.times[0], atol=1e-3)
        for i in (0, 20, 39):
            frame = after.frames([i]).float()
            difference = (frame[:, :, :height] - before.frames([i]).float()).abs().mean((0, 1, 3))
            assert difference.max() < 40, "no row of the picture is covered"
            assert frame[:, :, height:].mean() < 80, "a dark panel"
            assert frame[:, :, height:].max() > 160, "with text"


@pytest.mark.parametrize(("height", "width"), [(1, 64), (64, 1)])
def test_an_annotated_video_of_pictures_one_pixel_wide(
    evil_model: Path, tmp_path: Path, height: int, width: int
) -> None:
    path = tmp_path / "thin.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p"
        for _ in range(9):
            picture = av.VideoFrame.from_ndarray(np.full((height, width, 3), 90, np.uint8), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv444p")))
        container.mux(stream.encode())
    (prediction,) = predict(evil_model, [path], device="cpu", over_time=OverTime(video=tmp_path / "out"))
    assert not prediction.error
    with VideoReader(tmp_path / "out" / "thin.mp4") as reader:
        assert len(reader) == 9
        panel = draw_caption(np.zeros((2 * height, 2 * width, 3), np.uint8), [], 0.0).shape[0] - 2 * height
        assert reader.size == (2 * height + panel, 2 * width)


def test_a_caption_covers_no_pixel_and_its_bars_keep_their_places() -> None:
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    first = keep_places([None] * 3, [("run", 0.5), ("walk", 0.3), ("clap", 0.2)])
    assert first == [("run", 0.5), ("walk", 0.3), ("clap", 0.2)]
    second = keep_places(first, [("walk", 0.6), ("jump", 0.3), ("run", 0.1), ("clap", 0.0)])
    assert second == [("run", 0.1), ("walk", 0.6), ("jump", 0.3)]
    assert keep_places(second, [("jump", 0.7), ("a", 0.3)]) == [("a", 0.3), None, ("jump", 0.7)]
    panels = [draw_caption(image, rows, 0.0) for rows in (first, second, [None] * 3)]
    for drawn in panels:
        assert np.array_equal(drawn[:128], image)
    # A font of 9 pixels has a margin of 4 and lines of 14; the first is the time.
    # The bar of "walk", in the second row, grows from 0.3 to 0.6 of its width; that of "run" shrinks in place.
    filled = [(panel[128:] == _FILL).all(-1) for panel in panels]
    widths = [[int(rows.any(0).sum()) for rows in np.array_split(fill[4 + 14 : 4 + 4 * 14], 3)] for fill in filled]
    assert widths[0][0] > widths[0][1] > widths[0][2]
    assert widths[1][1] > 1.8 * widths[0][1]
    assert widths[1][0] < widths[0][0] / 3
    assert widths[2] == [0, 0, 0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "00:00.0"), (0.3, "00:00.3"), (62.34, "01:02.3"), (3600.95, "1:00:00.9")]
)
def test_time_codes(seconds: float, text: str) -> None:
    assert format_timecode(seconds) == text


def test_segments_of_a_variable_frame_rate_start_by_time(tmp_path: Path) -> None:
    """30 frames per second for 2 seconds, then 2 frames per second for 4: segments of 4 frames, 2 apart."""
    ticks = [*range(0, 60), *range(60, 180, 15)]
    path = write_timed(tmp_path / "v.mp4", numbered_frames(68), ticks, base=Fraction(1, 30))
    with Watcher(WatchRequest(str(path), 4, 2, (32, 32), every_seconds=0.5)) as watcher:
        found = []
        for window in watcher:
            found.append((window.seconds[0], window.seconds[-1]))
            watcher.answer([("a", 1.0)])
        watcher.finish()
    # From 1.8 s on, a segment lasts longer than half a second. One at 3 s would end at 6 s, when the stream is over.
    ends = [(0, 0.2), (0.5, 0.7), (1, 1.2), (1.5, 1.7), (2, 5), (2.5, 5.5)]
    np.testing.assert_allclose(found, ends, atol=1e-3)


def test_a_failure_leaves_no_video(evil_model: Path, outside_data: Path, tmp_path: Path) -> None:
    broken = outside_data / "odd_clips" / "broken" / "html_error_page.mp4"
    (prediction,) = predict(evil_model, [broken], device="cpu", over_time=OverTime(video=tmp_path / "out"))
    assert prediction.error
    assert list((tmp_path / "out").iterdir()) == []


def test_segments_of_an_image_model_are_single_frames(evil_image_model: Path, changing: Path) -> None:
    (prediction,) = predict(evil_image_model, [changing], device="cpu", over_time=OverTime(every_seconds=0.4))
    assert [moment.start_seconds for moment in prediction.segments] == pytest.approx([0, 0.4, 0.8, 1.2, 1.56])


def test_no_process_is_left_when_the_parent_is_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "silent")
    code = (
        "import sys, time; from video_swinv2.inference.watching import WatchRequest, Watcher\n"
        "if __name__ == '__main__':\n"
        f"    watcher = Watcher(WatchRequest({str(tmp_path / 'silent')!r}, 4, 2, (32, 32)))\n"
        "    watcher._receive(60); print(watcher._process.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 600
    while alive(child):
        assert time.monotonic() < deadline, "the process is still alive"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
