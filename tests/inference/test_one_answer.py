"""One answer for one clip: `predict`, `predict --every` and the page of `serve` agree to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from video_swinv2.inference.classifier import Classifier, open_classifier
from video_swinv2.inference.clip_summary import Limits, summarise_clip
from video_swinv2.inference.predictor import OverTime, predict

SECONDS = 600.0  # a limit that no machine reaches

Answers = list[tuple[str, float]]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> list[Path]:
    """50 clips of 1 to 148 frames of moving noise, wide, square and tall, in three containers."""
    folder, random = tmp_path_factory.mktemp("clips"), np.random.default_rng(5)
    paths = []
    for number in range(50):
        height, width = ((6, 8), (6, 6), (10, 5), (4, 11))[number % 4]
        blocks = random.integers(0, 256, (1 + 3 * number, height, width, 3), dtype=np.uint8)
        suffix = ("mp4", "mkv", "avi")[number % 3]
        paths.append(write_video(folder / f"{number:02d}.{suffix}", blocks.repeat(8, 1).repeat(8, 2)))
    return paths


def page_answer(classifier: Classifier, clip: Path) -> tuple[Answers, str]:
    with clip.open("rb") as file:
        result = summarise_clip(classifier, file.fileno(), Limits(seconds=SECONDS))
    assert {window["views"].split(": ")[0] for window in result["windows"]} == {classifier.protocol.name}
    return [(one["name"], one["probability"]) for one in result["answers"]], result["views"]


def test_fifty_clips_have_one_answer_each(evil_model: Path, clips: list[Path]) -> None:
    classifier = open_classifier(evil_model, top=6, device="cpu")
    whole = predict(evil_model, clips, top=6, device="cpu", time_limit_seconds=SECONDS)
    every = OverTime(every_seconds=1.0)
    over_time = predict(evil_model, clips, top=6, device="cpu", over_time=every, time_limit_seconds=SECONDS)
    assert len({prediction.answers[0].name for prediction in whole}) > 1, "equal answers would prove nothing"
    for clip, one, other in zip(clips, whole, over_time, strict=True):
        assert not one.error
        assert (one.answers, one.views) == (other.answers, other.views)
        answers, views = page_answer(classifier, clip)
        assert (answers, views) == ([(answer.name, answer.probability) for answer in one.answers], one.views)
        if len(other.segments) == 1:  # a clip no longer than one segment is all of it
            shares = [[answer.probability for answer in row] for row in (one.answers, other.segments[0].answers)]
            assert shares[0] == pytest.approx(shares[1], abs=1e-4)


@pytest.mark.parametrize("protocol", ["center-1x1", "slowfast-10x3", "swinv2g-4x5"])
def test_every_protocol_gives_one_answer(evil_model: Path, clips: list[Path], protocol: str) -> None:
    some, classifier = clips[1::16], open_classifier(evil_model, top=6, protocol=protocol, device="cpu")
    whole = predict(evil_model, some, top=6, device="cpu", protocol=protocol)
    every = OverTime(every_seconds=1.0)
    over_time = predict(evil_model, some, top=6, device="cpu", protocol=protocol, over_time=every)
    assert [one.answers for one in over_time] == [one.answers for one in whole]
    for clip, one in zip(some, whole, strict=True):
        answers, views = page_answer(classifier, clip)
        assert (answers, views) == ([(answer.name, answer.probability) for answer in one.answers], one.views)


def test_an_image_has_one_answer(evil_image_model: Path, tmp_path: Path) -> None:
    """The page reads an image with FFmpeg for its pictures of it, and as a test does for its answer."""
    picture = np.random.default_rng(3).integers(0, 256, (9, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(picture).save(tmp_path / "still.png")
    (one,) = predict(evil_image_model, [tmp_path / "still.png"], top=6, device="cpu")
    answers, views = page_answer(open_classifier(evil_image_model, top=6, device="cpu"), tmp_path / "still.png")
    assert (answers, views) == ([(answer.name, answer.probability) for answer in one.answers], one.views)
    assert views == "videoswin-4x3: 1 clip x 3 crops"
