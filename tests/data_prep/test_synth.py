"""Generated motions: the classes of a pair are exact reversals, and only the order of frames distinguishes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from data_prep import synth
from data_prep.cli import main
from data_prep.synth import CLASSES, Clip, draw
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.manifest import read_manifest

TWINS = list(zip(CLASSES[::2], CLASSES[1::2], strict=True))


def clip(label: str, index: int, level: synth.Level = "easy", size: int = 32, frames: int = 8) -> Clip:
    return Clip(Path("unused.mp4"), "train", label, index, level, size, frames, seed=0)


def draw_many(label: str, count: int, level: synth.Level) -> np.ndarray:
    return np.stack([draw(clip(label, index, level)) for index in range(count)])


def test_classes_of_a_pair_are_the_same_clip_played_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "_key", lambda seed, split, label, index: [seed, index])
    for one, other in TWINS:
        assert np.array_equal(draw(clip(one, 4)), draw(clip(other, 4))[::-1])


def test_clips_are_all_different() -> None:
    seen = {draw(clip(label, index)).tobytes() for label in CLASSES for index in range(5)}
    assert len(seen) == 40
    assert np.array_equal(draw(clip("left", 3)), draw(clip("left", 3)))


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_rounding_differences_change_no_pixel(monkeypatch: pytest.MonkeyPatch, level: synth.Level) -> None:
    """Perturb every intermediate array by hundreds of last bits, far more than CPUs differ by: no pixel may change."""
    clips = [clip(label, index, level) for label in CLASSES for index in range(10)]
    before = [draw(one) for one in clips]
    dither = np.random.default_rng(0)

    def moved(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(moved(part) for part in value)
        return value * (1 + dither.uniform(-1e-13, 1e-13, np.shape(value)))

    for name in ("_track", "_outline", "_texture", "_inks", "_sample", "_background"):
        exact = getattr(synth, name)
        monkeypatch.setattr(synth, name, lambda *given, exact=exact: moved(exact(*given)))
    for number, one in enumerate(clips):
        assert np.array_equal(draw(one), before[number]), one


def test_colours_agree_with_ffmpeg() -> None:
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 140, 200]], np.uint8)
    frames = np.ascontiguousarray(np.broadcast_to(colours[:, None, None], (6, 34, 34, 3)))
    for frame, planes in zip(frames, synth.to_yuv420(frames), strict=True):
        theirs = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p").to_ndarray()
        assert planes.shape == theirs.shape == (51, 34)
        assert np.abs(planes.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_neither_single_frames_nor_their_mean_separate_a_pair(level: synth.Level) -> None:
    count = 80
    truth = np.repeat([0, 1], count)
    scores = []
    for one, other in TWINS:
        clips = np.concatenate([draw_many(one, count, level), draw_many(other, count, level)]).astype(np.float32)
        small = clips.reshape(2 * count, 8, 8, 4, 8, 4, 3).mean(axis=(3, 5))
        looks = {"first": small[:, 0], "middle": small[:, 4], "last": small[:, -1], "mean": small.mean(axis=1)}
        looks |= {"deviation": small.std(axis=1)}
        for look in looks.values():
            features = look.reshape(2 * count, -1) / 255
            scores.append(cross_val_score(LogisticRegression(max_iter=300), features, truth, cv=4).mean())
    # 20 scores of 160 clips each: one standard deviation of chance is 0.04.
    assert abs(np.mean(scores) - 0.5) < 0.04
    assert max(abs(score - 0.5) for score in scores) < 0.15


def motion_signs(frames: np.ndarray) -> tuple[float, float, float, float]:
    """Signs of the optical flow of the bright shape: to the right, down, clockwise around its centre, outward."""
    light = frames.astype(np.float64).mean(axis=-1)
    weight = np.clip(light - 100, 0, None)
    size = light.shape[1]
    circle = np.exp(2j * np.pi * np.arange(size) / size)
    middle_x = np.angle((weight.sum(axis=1) * circle).sum(axis=1)) * size / 2 / np.pi
    middle_y = np.angle((weight.sum(axis=2) * circle).sum(axis=1)) * size / 2 / np.pi
    x = (np.arange(size)[None, None, :] - middle_x[:, None, None] + size / 2) % size - size / 2
    y = (np.arange(size)[None, :, None] - middle_y[:, None, None] + size / 2) % size - size / 2
    along_x = np.sin(np.angle(np.exp(2j * np.pi * np.diff(middle_x) / size))).sum()
    along_y = np.sin(np.angle(np.exp(2j * np.pi * np.diff(middle_y) / size))).sum()
    change, mid = np.diff(light, axis=0), (light[1:] + light[:-1]) / 2
    grad_y, grad_x = np.gradient(mid, axis=(1, 2))
    turning = -(change * (x[1:] * grad_y - y[1:] * grad_x)).sum()
    growing = np.median(np.diff(weight.sum(axis=(1, 2))))
    return along_x, along_y, turning, growing


def test_the_order_of_frames_separates_a_pair() -> None:
    expected = {"right": (0, 1), "left": (0, -1), "down": (1, 1), "up": (1, -1)}
    expected |= {"clockwise": (2, 1), "anticlockwise": (2, -1), "approaching": (3, 1), "receding": (3, -1)}
    for label, (axis, sign) in expected.items():
        signs = [np.sign(motion_signs(draw(clip(label, index, size=64)))[axis]) for index in range(25)]
        assert np.mean(np.array(signs) == sign) >= 0.8, label


def test_the_data_set_does_not_depend_on_the_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--train", "2", "--val", "1", "--test", "1", "--size", "32", "--frames", "8"]
    for workers in ("1", "3"):
        assert main(["synth", str(tmp_path / workers), *numbers, "--workers", workers]) == 0
    one, three = (read_manifest(tmp_path / workers, "train") for workers in ("1", "3"))
    assert one.fingerprint == three.fingerprint
    for name in sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file()):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    assert one.classes == CLASSES
    assert [entry.name for entry in one.entries[:3]] == [
        "videos/train/left/00000.mp4",
        "videos/train/left/00001.mp4",
        "videos/train/right/00000.mp4",
    ]
    with VideoReader(one.entries[5].path) as reader:
        assert (len(reader), reader.size, reader.codec, reader.fps) == (8, (32, 32), "h264", pytest.approx(16))
        frames = reader.frames(range(8)).permute(0, 2, 3, 1).numpy()
    drawn = draw(Clip(one.entries[5].path, "train", "up", 1, "easy", 32, 8, 0))
    assert np.abs(frames.astype(int) - drawn).mean() < 12

    capsys.readouterr()
    assert main(["synth", str(tmp_path / "1"), *numbers]) == 0
    assert "already there with these settings" in capsys.readouterr().out
    assert main(["synth", str(tmp_path / "1"), *numbers, "--seed", "5"]) == 2
    assert "contains another data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "33"], "--size 33"),
        (["--frames", "1"], "--frames 1"),
        (["--train", "0", "--val", "0", "--test", "0"], "at least one must be positive"),
    ],
)
def test_impossible_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["synth", str(tmp_path / "x"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert not (tmp_path / "x").exists()


def test_negative_numbers_are_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["synth", str(tmp_path / "x"), "--train", "-1"])
    assert "argument --train: must be from 0 to 1,000,000" in capsys.readouterr().err
