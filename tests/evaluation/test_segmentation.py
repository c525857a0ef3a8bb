"""The test of a segmenter: figures against NumPy, two processes against one, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import video_swinv2 as vs
from tests.training.resume_worker import Ranks
from video_swinv2.cli import main
from video_swinv2.data.transforms import normalise
from video_swinv2.evaluation.segmentation import run_segmentation_test
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

IMAGES = 5


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Noise of several sizes with random masks of two classes; index 7 is no class."""
    root = tmp_path / "data"
    for folder in ("images", "masks"):
        (root / folder / "test").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        size = (24 + 4 * number, 36)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / f"images/test/{number}.jpg")
        Image.fromarray(rng.choice(np.array([0, 1, 7], dtype=np.uint8), size)).save(root / f"masks/test/{number}.png")
    (root / "classes.txt").write_text("a\nb\n")
    return root


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = vs.create_segmenter("swinv2_nano", num_classes=2, image_size=32, window=4, channels=64)
    torch.nn.init.normal_(made.head.classifier.weight)  # so that both classes are answers
    provenance = {"data": {"ignore_index": 7, "reduce_zero_label": False}}
    path = tmp_path / "model.safetensors"
    preprocessing = Preprocessing(None, 1, (32, 32))
    vs.save_model(made, path, classes=["a", "b"], preprocessing=preprocessing, provenance=provenance)
    return path


def run_test(model: Path, data: Path, out: Path, *options: str) -> None:
    sys.exit(main(["test", str(model), str(data), "--out", str(out), *options]))


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


def test_figures_are_those_of_numpy_on_one_process_and_on_two(model: Path, data: Path, tmp_path: Path) -> None:
    result = run_segmentation_test(model, data, out=tmp_path / "one")
    segmenter, dataset = vs.load_model(model), vs.SegmentationDataset(data, "test", ignore_index=7)
    counts = np.zeros((2, 2), dtype=np.int64)
    for image, mask in (dataset[i] for i in range(IMAGES)):
        with torch.no_grad():
            answer = segmenter(normalise(image[None], IMAGENET_MEAN, IMAGENET_STD))[0].argmax(0).numpy()
        truth = mask.numpy()
        for k in range(2):
            for j in range(2):
                counts[k, j] += ((truth == k) & (answer == j)).sum()
    assert np.array_equal(np.array(result["confusion"])[:, :2], counts)
    right, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    assert result["miou"] == pytest.approx(np.mean(right / union))
    assert [row["iou"] for row in result["per_class"]] == pytest.approx((right / union).tolist())
    assert result["miou_interval"][0] < result["miou"] < result["miou_interval"][1]
    assert result["images"] == {"listed": IMAGES, "scored": IMAGES, "failed": 0}
    assert Image.open(tmp_path / "one" / "mistakes.png").height == IMAGES * 160
    page = (tmp_path / "one" / "report.html").read_text()
    assert f"{100 * result['miou']:.1f}<small> % mIoU" in page
    assert "data:image/png;base64," in page
    (tmp_path / "one" / "report.html").unlink()
    assert main(["report", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "report.html").read_text() == page
    log = tmp_path / "two.log"
    assert Ranks(2, run_test, model, data, tmp_path / "two", log=log).wait() == [0, 0], log.read_text()[-3000:]
    two = read(tmp_path / "two")
    assert two["processes"] == 2
    for key in ("confusion", "miou", "miou_interval", "per_class"):
        assert two[key] == result[key]
    assert [image["name"] for image in two["per_image"]] == list("01234")
    assert "mIoU" in log.read_text()


def test_several_views_are_a_test_of_their_own(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t"
    assert main(["test", str(model), str(data), "--protocol", "slide", "--out", str(out)]) == 0
    assert "report:" in capsys.readouterr().out
    assert read(out)["protocol_numbers"]["mode"] == "slide"
    assert main(["test", str(model), str(data), "--protocol", "whole-multi-scale", "--out", str(out)]) == 2
    assert "holds the result of another test, of different protocol_numbers" in capsys.readouterr().err
    assert main(["test", str(model), str(data), "--protocol", "videoswin-4x3", "--out", str(tmp_path / "u")]) == 2
    assert "a segmenter has no 'videoswin-4x3'; choose one of whole, slide" in capsys.readouterr().err


def test_an_unreadable_image_is_named_and_counts_as_missed(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_segmentation_test(model, data, out=tmp_path / "a")
    path = data / "images/test/2.jpg"
    path.write_bytes(path.read_bytes()[:700])  # the header is whole, so the check before the test passes
    broken = run_segmentation_test(model, data, out=tmp_path / "b")
    assert broken["images"]["failed"] == 1
    assert "2.jpg" in capsys.readouterr().err
    assert np.array(broken["confusion"]).sum() == np.array(whole["confusion"]).sum()
    assert np.array(broken["confusion"])[:, 2].sum() > 0
    assert broken["miou"] < whole["miou"]


def test_other_classes_are_refused(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "classes.txt").write_text("b\na\n")
    assert main(["test", str(model), str(data), "--out", str(tmp_path / "t")]) == 2
    assert "('a' there, 'b' here)" in capsys.readouterr().err
