"""Tests of image models: class folders, numbered folders and tars give the same scores, bounds and report."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import video_swinv2 as vs
from tests.evaluation.small import make_answers_differ, picture, quick
from video_swinv2.cli import main
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.protocols import PROTOCOLS
from video_swinv2.evaluation.testing import run_test, summarize_tests
from video_swinv2.evaluation.views import cut_image
from video_swinv2.report.scores import load_scores

CLASSES = ("zebra", "ant", "bee")  # the model's order is not the alphabet's
QUICK = quick()
pytestmark = pytest.mark.usefixtures("own_cache")


def tree(root: Path, names: tuple[str, ...]) -> Path:
    """Two pictures for each class folder."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(picture(2 * number + i)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model = vs.create_model("swinv2_nano", num_classes=3, image_size=32, window=4)
    make_answers_differ(model)
    vs.save_model(model, path, classes=CLASSES, preprocessing=vs.Preprocessing(None, 1, (32, 32)))
    return path


def test_scores_of_class_folders_are_the_models_own(model_path: Path, tmp_path: Path) -> None:
    data = tree(tmp_path / "data" / "val", ("ant", "bee", "zebra")).parent
    result = run_test(model_path, data, protocol="center-1x1", split="val", out=tmp_path / "out", overrides=QUICK)
    scores, model, card = (
        load_scores(tmp_path / "out" / "scores.npz"),
        vs.load_model(model_path),
        vs.read_card(model_path),
    )
    assert scores.paths == tuple(f"val/{name}/{i}.png" for name in ("ant", "bee", "zebra") for i in range(2))
    assert [CLASSES[label] for label in scores.labels] == ["ant", "ant", "bee", "bee", "zebra", "zebra"]
    for row, logits in enumerate(scores.logits):
        pixels, views = cut_image(
            torch.from_numpy(picture(row)).permute(2, 0, 1), PROTOCOLS["center-1x1"], card.preprocessing
        )
        with torch.no_grad():
            expected = model(normalise(pixels, card.preprocessing.mean, card.preprocessing.std))
        np.testing.assert_allclose(logits, expected.numpy(), rtol=2e-3, atol=2e-3)
        assert scores.views[row].tolist() == [[0, *view.box] for view in views]
    assert np.ptp(scores.logits.astype(float), axis=0).max() > 0.1, "the model gives all images the same answer"
    right = (scores.logits[:, 0].argmax(axis=1) == scores.labels).mean()
    assert result["top1"] == pytest.approx(right)
    assert result["top5"] is None, "three classes"
    assert "6 of 6 images scored" in summarize_tests({"center-1x1": result}, tmp_path)
    assert "over 6 images" in (tmp_path / "out" / "report.html").read_text()


def test_the_crop_is_the_middle_of_the_resized_picture() -> None:
    """Compared with Pillow: short side 256/224 of the crop, bicubic with antialiasing, centre crop."""
    original = picture(0, (120, 160))
    pixels, (view,) = cut_image(
        torch.from_numpy(original).permute(2, 0, 1), PROTOCOLS["center-1x1"], vs.Preprocessing(None, 1, (56, 56))
    )
    assert view.box == (4, 15, 56, 56)  # of 64 x 86: the long side is even
    resized = np.asarray(Image.fromarray(original).resize((86, 64), Image.Resampling.BICUBIC), dtype=int)
    difference = np.abs(pixels[0].permute(1, 2, 0).numpy() - resized[4:60, 15:71])
    assert difference.max() <= 2, "both round between their two passes, in different orders"
    assert difference.mean() < 0.3


def test_an_image_is_one_clip_and_a_broken_one_moves_the_bounds(model_path: Path, tmp_path: Path) -> None:
    data = tree(tmp_path / "data", CLASSES)
    whole = run_test(model_path, data, protocol="videoswin-4x3", split="all", out=tmp_path / "a", overrides=QUICK)
    assert (whole["protocol"], whole["views"]) == ("videoswin-4x3", 3)
    (data / "bee" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a picture")
    broken = run_test(model_path, data, protocol="videoswin-4x3", split="all", out=tmp_path / "b", overrides=QUICK)
    assert broken["top1"] == whole["top1"]
    assert broken["videos"] == {"listed": 7, "scored": 6, "failed": 1}
    right = round(6 * whole["top1"])
    assert broken["top1_bounds"] == [right / 7, (right + 1) / 7]
    scores = load_scores(tmp_path / "b" / "scores.npz")
    assert [path for path, reason in zip(scores.paths, scores.reasons, strict=True) if reason] == ["bee/cut.jpg"]


def test_numbered_folders_are_indices_only_on_request(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tree(tmp_path / "data", ("0", "1", "2"))
    arguments = ["test", str(model_path), str(data), "--protocol", "center-1x1", "--split", "all"]
    arguments += ["--out", str(tmp_path / "out"), "data.workers=0", "engine.device=cpu"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "add --classes-by index" in error
    assert error.count("\n") == 1
    assert main([*arguments, "--classes-by", "index"]) == 0
    scores = load_scores(tmp_path / "out" / "scores.npz")
    assert scores.labels.tolist() == [int(path.split("/")[0]) for path in scores.paths]
    assert scores.classes == CLASSES
    (data / "2").rename(data / "3")
    assert main([*arguments, "--classes-by", "index"]) == 2
    assert "class folder '3' is not an index into the model's 3 classes" in capsys.readouterr().err


def test_labels_in_tars_are_indices(model_path: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "val-000000.tar", "w") as tar:
        for i, label in enumerate((2, 0, 1)):
            jpeg = io.BytesIO()
            Image.fromarray(picture(i)).save(jpeg, format="png")
            for suffix, content in (("png", jpeg.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    out = tmp_path / "out"
    run_test(model_path, tmp_path / "val-000000.tar", protocol="center-1x1", split="all", out=out, overrides=QUICK)
    scores = load_scores(out / "scores.npz")
    assert scores.labels.tolist() == [2, 0, 1]
    assert scores.scored.all()


def test_another_resolution_and_window(model_path: Path, tmp_path: Path) -> None:
    data = tree(tmp_path / "data", CLASSES)
    overrides = quick(image_size=(64, 64), window=8)
    result = run_test(
        model_path, data, protocol="center-full-1x1", split="all", out=tmp_path / "o", overrides=overrides
    )
    assert result["image_size"] == [64, 64]
    # 40 x 56 pixels resized to 64 x 90: with resize 1 the crop takes the full height.
    assert load_scores(tmp_path / "o" / "scores.npz").views[0, 0].tolist() == [0, 0, 13, 64, 64]


def test_a_clip_model_refuses_images(tmp_path: Path) -> None:
    model = vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=32, window=(2, 4, 4))
    vs.save_model(model, tmp_path / "clip.safetensors", classes=CLASSES, preprocessing=vs.Preprocessing(4, 1, (32, 32)))
    data = tree(tmp_path / "data", CLASSES)
    with pytest.raises(UsageError, match="contains images, but the model takes clips"):
        run_test(
            tmp_path / "clip.safetensors", data, protocol="center-1x1", split="all", out=tmp_path / "o", overrides=QUICK
        )
