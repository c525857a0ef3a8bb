"""Predictions for real files: correct numbers, and every kind of bad file reported without stopping the others."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import video_swinv2 as vs
from tests.data.test_media import write_disguised
from video_swinv2.data.images import read_entry
from video_swinv2.data.manifest import Entry
from video_swinv2.data.media import IMAGE, VIDEO, media_type_of, media_type_of_bytes
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation import reading
from video_swinv2.evaluation.explanation import explain
from video_swinv2.evaluation.protocols import PROTOCOLS
from video_swinv2.evaluation.views import read_views
from video_swinv2.inference.formatting import PREDICTION_COLUMNS, format_predictions
from video_swinv2.inference.media_types import find_media_files, read_file_views
from video_swinv2.inference.predictor import OverTime, output_paths, predict
from video_swinv2.models.simmim import SimMIM

CLASSES = ("a", "b", "c", "d")


def save(path: Path, frames: int | None, classes: tuple[str, ...] = CLASSES) -> Path:
    torch.manual_seed(0)
    window = (4, 4) if frames is None else (2, 4, 4)
    model = vs.create_model("swinv2_nano", num_classes=4, frames=frames, image_size=32, window=window)
    preprocessing = vs.Preprocessing(frames=frames, frame_stride=2, image_size=(32, 32))
    vs.save_model(model, path, classes=classes, preprocessing=preprocessing, provenance={})
    return path


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "clip.safetensors", 4)


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "image.safetensors", None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (3, 12, 6, 8, 3), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    write_video(folder / "one.mp4", noise[0])
    write_video(folder / "deep" / "two 'quoted'.mkv", noise[1])
    write_video(folder / "three.mp4", noise[2]).rename(folder / "no_suffix")
    (folder / "broken.mp4").write_bytes((folder / "one.mp4").read_bytes()[:300])
    (folder / "notes.txt").write_text("hello\n" * 100)
    (folder / "empty.avi").write_bytes(b"")
    Image.fromarray(noise[0, 0]).save(folder / "still.png")
    return folder


def test_probabilities_are_the_models(clip_model: Path, files: Path) -> None:
    (prediction,) = predict(clip_model, [files / "one.mp4"], device="cpu", top=9)
    card = vs.read_card(clip_model)
    pixels, _ = read_views(files / "one.mp4", PROTOCOLS["videoswin-4x3"], card.preprocessing)
    with torch.no_grad():
        expected = (
            vs.load_model(clip_model)(normalise(pixels, card.preprocessing.mean, card.preprocessing.std))
            .softmax(-1)
            .mean(0)
        )
    assert [answer.name for answer in prediction.answers] == [CLASSES[i] for i in expected.argsort(descending=True)]
    for answer in prediction.answers:
        assert answer.probability == pytest.approx(float(expected[CLASSES.index(answer.name)]), abs=1e-5)
    assert sum(answer.probability for answer in prediction.answers) == pytest.approx(1.0)
    assert predict(clip_model, [files / "one.mp4"], device="cpu", top=2)[0].answers == prediction.answers[:2]


def test_files_in_a_folder_are_found_by_suffix_and_content(clip_model: Path, files: Path) -> None:
    predictions = predict(clip_model, [files], device="cpu", protocol="center-1x1")
    found = {Path(prediction.path).name: prediction for prediction in predictions}
    assert sorted(found) == ["broken.mp4", "empty.avi", "no_suffix", "one.mp4", "two 'quoted'.mkv"]
    for name in ("one.mp4", "no_suffix", "two 'quoted'.mkv"):
        assert not found[name].error
        assert len(found[name].answers) == 4
    assert "0 bytes" in found["empty.avi"].error
    assert found["broken.mp4"].error
    assert not found["broken.mp4"].answers
    assert str(files) not in found["broken.mp4"].error, "the path is given once"


def test_files_are_classified_by_what_they_contain(
    clip_model: Path, image_model: Path, tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    kinds = write_disguised(tmp_path, write_video)
    for model in (clip_model, image_model):
        predictions = predict(model, [tmp_path / name for name in kinds], device="cpu", protocol="center-1x1")
        errors = {Path(prediction.path).name: prediction.error for prediction in predictions}
        refused = "an image, but this model takes videos" if model == clip_model else ""
        assert errors == {name: refused if kind == IMAGE else "" for name, kind in kinds.items()}
    found = {Path(prediction.path).name for prediction in predict(clip_model, [tmp_path], device="cpu")}
    assert found == {name for name, kind in kinds.items() if kind == VIDEO}


def test_predictions_and_errors_keep_the_order_of_the_files(clip_model: Path, files: Path) -> None:
    names = ["gone.mp4", "still.png", "one.mp4", "notes.txt", "one.mp4"]
    predictions = predict(clip_model, [files / name for name in names], device="cpu", protocol="center-1x1")
    assert [Path(prediction.path).name for prediction in predictions] == names
    assert [prediction.error for prediction in predictions] == [
        "no such file",
        "an image, but this model takes videos",
        "",
        "neither a video nor an image",
        "",
    ]
    assert predictions[2] == predictions[4]
    read_back = json.loads(format_predictions(predictions, "json"))
    assert read_back[2]["answers"][0].keys() == {"name", "probability"}
    assert read_back[2]["views"] == "center-1x1: 1 clip x 1 crop"
    rows = list(csv.DictReader(format_predictions(predictions, "csv").splitlines(), PREDICTION_COLUMNS))
    assert [row["error"] for row in rows[:2]] == [prediction.error for prediction in predictions[:2]]
    assert [row["class"] for row in rows[2:6]] == [answer.name for answer in predictions[2].answers]
    assert [row["views"] for row in rows[:3]] == ["", "", "center-1x1: 1 clip x 1 crop"]
    assert float(rows[2]["probability"]) == pytest.approx(predictions[2].answers[0].probability, abs=1e-6)
    text = format_predictions(predictions)
    assert "gone.mp4: no such file" in text
    assert "one.mp4  (center-1x1: 1 clip x 1 crop)\n" in text
    assert f"{100 * predictions[2].answers[0].probability:.1f} %  {predictions[2].answers[0].name}" in text


def test_an_image_model_reads_images_as_they_are_shown(image_model: Path, files: Path, tmp_path: Path) -> None:
    picture = Image.open(files / "still.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # EXIF orientation: rotated clockwise by 90 degrees when shown
    picture.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=turned, quality=100, subsampling=0)
    (tmp_path / "cut.png").write_bytes((files / "still.png").read_bytes()[:80])
    picture.save(tmp_path / "plain.png")
    cut, plain, same = predict(image_model, [tmp_path], device="cpu")
    assert "cut.png" in cut.path
    assert "not a readable image" in cut.error
    for a, b in zip(plain.answers, same.answers, strict=True):
        assert a.name == b.name
        assert a.probability == pytest.approx(b.probability, abs=0.02)
    (video,) = predict(image_model, [files / "one.mp4"], device="cpu")
    assert len(video.answers) == 4


def test_an_image_that_kills_its_reader_costs_only_itself(
    image_model: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are read in processes of their own, as videos are. No known file crashes Pillow, so the test does."""

    def crash(entry: Entry, max_pixels: int) -> torch.Tensor:
        if entry.path.name == "bad.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return read_entry(entry, max_pixels)

    for name in ("bad.png", "good.png"):
        (tmp_path / name).write_bytes((files / "still.png").read_bytes())
    monkeypatch.setattr(reading, "read_entry", crash)
    bad, good = predict(image_model, [tmp_path], device="cpu", workers=1)
    assert bad.error == "the decoder crashed (SIGKILL)"
    assert len(good.answers) == 4


def test_an_image_has_each_spatial_crop_once(files: Path) -> None:
    preprocessing = vs.Preprocessing(frames=None, frame_stride=1, image_size=(32, 32))
    assert read_file_views(files / "still.png", PROTOCOLS["videoswin-4x3"], preprocessing).shape == (3, 3, 32, 32)
    assert read_file_views(files / "still.png", PROTOCOLS["center-1x1"], preprocessing).shape == (1, 3, 32, 32)


def test_an_answer_is_explained_by_an_image_per_file(
    clip_model: Path, image_model: Path, files: Path, tmp_path: Path
) -> None:
    """Of the views that give the answer, whether or not the file is classified over time as well."""
    sources = [files / "one.mp4", files / "notes.txt", files / "deep" / "two 'quoted'.mkv"]
    whole = predict(clip_model, sources, device="cpu", explain=tmp_path / "a")
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == ["one.jpg", "two _quoted_.jpg"]
    assert [one.explanation for one in whole] == [
        str(tmp_path / "a" / "one.jpg"),
        "",
        str(tmp_path / "a" / "two _quoted_.jpg"),
    ]
    assert f"  explained in {tmp_path / 'a' / 'one.jpg'}" in format_predictions(whole)
    assert json.loads(format_predictions(whole, "json"))[0]["explanation"] == whole[0].explanation
    card = vs.read_card(clip_model)
    pixels, _ = read_views(files / "one.mp4", PROTOCOLS["videoswin-4x3"], card.preprocessing)
    label = CLASSES.index(whole[0].answers[0].name)
    expected = explain(vs.load_model(clip_model), pixels, card.preprocessing, label)
    assert (tmp_path / "a" / "one.jpg").read_bytes() == expected.jpeg
    every = OverTime(every_seconds=1.0)
    (over_time,) = predict(clip_model, sources[:1], device="cpu", explain=tmp_path / "b", over_time=every)
    assert over_time.answers == whole[0].answers
    assert (tmp_path / "b" / "one.jpg").read_bytes() == expected.jpeg
    (still,) = predict(image_model, [files / "still.png"], device="cpu", explain=tmp_path / "c")
    assert Image.open(still.explanation).size == (36, 70)  # one frame above the same one
    with pytest.raises(UsageError, match="is inside the source"):
        predict(clip_model, [files], device="cpu", explain=files / "deep")


def test_a_pretraining_file_is_called_one(tmp_path: Path) -> None:
    encoder = vs.create_model("swinv2_nano", num_classes=0, frames=4, image_size=32, window=(2, 4, 4))
    path = tmp_path / "pretrained.safetensors"
    vs.save_model(SimMIM(encoder), path, classes=(), preprocessing=vs.Preprocessing(4, 2, (32, 32)))
    with pytest.raises(UsageError, match=r"pretrained\.safetensors: a pre-training file or backbone, .* init="):
        predict(path, [tmp_path], device="cpu")


def test_media_types(files: Path) -> None:
    assert (
        media_type_of(files / "one.mp4")
        == media_type_of(files / "no_suffix")
        == media_type_of(files / "empty.avi")
        == VIDEO
    )
    assert media_type_of(files / "still.png") == IMAGE
    assert media_type_of(files / "notes.txt") is None
    assert find_media_files([files], IMAGE) == [(files / "still.png", IMAGE)]


def test_real_containers_are_recognised_by_their_content(outside_data: Path) -> None:
    """Real files, of which only the first bytes are seen."""
    videos = [*(outside_data / "ut_interaction").rglob("*.avi"), *(outside_data / "raw_clips").rglob("*.mp4")]
    assert videos
    for path in videos[:200:10]:
        with path.open("rb") as stream:
            assert media_type_of_bytes(stream.read(400)) == VIDEO, path


def test_wrong_usage(clip_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no video in this folder"):
        predict(clip_model, [tmp_path], device="cpu")
    with pytest.raises(UsageError, match="top"):
        predict(clip_model, [tmp_path], top=0)
    with pytest.raises(UsageError, match="center-1x1"):
        predict(clip_model, [tmp_path], protocol="centre-1x1")
    with pytest.raises(UserError, match=r"gone\.safetensors"):
        predict(tmp_path / "gone.safetensors", [tmp_path])
    with pytest.raises(UsageError, match="no class names"):
        predict(save(tmp_path / "nameless.safetensors", 4, ()), [tmp_path])


def test_an_annotated_copy_replaces_no_source(tmp_path: Path) -> None:
    """Neither its own nor that of a later file, which is still to be read."""
    for folder in ("a", "out"):
        (tmp_path / folder).mkdir()
    names = [str(tmp_path / "a" / "clip.mp4"), str(tmp_path / "out" / "clip.mp4"), "http://host/clip.mp4"]
    copies = output_paths(tmp_path / "out", names, ".mp4", "--video")
    assert [path and path.name for path in copies] == ["clip-2.mp4", "clip-3.mp4", "clip-4.mp4"]
